"""`make gpu`: stages that fail, that are stopped, that are not run again, and what is kept of each."""

import json
import sys

import pytest
import torch

ENVIRONMENT = {"cpu": "Xeon", "threads": 2, "versions": {}, "time": "2026-11-21T"}


def stage(*commands, minutes=1, **more):
    import gpu

    return gpu.Stage("a stage", minutes, [list(c) for c in commands], [list(c) for c in commands], **more)


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """The stages that are run, none at first, in a folder that stands for the repository; a GPU is taken for there."""
    import gpu

    found = {}
    monkeypatch.setattr(gpu, "STAGES", found)
    monkeypatch.setattr(gpu, "REPOSITORY", tmp_path)
    monkeypatch.setattr(gpu, "tree_state", lambda repository: ("abc", None))
    monkeypatch.setattr(gpu, "environment", lambda device, commit: ENVIRONMENT | {"device": device, "commit": commit})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return found


def kept(tmp_path, name, folder="bench/results"):
    return json.loads((tmp_path / folder / "gpu" / f"{name}.json").read_text())


def test_a_stage_that_fails_keeps_no_other_from_running(stages, tmp_path, capsys):
    import gpu

    stages["bad"] = stage(["-c", "print('one line'); raise SystemExit(3)"], ["-c", "print('still run')"])
    stages["good"] = stage(["-c", "print(6 * 7)"], peers=("torch", "no_such_peer"))
    stages["tool"] = stage(["no-such-tool", "x"], tool="no-such-tool")
    assert gpu.main([]) == 1
    bad, good, tool = (kept(tmp_path, f"{name}-cuda") for name in stages)
    assert bad["failures"] == ["-c print('one line'); raise SystemExit(3): exit code 3"]
    assert [step["said"] for step in bad["commands"]] == [["one line"], ["still run"]]
    assert (good["ok"], good["left_out"], good["commands"][0]["said"]) == (True, ["no_such_peer"], ["42"])
    assert (tool["ok"], tool["left_out"], tool["commands"]) == (True, ["no-such-tool"], [])
    assert "left out, as missing: no_such_peer" in capsys.readouterr().out


def test_a_stage_is_stopped_with_its_children_at_its_limit(stages, tmp_path):
    import gpu

    forking = "import subprocess, sys; print('begun', flush=True); "
    forking += "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    stages["slow"] = stage(["-c", forking], minutes=3 / 60)
    assert gpu.main([]) == 1
    found = kept(tmp_path, "slow-cuda")
    assert found["commands"][0]["code"] is None
    assert found["commands"][0]["said"] == ["begun"]
    assert found["failures"][0].endswith("stopped at the stage's limit of 3 s")
    assert found["seconds"] < 30


def test_what_ended_well_for_this_commit_is_not_run_again_unless_named(stages, tmp_path, monkeypatch):
    import gpu

    stages["counted"] = stage(["-c", "open('runs.txt', 'a').write('x')"])

    def run(*arguments):
        assert gpu.main(arguments) == 0
        return (tmp_path / "runs.txt").read_text()

    assert [run(), run(), run("--stage", "counted")] == ["x", "x", "xx"]
    monkeypatch.setattr(gpu, "tree_state", lambda repository: ("other", None))
    assert run() == "xxx"


def test_a_rehearsal_and_a_changed_tree_do_not_reach_the_results(stages, tmp_path, monkeypatch, capsys):
    import gpu

    stages["say"] = stage(["-c", "import os; print(os.environ['BPO_FAST_RESULTS'])"])
    assert gpu.main(["--rehearse"]) == 0
    found = kept(tmp_path, "say-cpu", "runs/rehearsal")
    assert found["settings"] == {"rehearsal": True}
    assert found["commands"][0]["said"] == [str(tmp_path / "runs/rehearsal")]
    monkeypatch.setattr(gpu, "tree_state", lambda repository: ("abc", "code.py"))
    assert gpu.main([]) == 0
    assert kept(tmp_path, "say-cuda", "runs/gpu")["environment"]["commit"] == "abc-dirty"
    assert "found uncommitted changes (code.py)" in capsys.readouterr().out
    assert not (tmp_path / "bench").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said where there is no GPU")
def test_without_a_gpu_it_says_so():
    import gpu

    assert gpu.main([]).startswith("make gpu: found no NVIDIA GPU, expected one;")


def test_stages_fit_their_limits_and_name_files_that_are_there():
    import gpu

    for name, found in gpu.STAGES.items():
        assert found.minutes <= 8
        for part in (str(part) for command in found.commands + found.rehearsed for part in command):
            assert not part.endswith(".py") or (gpu.REPOSITORY / part).is_file(), (name, part)
    # The limits, most of which are not reached: all of it has its own.
    assert gpu.MINUTES <= sum(found.minutes for found in gpu.STAGES.values()) <= gpu.MINUTES + 5
    assert sys.executable in gpu.STAGES["sanitizer"].commands[0]


def test_how_the_stages_ended_stands_in_the_document(tmp_path):
    import tables

    (tmp_path / "gpu").mkdir()
    step = {"said": ["x", "12 passed"], "code": 0}
    record = {"stage": "tests", "seconds": 61.2, "failures": [], "left_out": ["trl"], "commands": [step]}
    failed = record | {"stage": "noise", "failures": ["bench/noise.py: exit code 1"], "left_out": []}
    for number, found in enumerate((record, failed)):
        found["environment"] = ENVIRONMENT | {"device": "NVIDIA X", "time": str(number)}
        (tmp_path / f"gpu/{found['stage']}.json").write_text(json.dumps(found))
    title, table = tables.stages(tmp_path)
    assert title == "## `make gpu` on NVIDIA X"
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert cells[2] == ["tests", "61 s", "12 passed", "trl"]
    assert cells[3] == ["noise", "61 s", "bench/noise.py: exit code 1", ""]
