import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize("name", ["files", "fingerprint", "folder", "journal"])
def test_examples_run(name):
    result = doctest.testmod(import_module(f"bpo_fast.runs.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
