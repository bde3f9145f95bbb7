import pytest
from tiny_world import make_world


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A user's folder, the working directory of the test."""
    make_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
