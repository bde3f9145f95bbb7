import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize("name", ["answers", "chair", "pope"])
def test_examples(name):
    result = doctest.testmod(import_module(f"bpo_fast.evaluate.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
