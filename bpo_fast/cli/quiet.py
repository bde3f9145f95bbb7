"""Keeps from the screen what libraries say and a user can do nothing about, and that alone."""

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
_MODEL_BARS = ("Loading weights", "Writing model shards")
_MODEL_BAR_DELAY = 3.0  # seconds: the bar of a large model is worth seeing, that of a small one is not


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore the warnings above inside the block; show transformers' bars of a model's weights only if they last."""
    from transformers.utils import logging

    previous = None

    def delay(factory, args, kwargs):
        if kwargs.get("desc") in _MODEL_BARS:
            kwargs = {**kwargs, "delay": _MODEL_BAR_DELAY}
        return factory(*args, **kwargs) if previous is None else previous(factory, args, kwargs)

    previous = logging.set_tqdm_hook(delay)
    try:
        with warnings.catch_warnings():
            for message, category in _IGNORED:
                warnings.filterwarnings("ignore", message, category)
            yield
    finally:
        logging.set_tqdm_hook(previous)


def end_bars() -> None:
    """Close the progress bars that an error has left open, so that what is printed next begins a line."""
    tqdm = sys.modules.get("tqdm.std")
    for bar in list(getattr(tqdm.tqdm, "_instances", ())) if tqdm else ():
        bar.close()
