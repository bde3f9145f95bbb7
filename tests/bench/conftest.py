"""Fixtures of the tests of bench/."""

import pytest
from benching import BENCH, git


@pytest.fixture(autouse=True)
def bench(monkeypatch):
    """Makes the files of bench/ importable, as they are to each other."""
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.fixture
def repository(tmp_path):
    """A git repository with one commit, and the places that benchmarks write to."""
    root = tmp_path / "repository"
    (root / "bench/results").mkdir(parents=True)
    (root / "docs").mkdir()
    for name in ("code.py", "README.md", "docs/benchmarks.md", "bench/results/old.json"):
        (root / name).write_text("before <!-- begin figures -->\nold\n<!-- end figures --> after\n")
    (root / "bench/results/old.json").unlink()
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "-c", "user.name=x", "-c", "user.email=x@y", "commit", "-qm", "first")
    return root
