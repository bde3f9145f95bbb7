"""Each script of bench/ as a whole, at toy size. No time is asserted."""

import json

import pytest
import torch
from benching import run


def test_the_sweep_of_launches_puts_the_rule_beside_the_best():
    import tune

    entries = [
        {"launch": "rule's", "median": 3.0},
        {"launch": "a", "median": 2.0},
        {"launch": "b", "missing": "failed: x"},
    ]
    found = tune.compare(entries)
    assert found["rows"]["rule"] == {"launch": "rule's", "median": 3.0, "time_ratio": 1.5}
    assert found["rows"]["best"] == {"launch": "a", "median": 2.0, "time_ratio": 1.0}
    assert found["timed"] == entries
    assert "time_ratio" not in tune.compare(entries[::-1])["rows"]["rule"]


def test_the_launches_worth_timing():
    import tune

    tried = {tuple(choice.values()) for choice in tune.choices(128256, 2, True)}
    assert (4096, 2, 8, 16) in tried
    assert (4096, 2, 8, 32) not in tried  # 32 tiles a row: a part would have one tile only
    assert (16384, 1, 1, 1) not in tried  # 1 KiB a thread
    assert (4096, 4, 8, 1) in tried  # 128 bytes a thread at once
    assert (8192, 4, 8, 1) not in tried
    assert {choice["splits"] for choice in tune.choices(128256, 2, False)} == {1}


def kept(done, output):
    assert done.returncode == 0, done.stderr
    assert output.with_suffix(".png").exists() == ("tun" not in output.name)
    assert not list(output.parent.glob("*.partial.json"))
    return json.loads(output.read_text())


def test_the_losses_from_end_to_end(tmp_path):
    output = tmp_path / "kernels.json"
    sizes = ("--hidden-size", 16, "--vocab-size", 64, "--logits-shape", 2, 8, 64, "--repeats", 2)
    levels = ("--device", "cpu", "--dtype", "float32", "--levels", "token_logps, 16")
    done = run("losses.py", *levels, *sizes, "--output", output)
    rows = kept(done, output)["groups"]["token_logps, 16 rows"]["rows"]
    assert {"bpo_fast", "eager", "torch.compile", "F.cross_entropy", "floor"} <= set(rows)
    for name, found in rows.items():
        assert "missing" in found or len(found["seconds"]) == 2
        assert name == "floor" or "missing" in found or found["agrees"]


def test_the_sweep_over_tokens_and_vocabulary(tmp_path, monkeypatch):
    import losses

    output = tmp_path / "sweep.json"
    points = ["--sweep-tokens=16", "--sweep-vocab-size=64", "--sweep-vocabularies=128", "--sweep-fixed-tokens=8"]
    options = ["--device=cpu", "--dtype=float32", "--sweep", *points, "--hidden-size=16", "--repeats=1"]
    monkeypatch.setattr(losses, "SWEEP", ("bpo_fast", "eager"))
    assert losses.main([*options, f"--output={output}"]) == 0
    groups = json.loads(output.read_text())["groups"]
    assert {title: found["shape"] for title, found in groups.items()} == {
        "tokens 16": {"sequences": 2, "tokens": 16, "H": 16, "V": 64},
        "vocabulary 128": {"sequences": 2, "tokens": 8, "H": 16, "V": 128},
    }
    # Measured by a fresh process each, with the point's own sizes.
    assert all(row["peak_bytes"] >= 0 for found in groups.values() for row in found["rows"].values())
    assert output.with_suffix(".png").exists()


def test_a_level_that_is_not_there_is_said():
    import losses

    said = losses.main(["--levels", "no_such_level"])
    assert said.startswith("--levels: found no_such_level, expected the beginning of one of: linear_dpo_loss, linear_")


def test_the_noise_from_end_to_end(tmp_path):
    output = tmp_path / "noise.json"
    done = run("noise.py", "--device", "cpu", "--shape", 4, 2, 8, "--repeats", 2, "--levels", 3, "--output", output)
    groups = kept(done, output)["groups"]
    assert list(groups) == ["one level", "ladder", "rows"]
    for found in groups.values():
        assert not any("missing" in row for row in found["rows"].values())
    rows = groups["one level"]["rows"]
    assert rows["clone"]["floor_ratio"] == rows["floor"]["floor_ratio"] == 1.0


def test_answers_beside_the_loops_of_others(tmp_path, monkeypatch):
    import bootstrap

    output = tmp_path / "bootstrap.json"
    monkeypatch.setattr(bootstrap, "SEVERAL_STEPS", [100, 900])
    sizes = ["--images=3", "--batch-sizes", "2", "--max-new-tokens=4", "--repeats=1", "--warmup=0"]
    assert bootstrap.main([*sizes, f"--output={output}"]) == 0
    groups = json.loads(output.read_text())["groups"]
    assert list(groups) == ["image_weakened, one step", "image_weakened, 2 steps", "text alone"]
    for found, answers in zip(groups.values(), (3, 6, 3), strict=True):
        for row in found["rows"].values():
            assert row["same_answers"] == 1.0
            assert row["answers_per_second"] == answers / row["median"]


def test_the_sweep_of_launches_under_the_interpreter(tmp_path):
    output = tmp_path / "tuning.json"
    arguments = ("--device", "cpu", "--dtypes", "float32", "--shapes", "2x512", "--output", output)
    groups = kept(run("tune.py", *arguments, TRITON_INTERPRET="1"), output)["groups"]
    assert set(groups) == {f"{job} float32 2x512" for job in ("forward", "backward", "unit_gradient")}
    for found in groups.values():
        assert len(found["timed"]) > 3
        assert not any("missing" in entry for entry in found["timed"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said where there is no GPU")
def test_without_a_gpu_the_sweep_of_launches_says_so():
    import tune

    assert tune.main([]) == "--device: found no NVIDIA GPU, expected one, so nothing was measured."
