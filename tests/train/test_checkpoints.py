"""Which checkpoint a run goes on from: the newest whole one; damaged ones are said, half-written ones passed over."""

import json

import pytest

from bpo_fast.train.checkpoints import SEAL_FILE, check_checkpoint, last_complete_checkpoint, seal_checkpoint


@pytest.fixture
def run(tmp_path):
    """A folder with whole checkpoints of steps 2, 4 and 10."""
    for step in (2, 4, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(bytes(range(step)))
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        seal_checkpoint(folder)
    return tmp_path


def test_the_newest_by_number(run):
    assert last_complete_checkpoint(run) == str(run / "checkpoint-10")
    check_checkpoint(run / "checkpoint-10")


def test_none_where_there_is_none(tmp_path):
    assert last_complete_checkpoint(tmp_path / "nothing") is None
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert last_complete_checkpoint(tmp_path) is None


def flip(path):
    content = bytearray(path.read_bytes())
    content[1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: flip(folder / "adapter_model.safetensors"), "found other bytes than were saved"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""), "found other bytes than were saved"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "found no adapter_model.safetensors"),
        (lambda folder: (folder / "trainer_state.json").write_text('{"glob'), "not written to its end"),
        (lambda folder: (folder / SEAL_FILE).write_text("[1"), "not written to its end"),
    ],
)
def test_a_damaged_one_is_said_and_the_one_before_taken(run, damage, said):
    damage(run / "checkpoint-10")
    sentences = []
    assert last_complete_checkpoint(run, report=sentences.append) == str(run / "checkpoint-4")
    assert len(sentences) == 1
    assert said in sentences[0]
    assert "checkpoint-10" in sentences[0]
    with pytest.raises(ValueError, match=said):
        check_checkpoint(run / "checkpoint-10")


def test_one_that_a_kill_left_half_written_is_passed_over_in_silence(run):
    (run / "checkpoint-10" / SEAL_FILE).unlink()
    sentences = []
    assert last_complete_checkpoint(run, report=sentences.append) == str(run / "checkpoint-4")
    assert sentences == []
