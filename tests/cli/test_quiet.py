"""Only what a user can do nothing about is kept from the screen."""

import sys
import time
import warnings

import pytest
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers.utils import logging

from bpo_fast.cli import quiet as module
from bpo_fast.cli.quiet import quiet


def shown(action):
    """The warnings that reach the screen while `action` runs quietly."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet():
            action()
    return [str(warning.message) for warning in caught]


def pin_memory():
    next(iter(DataLoader([1], pin_memory=True)))


def test_the_warnings_of_peft_and_the_dataloader_are_not_shown(tiny_llava):
    def wrap():
        get_peft_model(tiny_llava[0], LoraConfig(target_modules=["q_proj"]))

    assert shown(wrap) == []
    assert shown(pin_memory) == []
    for action in (wrap, pin_memory):  # both are still given, so the two lines above do hold something
        with pytest.warns((FutureWarning, UserWarning)):
            action()


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("bpo-fast: this one is ours", UserWarning),
        ("`use_cache` is deprecated and will be removed in v6.", FutureWarning),
        ("`is_gradient_checkpointing` is deprecated", DeprecationWarning),
        ("'pin_memory' argument is set as true and that is news", UserWarning),
    ],
)
def test_any_other_warning_is_shown(text, category):
    assert shown(lambda: warnings.warn(text, category, stacklevel=1)) == [text]


def test_a_logged_warning_of_transformers_is_shown(capsys):
    with quiet():
        handler = logging.logging.StreamHandler(sys.stderr)
        logger = logging.get_logger("transformers.test_quiet")
        logger.addHandler(handler)
        logger.warning("something else")
        logger.removeHandler(handler)
    assert "something else" in capsys.readouterr().err


def bar(desc, seconds):
    for _ in logging.tqdm(range(2), desc=desc, mininterval=0.0):
        time.sleep(seconds / 2)


@pytest.mark.parametrize("name", ["Loading weights", "Writing model shards"])
def test_the_bar_of_a_models_weights_is_shown_only_if_it_lasts(capsys, monkeypatch, name):
    with quiet():
        bar(name, 0)
        assert capsys.readouterr().err == ""
        bar("Downloading", 0)
        assert "Downloading" in capsys.readouterr().err
        monkeypatch.setattr(module, "_MODEL_BAR_DELAY", 0.02)
        bar(name, 0.2)
        assert name in capsys.readouterr().err
    bar(name, 0)
    assert name in capsys.readouterr().err


def test_a_hook_that_was_there_is_called_and_put_back():
    calls = []

    def hook(factory, args, kwargs):
        calls.append(kwargs["desc"])
        return factory(*args, **kwargs)

    before = logging.set_tqdm_hook(hook)
    try:
        with quiet():
            bar("Loading weights", 0)
        assert calls == ["Loading weights"]
        assert logging.set_tqdm_hook(before) is hook
    finally:
        logging.set_tqdm_hook(before)


def test_of_bitsandbytes_only_its_missing_kernels_are_not_shown(caplog):
    logger = logging.logging.getLogger("bitsandbytes.backends.cpu.ops")
    with quiet():
        logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no such package")
        logger.warning("something else")
    logger.warning("Failed to load CPU gemm_4bit_forward from elsewhere")
    assert caplog.messages == ["something else", "Failed to load CPU gemm_4bit_forward from elsewhere"]
