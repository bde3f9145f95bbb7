"""The benchmarks' own parts: what they compare, keep, and say. No time is asserted."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"
ENVIRONMENT = {
    "cpu": "Xeon",
    "threads": 2,
    "versions": {"torch": "2.13", "trl": "1.16"},
    "commit": "abc",
    "time": "2026-11-21T",
}


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


def git(root, *arguments):
    result = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
    return result.stdout.strip()


class Progress:
    n = 0

    def update(self, steps=1):
        self.n += steps


def run(script, *arguments, **environment):
    command = [sys.executable, str(BENCH / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def group(**rows):
    return {"what": "`op`: a job", "shape": {"tokens": 2048, "V": 64}, "reference": "eager", "rows": rows}


def row(median, peak=None, **more):
    found = {"median": median, "quartiles": [0.9 * median, 1.1 * median]}
    return found | ({} if peak is None else {"peak_bytes": peak * 2**20}) | more


# What is measured.


def test_functions_run_in_turn_and_the_order_rotates():
    from measure import interleaved

    calls, progress = [], Progress()
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    samples = interleaved(functions, warmup=1, repeats=2, calls=2, progress=progress)
    assert "".join(calls[::2]) == "cab" + "abc" + "bca"
    assert calls[::2] == calls[1::2]
    assert {name: len(seconds) for name, seconds in samples.items()} == {"a": 2, "b": 2, "c": 2}
    assert progress.n == 9
    assert interleaved({}, 1, 2, 1, progress) == {}


def test_samples_become_median_quartiles_and_ratios():
    from measure import add_ratios, summary

    assert summary([4.0, 1.0, 2.0, 3.0]) == {
        "seconds": [4.0, 1.0, 2.0, 3.0],
        "median": 2.5,
        "quartiles": [1.75, 3.25],
        "min": 1.0,
        "max": 4.0,
    }
    rows = {
        "bpo_fast": {"median": 1.0, "peak_bytes": 30},
        "eager": {"median": 4.0, "peak_bytes": 60, "floor": "clone"},
        "absent": {"missing": "CUDA only"},
        "floor": {"median": 0.5},
        "clone": {"median": 2.0},
    }
    add_ratios(rows, "eager", "floor")
    assert rows["bpo_fast"] == {
        "median": 1.0,
        "peak_bytes": 30,
        "time_ratio": 0.25,
        "peak_ratio": 0.5,
        "floor_ratio": 2.0,
    }
    assert rows["eager"]["floor_ratio"] == 2.0
    assert rows["absent"] == {"missing": "CUDA only"}
    assert rows["clone"] == {"median": 2.0, "time_ratio": 0.5, "floor_ratio": 4.0}


def test_extra_peak_sees_a_block_that_is_gone_again():
    from measure import extra_peak

    def step():
        torch.ones(64 << 18)

    assert 60 << 20 < extra_peak(step, "cpu") < 100 << 20


def test_a_candidate_that_differs_fails_or_cannot_run_is_said():
    from measure import Candidate, Operation
    from operations import LINEAR_LOGPS, loss

    ours = LINEAR_LOGPS.candidates["bpo_fast"]

    def wrong(problem):
        step = ours.setup(problem)
        return lambda: tuple(1.01 * value for value in step())

    candidates = {
        "bpo_fast": ours,
        "eager": LINEAR_LOGPS.candidates["eager"],
        "wrong": Candidate(wrong),
        "broken": loss(lambda problem: problem.no_such_name),
        "absent": Candidate(None, package="no_such_package"),
        "elsewhere": Candidate(None, cuda_only=True),
        "floor": LINEAR_LOGPS.candidates["floor"],
    }
    options = SimpleNamespace(device="cpu", dtype="float32", warmup=0, repeats=2, policy_tokens=16, hidden_size=16)
    options.vocab_size, options.response_fraction = 64, 0.5
    operation = Operation("op", "job", LINEAR_LOGPS.shape, LINEAR_LOGPS.problem, candidates, with_peak=False)
    steps, job = operation.job(options)
    progress = Progress()
    made = job(progress)
    rows = made["rows"]
    assert made["shape"] == {"tokens": 16, "H": 16, "V": 64}
    assert rows["bpo_fast"]["agrees"]
    assert not rows["wrong"]["agrees"]
    assert rows["wrong"]["loss_error"] == pytest.approx(0.01, rel=1e-2)
    assert rows["wrong"]["gradient_error"] == pytest.approx(0.01, rel=1e-2)
    assert rows["broken"]["missing"].startswith("failed: AttributeError")
    assert rows["absent"] == {"missing": "no_such_package is not installed"}
    assert rows["elsewhere"] == {"missing": "CUDA only"}
    assert rows["floor"]["is_floor"]
    assert "loss" not in rows["floor"]
    assert len(rows["wrong"]["seconds"]) == 2
    assert progress.n <= steps == 7 * 3


def test_every_peer_stays():
    from operations import DPO, LINEAR_DPO, LINEAR_LOGPS, operations

    assert {"torch.compile", "TRL fused head", "Liger DPO, trained head", "eager, trained head"} < set(
        LINEAR_DPO.candidates
    )
    names = {
        "cut-cross-entropy",
        "cut-cross-entropy, torch_compile",
        "Liger fused linear CE",
        "torch linear_cross_entropy",
    }
    assert names | {"torch linear_cross_entropy, chunked", "TRL fused head"} < set(LINEAR_LOGPS.candidates)
    assert {"bpo_fast, in place", "Liger CE, in place", "torch.compile"} < set(DPO.candidates)
    found = operations(SimpleNamespace(decode_rows=[1, 4]))
    assert list(found)[3:] == ["token_logps, 1 row", "token_logps, 4 rows"]
    few = found["token_logps, 4 rows"].candidates
    assert {"F.cross_entropy", "TRL selective_log_softmax"} < set(few)
    assert LINEAR_LOGPS.candidates["cut-cross-entropy"].package == "cut_cross_entropy"
    assert LINEAR_DPO.candidates["Liger DPO, trained head"].package == "liger_kernel"


# What is kept.


def results_of(repository, output=None, **settings):
    from results import Results

    return Results("kernels", {"device": "cpu"} | settings, output, repository=repository)


def test_results_are_kept_from_a_clean_tree_with_its_commit(repository):
    for name in ("README.md", "docs/benchmarks.md", "bench/results/noise-cpu-float32.json"):
        (repository / name).write_text("written by another benchmark")
    made = results_of(repository).run({"op": (1, lambda progress: group(eager=row(1.0)))})
    kept = json.loads((repository / "bench/results/kernels-cpu.json").read_text())
    assert kept == made
    assert kept["environment"]["commit"] == git(repository, "rev-parse", "--short=12", "HEAD")
    assert kept["groups"]["op"]["rows"]["eager"]["median"] == 1.0
    assert (repository / "bench/results/kernels-cpu.png").stat().st_size > 1000


@pytest.mark.parametrize("changed", ["code.py", "new.py", "bench/new.py"])
def test_nothing_is_kept_from_a_tree_with_uncommitted_changes(repository, tmp_path, capsys, changed):
    (repository / changed).write_text("changed")
    results = results_of(repository)
    sentence = (
        f"bench/results: found uncommitted changes ({changed}), expected a clean tree, so nothing is kept; "
        "commit them, or give --output a path outside bench/results for a trial."
    )
    assert capsys.readouterr().out.strip() == sentence
    results.run({"op": (1, lambda progress: group(eager=row(1.0)))})
    assert list((repository / "bench/results").iterdir()) == []
    printed = capsys.readouterr().out
    assert "| eager |" in printed
    assert sentence in printed
    results_of(repository, repository / "bench/results/other.json").run(
        {"op": (1, lambda progress: group(eager=row(1.0)))}
    )
    assert list((repository / "bench/results").iterdir()) == []
    trial = tmp_path / "trials/trial.json"
    results_of(repository, trial).run({"op": (1, lambda progress: group(eager=row(1.0)))})
    assert json.loads(trial.read_text())["environment"]["commit"].endswith("-dirty")


def test_the_tree_is_judged_at_the_start_of_the_run(repository):
    results = results_of(repository)
    (repository / "code.py").write_text("changed while it ran")
    results.run({"op": (1, lambda progress: group(eager=row(1.0)))})
    assert (repository / "bench/results/kernels-cpu.json").exists()


def test_outside_a_repository_nothing_is_kept(tmp_path, capsys):
    (tmp_path / "bench/results").mkdir(parents=True)
    results_of(tmp_path)
    assert "found no git repository, expected a clean tree" in capsys.readouterr().out


def test_a_killed_run_goes_on_behind_its_last_whole_group(repository):
    measured = []

    def job(title, ends=True):
        def measure(progress):
            measured.append(title)
            if not ends:
                raise KeyboardInterrupt
            return group(eager=row(1.0))

        return 2, measure

    with pytest.raises(KeyboardInterrupt):
        results_of(repository, shape=(1, 2)).run({"a": job("a"), "b": job("b", ends=False)})
    left = [path.name for path in (repository / "bench/results").iterdir()]
    assert left == ["kernels-cpu.partial.json"]
    assert results_of(repository, shape=(1, 3)).result["groups"] == {}
    made = results_of(repository, shape=(1, 2)).run({"a": job("a"), "b": job("b")})
    assert measured == ["a", "b", "b"]
    assert list(made["groups"]) == ["a", "b"]
    assert not list((repository / "bench/results").glob("*.partial.json"))


# What is said.


def test_a_table_says_times_ratios_memory_and_who_is_ahead():
    from report import text

    groups = {
        "op": group(
            bpo_fast=row(0.5, 100, time_ratio=0.25, peak_ratio=0.05),
            eager=row(2.0, 2000, time_ratio=1.0, peak_ratio=1.0),
            rival=row(0.4, 10, time_ratio=0.2, agrees=True),
            wrong=row(0.1, 1, agrees=False, loss_error=0.01, gradient_error=0.02),
            other=row(0.1, 1, variant="trained head"),
            absent={"missing": "CUDA only"},
            broken={"missing": "failed: RuntimeError: too large"},
            floor=row(0.000_2, is_floor=True),
        )
    }
    said = text({"groups": groups, "settings": {"dtype": "float32"}})
    title, header, _, *lines = [line for line in said.splitlines() if line]
    assert title == (
        "`op`: a job; tokens 2,048, V 64, float32. Lower is better. "
        "op: wrong differs from float64 (loss by 1.0e-02, gradient by 2.0e-02). "
        "op: less time than bpo_fast is taken by rival (0.8x). op: less memory than bpo_fast is taken by rival (0.1x)."
    )
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}
    assert [cell.strip() for cell in header.split("|")[2:-1]] == [
        "median time",
        "quartiles",
        "of eager's time",
        "peak MiB",
        "of eager's peak",
    ]
    assert cells["bpo_fast"] == ["0.5 s", "0.45 s - 0.55 s", "0.25x", "100", "0.05x"]
    assert cells["eager"] == ["2 s", "1.8 s - 2.2 s", "1x", "2,000", "1x"]
    assert cells["absent"] == ["CUDA only", "", "", "", ""]
    assert cells["broken"][0] == "failed"
    assert cells["floor"][0] == "0.2 ms"
    assert "wrong (differs)" in cells


def test_groups_that_do_the_same_share_a_table_and_its_common_sizes():
    from report import text

    small, large = group(eager=row(1.0)), group(eager=row(3.0))
    large["shape"] = {"tokens": 4096, "V": 64}
    said = text({"groups": {"tokens 2048": small, "tokens 4096": large}, "settings": {}})
    assert said.startswith("`op`: a job; V 64. Lower is better.\n\n|")
    assert "| tokens 4096: eager |" in said


def result_of(device, title, bench="kernels", **rows):
    return {
        "bench": bench,
        "environment": ENVIRONMENT | {"device": device},
        "settings": {},
        "groups": {title: group(**rows)},
    }


def test_figures_are_written_between_the_markers_gpus_first(repository, capsys):
    import tables

    folder = repository / "bench/results"
    cpu = result_of("cpu", "linear_dpo_loss", bpo_fast=row(1.0, 10), eager=row(2.0, 40), slow=row(9.0, 1))
    (folder / "kernels-cpu.json").write_text(json.dumps(cpu))
    (folder / "kernels-cpu.partial.json").write_text("{")
    assert tables.main(["--check"], repository) == 1
    assert "README.md: behind bench/results" in capsys.readouterr().out
    assert tables.main([], repository) == 0
    assert tables.main(["--check"], repository) == 0
    readme, document = (repository / "README.md").read_text(), (repository / "docs/benchmarks.md").read_text()
    assert readme.startswith(
        "before <!-- begin figures -->\n\nFigures on a CPU; there are none on a GPU yet. Xeon, 2 threads"
    )
    assert readme.endswith("<!-- end figures --> after\n")
    assert "old" not in readme
    assert "Lower is better" in readme
    assert [cell.strip() for cell in readme.splitlines()[6].split("|")[1:-1]] == [
        "linear_dpo_loss",
        "eager",
        "1 s",
        "2 s",
        "0.5x",
        "10",
        "40",
        "0.25x",
    ]
    assert "A peer is faster" not in readme
    assert "linear_dpo_loss: less memory than bpo_fast is taken by slow (0.1x)." in document
    for name in ("kernels-cpu.png", "overview.png"):
        assert (folder / name).stat().st_size > 1000
    gpu = result_of("NVIDIA X", "linear_dpo_loss", bpo_fast=row(0.2), eager=row(0.1))
    (folder / "kernels-nvidia-x.json").write_text(json.dumps(gpu))
    assert tables.main(["--check"], repository) == 1
    assert tables.main([], repository) == 0
    readme, document = (repository / "README.md").read_text(), (repository / "docs/benchmarks.md").read_text()
    assert readme.index("Figures on NVIDIA X.") < readme.index("Figures on a CPU.")
    assert "A peer is faster than ours in: `op`;" in readme
    assert document.index("## Figures on NVIDIA X") < document.index("## Figures on a CPU")


def test_a_document_without_markers_is_said(repository):
    import tables

    (repository / "README.md").write_text("no markers")
    assert tables.main([], repository).startswith("README.md: found no '<!-- begin figures -->'")


# The sweep of launches.


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


# Whole runs at toy size.


def kept(done, output):
    assert done.returncode == 0, done.stderr
    assert output.with_suffix(".png").exists() == ("tun" not in output.name)
    assert not list(output.parent.glob("*.partial.json"))
    return json.loads(output.read_text())


def test_the_losses_from_end_to_end(tmp_path):
    output = tmp_path / "kernels.json"
    sizes = ("--hidden-size", 16, "--vocab-size", 64, "--logits-shape", 2, 8, 64, "--repeats", 2)
    levels = ("--device", "cpu", "--dtype", "float32", "--levels", "token_logps, 16")
    done = run("kernels.py", *levels, *sizes, "--output", output)
    rows = kept(done, output)["groups"]["token_logps, 16 rows"]["rows"]
    assert {"bpo_fast", "eager", "torch.compile", "F.cross_entropy", "floor"} <= set(rows)
    for name, found in rows.items():
        assert "missing" in found or len(found["seconds"]) == 2
        assert name == "floor" or "missing" in found or found["agrees"]


@pytest.fixture
def kernels():
    """bench/kernels.py by its path: "kernels" is also what the repository's folder of that name answers to."""
    spec = importlib.util.spec_from_file_location("bench_kernels", BENCH / "kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_sweep_over_tokens_and_vocabulary(kernels, tmp_path, monkeypatch):
    output = tmp_path / "sweep.json"
    points = ["--sweep-tokens=16", "--sweep-vocab-size=64", "--sweep-vocabularies=128", "--sweep-fixed-tokens=8"]
    options = ["--device=cpu", "--dtype=float32", "--sweep", *points, "--hidden-size=16", "--repeats=1"]
    monkeypatch.setattr(kernels, "SWEEP", ("bpo_fast", "eager"))
    assert kernels.main([*options, f"--output={output}"]) == 0
    groups = json.loads(output.read_text())["groups"]
    assert {title: found["shape"] for title, found in groups.items()} == {
        "tokens 16": {"sequences": 2, "tokens": 16, "H": 16, "V": 64},
        "vocabulary 128": {"sequences": 2, "tokens": 8, "H": 16, "V": 128},
    }
    # Measured by a fresh process each, with the point's own sizes.
    assert all(row["peak_bytes"] >= 0 for found in groups.values() for row in found["rows"].values())
    assert output.with_suffix(".png").exists()


def test_a_level_that_is_not_there_is_said(kernels):
    said = kernels.main(["--levels", "no_such_level"])
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


def test_both_trainers_train_on_the_same_batches():
    import throughput

    sizes = ["--hidden-size=32", "--intermediate-size=48", "--num-hidden-layers=2", "--num-attention-heads=2"]
    sizes += ["--vocab-size=512", "--image-size=28", "--vision-hidden-size=32", "--vision-layers=2", "--lora-r=2"]
    options, progress = throughput.parse(["--steps=1", "--pairs=1", "--response-tokens=6", *sizes]), Progress()
    found = throughput.measure(True, options, progress)
    assert progress.n == 4
    assert found["shape"] == {"pairs": 1, "image tokens": 4, "LoRA r": 2, "response tokens": 6, "H": 32, "V": 512}
    ours, theirs = found["rows"]["bpo_fast BPOTrainer"], found["rows"]["TRL DPOTrainer"]
    assert len(ours["losses"]) == 2
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-4)
    assert ours["peak_bytes"] > 1 << 20
    assert ours["pairs_per_second"] == pytest.approx(1 / ours["median"])
    assert theirs["time_ratio"] == theirs["peak_ratio"] == 1.0


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
