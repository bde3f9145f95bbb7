"""The script that compares the shipped checkpoint with a new training of it; the training itself takes minutes."""

import json
import shutil

import pytest
import torch
from checkpoint import compare
from safetensors.torch import load_file, save_file

from bpo_fast.demo import tiny_llava

WEIGHTS = "model.safetensors"


@pytest.fixture
def remade(tmp_path):
    return shutil.copytree(tiny_llava.CHECKPOINT, tmp_path / "remade")


def change_weights(folder, factor):
    """Scales the output head, which the probabilities depend on."""
    weights = load_file(folder / WEIGHTS)
    name = next(name for name in weights if name.endswith("lm_head.weight"))
    weights[name] = weights[name] * factor
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def of_another_machine(folder):
    record = json.loads((folder / tiny_llava.RECORD).read_text())
    (folder / tiny_llava.RECORD).write_text(json.dumps(record | {"torch": "9.9"}))


def test_the_same_bits_agree(remade):
    assert "the same bits as its training makes, in each of 8 files" in compare(tiny_llava.CHECKPOINT, remade)


def test_one_other_bit_on_the_same_machine_is_an_error(remade):
    weights = bytearray((remade / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (remade / WEIGHTS).write_bytes(weights)
    with pytest.raises(ValueError, match=r"found other bits in model\.safetensors, expected those"):
        compare(tiny_llava.CHECKPOINT, remade)


def test_a_missing_file_is_an_error(remade):
    (remade / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"found other bits in chat_template\.jinja"):
        compare(tiny_llava.CHECKPOINT, remade)


def test_on_another_machine_a_model_that_acts_alike_agrees(remade):
    change_weights(remade, 1.001)
    of_another_machine(remade)
    assert " there and 9.9 here" in compare(tiny_llava.CHECKPOINT, remade)


def test_on_another_machine_a_model_that_acts_otherwise_is_an_error(remade):
    change_weights(remade, 0.2)
    of_another_machine(remade)
    with pytest.raises(ValueError, match=r"found probabilities that differ by 0\.\d+ from those of a training here"):
        compare(tiny_llava.CHECKPOINT, remade)


def test_a_training_records_what_decides_its_bits_and_leaves_the_thread_count(monkeypatch, tmp_path):
    seen = []

    class Saved:
        def save_pretrained(self, folder):
            folder.mkdir(exist_ok=True)
            seen.append(torch.get_num_threads())

    monkeypatch.setattr(tiny_llava, "_train_stages", lambda seed: (Saved(), Saved()))
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    before = torch.get_num_threads()
    tiny_llava.train(tmp_path / "checkpoint", seed=7)
    assert seen == [1, before, before, before]
    record = json.loads((tmp_path / "checkpoint" / tiny_llava.RECORD).read_text())
    shipped = json.loads((tiny_llava.CHECKPOINT / tiny_llava.RECORD).read_text())
    assert list(record) == list(shipped)
    assert (record["seed"], record["torch"]) == (7, torch.__version__)
