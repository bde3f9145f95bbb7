"""A training in its folder: claimed late, stopped by a signal, resumed, done once."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_world import edit, make_world

from bpo_fast.cli import main as cli
from bpo_fast.runs.folder import locked_folder
from bpo_fast.train.checkpoints import last_complete_checkpoint
from bpo_fast.train.run import RECORD_FILE
from bpo_fast.train.stopping import StopOnSignal
from bpo_fast.train.trainer import BPOTrainer


@pytest.fixture
def world(tmp_path, monkeypatch):
    make_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*options, output_dir="out", max_steps=4):
    argv = ["--config", "run.yaml", "--output_dir", output_dir, "--max_steps", str(max_steps)]
    return cli.main(["train", *argv, *options])


def adapter(folder):
    # Copies: what load_file gives lies in the file, which a test may damage.
    return {name: weight.clone() for name, weight in load_file(Path(folder) / "adapter_model.safetensors").items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def log(folder):
    """What a run logged, but for how long it took."""
    last = max(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    timed = ("second", "data_wait")
    return [{n: value for n, value in entry.items() if not any(part in n for part in timed)} for entry in history]


def files(folder):
    """Names, bytes and times of all files of a run."""
    found = (path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def send_at(monkeypatch, step, number):
    """Sends this process a signal in the middle of a step."""
    training_step = BPOTrainer.training_step

    def stepped(self, *arguments, **options):
        if self.state.global_step + 1 == step:
            os.kill(os.getpid(), number)
        return training_step(self, *arguments, **options)

    monkeypatch.setattr(BPOTrainer, "training_step", stepped)
    return lambda: monkeypatch.setattr(BPOTrainer, "training_step", training_step)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_a_checkpoint_and_the_same_command_ends_with_the_same_adapter(
    world, capsys, monkeypatch, number, status
):
    assert train("--logging_steps", "1", output_dir="whole") == 0
    before = signal.getsignal(number)
    undo = send_at(monkeypatch, 3, number)
    assert train("--save_steps", "100", "--logging_steps", "1") == status
    undo()
    assert signal.getsignal(number) == before
    assert "a checkpoint of step 3 is in out; the same command resumes there." in capsys.readouterr().err
    assert not Path("out/adapter_model.safetensors").exists()
    assert last_complete_checkpoint("out") == "out/checkpoint-3"
    assert train("--save_steps", "100", "--logging_steps", "1") == 0
    assert "resuming from out/checkpoint-3" in capsys.readouterr().out
    assert same(adapter("out"), adapter("whole"))
    assert log("out") == log("whole")


def test_a_second_signal_ends_at_once():
    with StopOnSignal() as stop:
        stop.on_train_begin(None, None, None)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_finished_run_says_so_and_does_nothing(world, capsys):
    assert train() == 0
    before = files("out")
    capsys.readouterr()
    shutil.move("model", "elsewhere")
    os.symlink("elsewhere", "model")  # the same weights by another way
    assert train() == 0
    assert "Adapter in out (finished before, nothing is done again, 4 steps)." in capsys.readouterr().out
    assert files("out") == before


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_a_finished_run_whose_adapter_was_lost_makes_it_again_without_a_step(world, monkeypatch, damage):
    assert train(max_steps=3) == 0  # in the middle of an epoch
    expected = adapter("out")
    damage(Path("out/adapter_model.safetensors"))
    monkeypatch.setattr(BPOTrainer, "training_step", None)
    assert train(max_steps=3) == 0
    assert same(adapter("out"), expected)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(world, capsys, monkeypatch):
    assert train(output_dir="whole") == 0
    undo = send_at(monkeypatch, 3, signal.SIGTERM)
    assert train() == 143
    undo()
    weights = Path("out/checkpoint-3/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-8] + bytes(8))
    capsys.readouterr()
    assert train() == 0
    said = capsys.readouterr().out
    assert "out/checkpoint-3/adapter_model.safetensors: found other bytes than were saved" in said
    assert "resuming from out/checkpoint-2" in said
    assert same(adapter("out"), adapter("whole"))


@pytest.fixture(scope="module")
def stopped_world(tmp_path_factory):
    """A world with a run that was stopped after step 2 of 4."""
    folder = tmp_path_factory.mktemp("stopped")
    make_world(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        send_at(patch, 2, signal.SIGTERM)
        assert train() == 143
    return folder


@pytest.fixture
def stopped(stopped_world, tmp_path, monkeypatch):
    """A copy of it, the working directory."""
    folder = tmp_path / "world"
    shutil.copytree(stopped_world, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--adam_beta2", "0.95"], "adam_beta2 is 0.999 there and 0.95 here"),
        (["--adam_epsilon", "1e-6"], "adam_epsilon is 1e-08 there and 1e-06 here"),
        (["--optim", "adafactor"], "optim is 'adamw_torch_fused' there and 'adafactor' here"),
        (["--max_grad_norm", "0.5"], "max_grad_norm is 1.0 there and 0.5 here"),
        (["--lora_r", "3"], "lora_r is 2 there and 3 here"),
        (["--seed", "7"], "seed is 42 there and 7 here"),
        (["--dtype", "bfloat16"], "dtype is 'auto' there and 'bfloat16' here"),
        (
            ["--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", '{"num_cycles": 2}'],
            "lr_scheduler_kwargs is None there and {'num_cycles': 2} here",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_resumed_run_refuses_what_changes_the_result(stopped, capsys, change, said):
    before = files("out")
    assert train(*change) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("bpo-fast: error: output_dir: found a run with other settings in 'out'")
    assert said in error
    assert files("out") == before


def test_a_resumed_run_takes_what_does_not(stopped, capsys):
    assert train(output_dir="whole") == 0
    harmless = ["--logging_steps", "1", "--save_steps", "3", "--dataloader_num_workers", "1", "--run_name", "b"]
    assert train(*harmless, "--disable_tqdm", "false") == 0
    assert "resuming from out/checkpoint-2" in capsys.readouterr().out
    assert same(adapter("out"), adapter("whole"))


def test_other_pairs_are_refused_after_the_first_checkpoint_and_taken_before(stopped, capsys):
    edit(stopped / "pairs.json", lambda pairs: pairs[:-1])
    assert train() == 2
    assert "the pairs are others: none may be changed, added or left out" in capsys.readouterr().err
    for folder in Path("out").glob("checkpoint-*"):
        shutil.rmtree(folder)
    assert train() == 0
    assert "Adapter in out (3 pairs, 4 steps)." in capsys.readouterr().out


def test_an_image_that_was_mended_makes_other_pairs(stopped, capsys):
    image = stopped / "images/1.png"
    content = image.read_bytes()
    image.write_bytes(content[:300])
    assert train() == 2
    assert "the pairs are others" in capsys.readouterr().err
    image.write_bytes(content)
    shutil.move(stopped / "images", stopped / "moved")
    assert train("--image_folder", "moved") == 0


def test_a_mistyped_model_claims_nothing(world, capsys):
    assert train("--model_name_or_path", "./modle") == 2
    assert "modle" in capsys.readouterr().err
    assert not Path("out").exists()
    assert train() == 0


def test_retrained_weights_of_the_model_are_another_run(stopped, capsys):
    weights = stopped / "model/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert train() == 2
    assert "the model's weights are others" in capsys.readouterr().err


def test_two_trainings_in_one_folder(world, capsys):
    with locked_folder("out"):
        assert train() == 2
    assert "output_dir: found another process at work in 'out', expected none" in capsys.readouterr().err
    assert train() == 0


def test_files_of_something_else_are_left_alone(world, capsys):
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("years")
    assert train() == 2
    assert f"output_dir: found files but no {RECORD_FILE} in 'out'" in capsys.readouterr().err
    assert os.listdir("out") == ["thesis.txt"]


def test_a_full_disk_leaves_the_checkpoints_before(world, capsys, monkeypatch):
    assert train(output_dir="whole") == 0
    save, calls = torch.save, []

    def full(*arguments, **options):
        calls.append(1)
        if len(calls) > 6:
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
        return save(*arguments, **options)

    monkeypatch.setattr(torch, "save", full)
    assert train() == 2
    monkeypatch.setattr(torch, "save", save)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "found that it cannot be written" in error
    last = last_complete_checkpoint("out")
    assert last is not None
    assert train() == 0
    assert f"resuming from {last}" in capsys.readouterr().out
    assert same(adapter("out"), adapter("whole"))


def test_pairs_held_out_are_evaluated_and_not_trained_on(world, capsys):
    assert train("--eval_fraction", "0.25", "--eval_strategy", "steps", "--eval_steps", "2") == 0
    assert "Adapter in out (3 pairs, 4 steps)." in capsys.readouterr().out
    state = json.loads(Path("out/checkpoint-4/trainer_state.json").read_text())
    evaluated = [entry for entry in state["log_history"] if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluated] == [2, 4]
    assert train("--eval_fraction", "0.01", "--eval_strategy", "steps", output_dir="none") == 2
    assert "eval_fraction: found 0.01 of 4 pairs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dataloader_drop_last", "true", "--per_device_train_batch_size", "5"], "found batches of 5 for 4 pairs"),
        (["--resume_from_checkpoint", "nowhere"], "nowhere: found a checkpoint that was not written to its end"),
        (["--max_steps", "-1", "--num_train_epochs", "0"], "num_train_epochs: found 0.0, expected a positive number"),
    ],
)
def test_nothing_to_train_is_said(world, capsys, options, said):
    assert train(*options) == 2
    assert said in capsys.readouterr().err
    assert not Path("out/adapter_model.safetensors").exists()


def test_bad_pairs_are_left_out_and_listed(world, capsys):
    damaged = world / "images/1.png"
    damaged.write_bytes(damaged.read_bytes()[:300])
    assert train("--eval_dataset", "pairs.json", "--eval_strategy", "steps", "--eval_steps", "4") == 0
    said = capsys.readouterr().out
    for whose in ("", " of eval_dataset"):
        assert f"1 of 4 pairs{whose} cannot be used and are left out, see out/unusable_pairs.jsonl; the first" in said
    assert "Adapter in out (3 pairs, 4 steps)." in said
    listed = [json.loads(line) for line in Path("out/unusable_pairs.jsonl").read_text().splitlines()]
    assert [(row["dataset"], row["number"], row["id"]) for row in listed] == [
        ("train_dataset", 1, "1"),
        ("eval_dataset", 1, "1"),
    ]
    assert all("1.png" in row["reason"] for row in listed)
    assert train("--strict", "true", output_dir="strict") == 2
    assert "1.png" in capsys.readouterr().err
