import doctest
from importlib import import_module

import pytest

MODULES = [
    "bpo_fast.answers.generate",
    "bpo_fast.data.annotations",
    "bpo_fast.data.formats",
    "bpo_fast.cli.recipe",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    result = doctest.testmod(import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
