"""Keeps from the screen what libraries say and a user can do nothing about, and that alone."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_IGNORED = (
    # PEFT asks a model of transformers by a name that transformers has replaced.
    ("`is_gradient_checkpointing` is deprecated", FutureWarning),
    # transformers' Trainer asks for pinned memory also where there is no device to pin it for.
    ("'pin_memory' argument is set as true but no accelerator is found", UserWarning),
)
# Logger -> beginning of a message. bitsandbytes looks for a package of kernels that it does without.
_LOGGED = {"bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward"}
_MODEL_BARS = ("Loading weights", "Writing model shards")
_MODEL_BAR_DELAY = 3.0  # seconds: the bar of a large model is worth seeing, that of a small one is not


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore the warnings above inside the block; show transformers' bars of a model's weights only if they last."""
    from transformers.utils.logging import set_tqdm_hook

    previous = None

    def delay(factory, args, kwargs):
        if kwargs.get("desc") in _MODEL_BARS:
            kwargs = {**kwargs, "delay": _MODEL_BAR_DELAY}
        return factory(*args, **kwargs) if previous is None else previous(factory, args, kwargs)

    previous = set_tqdm_hook(delay)
    try:
        with without_logged(), warnings.catch_warnings():
            for message, category in _IGNORED:
                warnings.filterwarnings("ignore", message, category)
            yield
    finally:
        set_tqdm_hook(previous)


@contextmanager
def without_logged() -> Iterator[None]:
    """Keep the logged messages above from the screen inside the block; needs no library."""
    for name in _LOGGED:
        logging.getLogger(name).addFilter(_is_shown)
    try:
        yield
    finally:
        for name in _LOGGED:
            logging.getLogger(name).removeFilter(_is_shown)


def _is_shown(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_LOGGED[record.name])


def end_bars() -> None:
    """Close the progress bars that an error has left open, so that what is printed next begins a line."""
    tqdm = sys.modules.get("tqdm.std")
    for bar in list(getattr(tqdm.tqdm, "_instances", ())) if tqdm else ():
        bar.close()
