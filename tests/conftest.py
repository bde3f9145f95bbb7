"""Fixtures that most tests share; the makers behind them are in tiny_models.py."""

import os

# Before transformers is imported: what a test names and does not exist is not looked for on the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from tiny_models import make_llava, make_processor

from bpo_fast.runs.journal import Journal

pytest.register_assert_rewrite("bad_input")


@pytest.fixture(scope="session")
def processor():
    return make_processor()


@pytest.fixture
def tiny_llava(processor):
    """(model, processor): random weights, 4 image tokens, grouped-query attention, CPU, fp32."""
    return make_llava(), processor


@pytest.fixture
def asked(monkeypatch):
    """The ids that a model is asked in this test, in their batches."""
    append, calls = Journal.append, []

    def spy(journal, records):
        calls.append([record["id"] for record in records])
        append(journal, records)

    monkeypatch.setattr(Journal, "append", spy)
    return calls
