"""The example in every docstring of the package and of the kernels gives what it says."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    *(path.relative_to(ROOT) for path in (ROOT / "bpo_fast").rglob("*.py") if ">>>" in path.read_text()),
    *("bpo_fast" / path.relative_to(ROOT) for path in (ROOT / "kernels").glob("*.py") if ">>>" in path.read_text()),
]
MODULES = sorted({".".join(path.with_suffix("").parts) for path in SOURCES})


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
