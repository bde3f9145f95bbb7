import errno
import json
import os
import random
import shlex
import subprocess
import sys
import warnings
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import SPECIAL
from tqdm.auto import tqdm

from bpo_fast.cli import main as cli
from bpo_fast.cli.options import TrainArguments
from bpo_fast.data import load_preference_dataset
from bpo_fast.losses.config import LOSS_OPTIONS
from bpo_fast.train.options import REFUSED
from bpo_fast.train.trainer import BPOConfig, BPOTrainer

BOOTSTRAP = ["--noise_step", "700", "--max_new_tokens", "5", "--batch_size", "2"]
TRAIN = ["--use_cpu", "--max_steps", "4", "--save_steps", "2", "--learning_rate", "1e-2", "--lora_r", "4"]
TRAIN += ["--per_device_train_batch_size", "2", "--report_to", "none", "--disable_tqdm", "true"]
RUN = ["--config", "run.yaml", "--output_dir", "o"]


@pytest.fixture
def world(tiny_llava, tmp_path, monkeypatch):
    """A folder with a saved model, images and annotations; commands run in it."""
    monkeypatch.chdir(tmp_path)
    model, processor = tiny_llava
    model.lm_head.weight.data[: len(SPECIAL)] = 0  # so that every response has words
    model.save_pretrained("model")
    processor.save_pretrained("model")
    Path("images").mkdir()
    rows = []
    for number in range(4):
        Image.frombytes("RGB", (16, 16), random.Random(number).randbytes(768)).save(f"images/{number}.png")
        turns = [{"from": "human", "value": f"<image>\nw{number}"}, {"from": "gpt", "value": f"w3 w{number}"}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    rows[3]["conversations"][1]["value"] = ""
    Path("data.json").write_text(json.dumps(rows))
    Path("run.yaml").write_text(
        "model_name_or_path: model\nimage_folder: images\nbootstrap: {annotations: data.json}\n"
    )
    return tmp_path


def run(*argv):
    return cli.main([argv[0], "--config", "run.yaml", *argv[1:]])


def adapter(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def last_line(text):
    return text.splitlines()[-1]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_from_annotations_to_scores(world, capsys):
    assert run("bootstrap", "--output_dir", "pairs", "--dtype", "float32", *BOOTSTRAP) == 0
    shared = "--config run.yaml --dtype float32"
    cut = sum(load_preference_dataset("pairs")["rejected_truncated"])
    assert last_line(capsys.readouterr().out) == (
        f"3 pairs in pairs (1 records skipped, see skipped.jsonl; {cut} rejected responses were cut at "
        f"max_new_tokens). Next: bpo-fast train {shared} --dataset pairs --output_dir ADAPTER"
    )
    assert run("train", "--dataset", "pairs", "--output_dir", "bpo", "--dtype=float32", *TRAIN) == 0
    assert last_line(capsys.readouterr().out) == (
        "Adapter in bpo (3 pairs, 4 steps). Next: bpo-fast evaluate --config run.yaml --dtype=float32 --adapter bpo "
        "--kind pope --questions QUESTIONS --image_folder IMAGES --output_dir SCORES"
    )
    assert any(bool(weight.any()) for name, weight in adapter("bpo").items() if "lora_B" in name)
    questions = [{"id": "a", "image": "0.png", "question": "w1", "label": "yes"}]
    Path("questions.json").write_text(json.dumps(questions))
    options = ["--questions", "questions.json", "--kind", "pope", "--max_new_tokens", "3"]
    for folder, adapted, other in [
        ("scores", ["--adapter", "bpo"], "without --adapter"),
        ("before", [], "with --adapter ADAPTER"),
    ]:
        assert run("evaluate", "--output_dir", folder, *options, *adapted) == 0
        captured = capsys.readouterr()
        assert json.loads(captured.out) == json.loads(Path(folder, "scores.json").read_text())
        assert last_line(captured.err) == (
            f"Scores in {folder} (scores.json; answers in answers.jsonl). Next: to compare, the same command {other} "
            "and with another --output_dir"
        )


def test_no_command_shows_a_warning_or_a_bar_of_loaded_weights(world, capsys):
    questions = [{"id": "a", "image": "0.png", "question": "w1", "label": "yes"}]
    Path("questions.json").write_text(json.dumps(questions))
    capsys.readouterr()
    options = ["--questions", "questions.json", "--kind", "pope", "--adapter", "bpo", "--max_new_tokens", "3"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FutureWarning)
        warnings.simplefilter("always", UserWarning)
        assert run("bootstrap", "--output_dir", "pairs", *BOOTSTRAP) == 0
        assert run("train", "--dataset", "pairs", "--output_dir", "bpo", *TRAIN, "--use_cpu", "false") == 0
        assert run("evaluate", "--output_dir", "scores", *options) == 0
    assert [str(warning.message) for warning in caught] == []
    assert "Loading weights" not in capsys.readouterr().err


def test_the_next_command_is_quoted_and_runs(world, capsys):
    assert run("bootstrap", "--output_dir", "my pairs", *BOOTSTRAP) == 0
    command = last_line(capsys.readouterr().out).partition("Next: bpo-fast ")[2]
    assert cli.main([*shlex.split(command), *TRAIN]) == 0
    assert Path("ADAPTER/adapter_model.safetensors").is_file()


def test_a_stopped_training_ends_with_the_same_adapter(world, capsys, monkeypatch):
    run("bootstrap", "--output_dir", "pairs", *BOOTSTRAP)
    run("train", "--dataset", "pairs", "--output_dir", "whole", *TRAIN)
    training_step = BPOTrainer.training_step

    def stop(trainer, *args, **kwargs):
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return training_step(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(BPOTrainer, "training_step", stop)
        assert run("train", "--dataset", "pairs", "--output_dir", "bpo", *TRAIN) == 130
    captured = capsys.readouterr()
    assert "bpo-fast: interrupted; the same command resumes where this one stopped." in captured.err
    assert not Path("bpo/adapter_model.safetensors").exists()
    assert run("train", "--dataset", "pairs", "--output_dir", "bpo", *TRAIN) == 0
    assert "resuming from bpo/checkpoint-2" in capsys.readouterr().out
    assert same(adapter("bpo"), adapter("whole"))
    for option, message in [
        (["--learning_rate", "0.1"], "(learning_rate is 0.01 there and 0.1 here)"),
        (["--lora_r", "2"], "(lora_r is 4 there and 2 here)"),
    ]:
        assert run("train", "--dataset", "pairs", "--output_dir", "bpo", *TRAIN, *option) == 2
        assert f"output_dir: found a run with other settings in 'bpo' {message}" in capsys.readouterr().err
    assert run("train", "--dataset", "pairs", "--output_dir", "bpo", *TRAIN, "--logging_steps", "1") == 0
    assert run("train", "--dataset", "pairs", "--output_dir", "images", *TRAIN) == 2
    assert "output_dir: found files but no run.json in 'images'" in capsys.readouterr().err


def test_sft_trains_another_adapter_on_the_same_pairs(world):
    run("bootstrap", "--output_dir", "pairs", *BOOTSTRAP)
    for loss_type in ("sigmoid", "sft"):
        assert run("train", "--dataset", "pairs", "--output_dir", loss_type, *TRAIN, "--loss_type", loss_type) == 0
    assert not same(adapter("sigmoid"), adapter("sft"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND: found nothing, expected a value for each; see bpo-fast --help."),
        (["fly"], "COMMAND: found 'fly', expected one of "),
        (["bootstrap"], "--model_name_or_path: found nothing, expected a value for each"),
        (
            ["bootstrap", "--model_name_or_path", "model"],
            "annotations: found none, expected a file of them; give --an",
        ),
        (["train", "--config", "none.yaml"], "--config: found no file 'none.yaml', expected a file or one of bpo-mix"),
        (["train", *RUN, "--dataset", "none"], "dataset: found nothing at 'none', expected preference pairs"),
        (["train", *RUN, "--dataset", "images"], "dataset: found no metadata.json in 'images'"),
        (["train", *RUN, "--dataset", "x", "--loss_type", "dpo"], "loss_type"),
        (["bootstrap", *RUN, "--annotations", "none.json"], "none.json: found no such file, expected a JSON file"),
        (["bootstrap", *RUN, "--image_folder", "none"], "image_folder: found no folder 'none'"),
        (["bootstrap", *RUN, "--adapter", "images"], "adapter: found no adapter_config.json in 'images'"),
        (
            ["bootstrap", *RUN, "--model_name_or_path", "none"],
            "model: found no folder 'none', expected one, or a model id",
        ),
        (["doctor", "--fast"], "--fast: found no such option, expected one of this command's; see bpo-fast doctor "),
        (["demo", "--seeds", "a"], "--seeds: found 'a', expected a whole number; see bpo-fast demo --help."),
        (["demo", "--seeds", "0", "-1"], "seed: found -1, expected a whole number from 0 to 2**32 - 1."),
        (["demo", "--seeds"], "--seeds: found another number of values, expected at least one argument; see"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(world, capsys, argv, message):
    assert cli.main(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # a progress bar of loading weights may stand before
    assert error.startswith("bpo-fast: error: ")
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("place", [0, 1, 5])
def test_traceback_is_there_for_who_asks(world, place):
    argv = ["train", *RUN, "--dataset", "none"]
    with pytest.raises(FileNotFoundError, match="dataset: found nothing at 'none'"):
        cli.main([*argv[:place], "--traceback", *argv[place:]])


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "make room on the disk, and the same command goes on."),
        (errno.EACCES, "change its permissions or name another."),
        (errno.ENAMETOOLONG, "choose a shorter name."),
        (errno.EISDIR, "name another."),
    ],
)
def test_an_error_of_the_system_is_a_sentence(monkeypatch, capsys, number, remedy):
    def fail(argv):
        raise OSError(number, os.strerror(number), "pairs.jsonl")

    monkeypatch.setitem(cli.COMMANDS, "demo", fail)
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == (
        f"bpo-fast: error: pairs.jsonl: found that it cannot be used ({os.strerror(number)}), expected a file or "
        f"folder that can; {remedy}\n"
    )


def test_demo_and_doctor_are_called(monkeypatch, capsys):
    from bpo_fast import doctor
    from bpo_fast.demo import pipeline

    calls = []
    monkeypatch.setattr(pipeline, "run", lambda output_dir, seeds: calls.append((output_dir, seeds)))
    assert cli.main(["demo", "--output_dir", "out", "--seeds", "1", "2"]) == 0
    assert calls == [("out", (1, 2))]
    assert last_line(capsys.readouterr().out) == (
        "Report in out/report.html (its figures in results.json). Next: open it in a browser; for a model and images "
        "of your own, see bpo-fast bootstrap --help"
    )
    monkeypatch.setattr(doctor, "run", lambda: 1)
    assert cli.main(["doctor"]) == 1


def python(*argv):
    result = subprocess.run([sys.executable, *argv], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("command", "unused"),
    [
        ((), "'torch', 'transformers', 'datasets'"),
        *((name, "'torch', 'peft', 'datasets'") for name in ("bootstrap", "evaluate", "merge")),
    ],
)
def test_help_needs_no_heavy_import(command, unused):
    argv = [*([command] if command else []), "--help"]
    code = (
        "import sys; from bpo_fast.cli import main as cli\n"
        f"try:\n    cli.main({argv!r})\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        f"assert not {{{unused}}} & set(sys.modules)"
    )
    text = python("-c", code)
    if not command:
        assert all(f"  {name} " in text for name in cli.COMMANDS)


def test_the_module_is_the_command_and_has_a_version():
    assert python("-m", "bpo_fast", "--version") == f"bpo-fast {version('bpo-fast')}\n"


def helped(capsys, *argv):
    with pytest.raises(SystemExit):
        cli.main(argv)
    return capsys.readouterr().out


def test_help_of_training_shows_what_is_needed_and_the_rest_on_demand(capsys):
    first, everything = helped(capsys, "train", "--help"), helped(capsys, "train", "--help_all")
    own = [item.name for item in fields(TrainArguments)]
    asked = ["output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "lr_scheduler_type"]
    asked += ["gradient_accumulation_steps", "warmup_steps", "save_steps", "save_total_limit", "seed", "logging_steps"]
    asked += ["report_to", "resume_from_checkpoint", "eval_strategy", "learning_rate", "max_length", "token_budget"]
    for text in (first, everything):
        assert all(f"  --{name} " in text for name in (*own, *asked, *LOSS_OPTIONS))
        assert not any(f"  --{name} " in text for name in REFUSED)
    others = {item.name for item in fields(BPOConfig)} - set(REFUSED)
    assert all(f"  --{name} " in everything for name in others)
    assert sum(f"  --{name} " not in first for name in others) > 40
    headings = ["\nadapter:", "\nloss:", "\ntraining:", "\nevaluation during training:", "\ncheckpoints and logs:"]
    assert sorted(headings, key=first.index) == headings
    assert len(first.splitlines()) < 180


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (ValueError("here: found a, expected b."), 2, "bpo-fast: error: here: found a, expected b."),
        (KeyboardInterrupt(), 130, "bpo-fast: interrupted; the same command resumes where this one stopped."),
    ],
)
def test_what_ends_a_command_begins_a_line_after_its_bar(monkeypatch, capsys, error, status, sentence):
    def fail(argv):
        for _ in tqdm(range(2), mininterval=0):
            raise error

    monkeypatch.setitem(cli.COMMANDS, "demo", fail)
    assert cli.main(["demo"]) == status
    assert capsys.readouterr().err.endswith(f"\n{sentence}\n")


def test_merge_calls_the_library(monkeypatch, capsys):
    calls = []

    def merge_adapter(*args, **kwargs):
        calls.append((args, kwargs))

    monkeypatch.setitem(sys.modules, "bpo_fast.models.merge", SimpleNamespace(merge_adapter=merge_adapter))
    argv = ["merge", "--model_name_or_path", "m", "--adapter", "a", "--dtype", "float16", "--output_dir", "o"]
    assert cli.main(argv) == 0
    assert calls == [(("m", "a", "o"), {"dtype": "float16", "trust_remote_code": False})]
    assert last_line(capsys.readouterr().out) == (
        "Model in o. Next: bpo-fast evaluate --model_name_or_path o --kind pope --questions QUESTIONS --image_folder "
        "IMAGES --output_dir SCORES"
    )
    assert cli.main(["merge", "--model_name_or_path", "m", "--adapter", "a", "--quantization", "nf4"]) == 2
    assert "--quantization: found an unknown name, expected an option of 'merge'" in capsys.readouterr().err
