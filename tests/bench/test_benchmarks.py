"""The benchmarks' own parts: what they compare, keep, and write. No time is asserted."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"
TOY = ("--tokens", 32, "--policy-tokens", 16, "--hidden-size", 16, "--vocab-size", 64, "--repeats", 2)


@pytest.fixture
def bench(monkeypatch):
    """Makes the scripts of bench/ importable, as they are to each other."""
    monkeypatch.syspath_prepend(str(BENCH))


def run(script, *arguments, **environment):
    command = [sys.executable, str(BENCH / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_a_level_from_end_to_end(bench, tmp_path):
    output = tmp_path / "kernels.json"
    done = run(
        "kernels.py", "--device", "cpu", "--dtype", "float32", "--levels", "token_logps, 16", *TOY, "--output", output
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    rows = result["levels"]["token_logps, 16 rows"]["rows"]
    assert {"bpo_fast", "eager", "torch.compile", "F.cross_entropy", "floor"} <= set(rows)
    for name, row in rows.items():
        assert "missing" in row or len(row["seconds"]) == 2
        assert name == "floor" or "missing" in row or row["agrees"]
    assert output.with_suffix(".png").stat().st_size > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels.json", "kernels.png"]

    import tables

    text = tables.kernels(result)
    assert "V 64, float32" in text
    assert "| milliseconds | 16 rows |" in text


def test_a_candidate_that_differs_is_marked(bench):
    import kernel_levels
    import tables
    from kernel_peers import plain

    # By its path: "kernels" is also what the repository's folder of that name answers to.
    spec = importlib.util.spec_from_file_location("bench_kernels", BENCH / "kernels.py")
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    options = kernels.parse(["--device", "cpu", "--dtype", "float32", *map(str, TOY)])
    level = kernel_levels.LINEAR_LOGPS
    right = kernel_levels.Candidate("right", plain(kernel_levels.ours_linear_logps))
    wrong = kernel_levels.Candidate("wrong", plain(lambda *given: 1.01 * kernel_levels.ours_linear_logps(*given)))
    broken = kernel_levels.Candidate("broken", plain(lambda problem, weight: problem.no_such_name))
    absent = kernel_levels.Candidate("absent", None, package="no_such_package")
    rows = {}
    steps = kernels.first_steps(level, (right, wrong, broken, absent), level.problem(options), options, rows)
    assert set(steps) == {"right", "wrong"}
    assert rows["right"]["agrees"]
    assert not rows["wrong"]["agrees"]
    assert rows["wrong"]["loss_error"] == pytest.approx(0.01, rel=1e-2)
    assert rows["wrong"]["gradient_error"] == pytest.approx(0.01, rel=1e-2)
    assert rows["broken"]["missing"].startswith("failed: AttributeError")
    assert rows["absent"] == {"missing": "no_such_package is not installed"}
    times = {"median": 1.0, "quartiles": [0.9, 1.1]}
    assert tables.kernel_line("wrong", rows["wrong"] | times)[0] == "wrong (**differs** from plain PyTorch)"
    assert tables.kernel_line("absent", rows["absent"])[:2] == ["absent", "no_such_package is not installed"]


def test_what_a_killed_run_left_counts_for_its_like_only(bench, tmp_path):
    from partial import Partial

    found = {"device": "cpu", "cpu": "x", "threads": 2, "versions": {"torch": "2"}, "commit": "abc", "time": "now"}
    first = Partial(tmp_path / "a.json", {"shape": (1, 2)}, found)
    first.save({"level": {"rows": {}}})
    assert Partial(tmp_path / "a.json", {"shape": (1, 2)}, found | {"time": "later"}).load() == {"level": {"rows": {}}}
    assert Partial(tmp_path / "a.json", {"shape": (1, 3)}, found).load() == {}
    assert Partial(tmp_path / "a.json", {"shape": (1, 2)}, found | {"commit": "abd"}).load() == {}
    first.remove()
    assert not list(tmp_path.iterdir())


def test_the_sweep_of_launches_puts_the_rule_beside_the_best(bench):
    import tune

    entries = [
        {"columns": 1024, "unroll": 2, "num_warps": 4, "splits": 1, "seconds": 3.0},
        {"columns": 2048, "unroll": 1, "num_warps": 8, "splits": 1, "seconds": 2.0},
        {"columns": 8192, "unroll": 2, "num_warps": 4, "splits": 1, "failed": "OutOfResources"},
    ]
    found = tune.compare(entries, (1024, 2, 4, 1))
    assert found["best"] == entries[1]
    assert found["over_best"] == 1.5
    assert tune.compare(entries, (8192, 2, 4, 1))["over_best"] is None
    tried = set(tune.launches(128256, 2, True))
    assert (4096, 2, 8, 16) in tried
    assert (4096, 2, 8, 32) not in tried  # 32 tiles a row: a part would have one tile only
    assert (16384, 1, 1, 1) not in tried  # 1 KiB a thread
    assert (4096, 4, 8, 1) in tried  # 128 bytes a thread at once
    assert (8192, 4, 8, 1) not in tried
    assert all(splits == 1 for *_, splits in tune.launches(128256, 2, False))


def test_the_sweep_of_launches_under_the_interpreter(tmp_path):
    output = tmp_path / "tuning.json"
    arguments = ("--device", "cpu", "--dtypes", "float32", "--shapes", "2x512", "--output", output)
    done = run("tune.py", *arguments, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    shapes = json.loads(output.read_text())["shapes"]
    assert set(shapes) == {f"{job} float32 2x512" for job in ("forward", "backward", "unit_gradient")}
    for shape in shapes.values():
        assert len(shape["timed"]) > 3
        assert not any("failed" in entry for entry in shape["timed"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said where there is no GPU")
def test_without_a_gpu_the_sweep_of_launches_says_so():
    done = run("tune.py")
    assert done.returncode == 2
    assert done.stderr.strip() == "bench/tune.py needs an NVIDIA GPU, and PyTorch sees none; nothing was measured."
