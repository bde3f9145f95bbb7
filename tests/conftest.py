"""Fixtures that most tests share; the makers behind them are in tiny_models.py."""

import os
import re

# Before transformers is imported: what a test names and does not exist is not looked for on the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from tiny_models import make_llava, make_processor

from bpo_fast.runs.journal import Journal

pytest.register_assert_rewrite("bad_input")


# What tests compare with and a machine with a GPU may lack: a file that imports it is skipped there, by name.
PEERS = re.compile(r"No module named '(trl|liger_kernel|hypothesis|datasets)\b")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    missing = PEERS.search(str(report.longrepr)) if report.failed else None
    if missing:
        reason = f"Skipped: needs {missing[1]}, which is not installed"
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, reason)
    return report


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
