"""Proves and measures everything on this machine's GPU: `make gpu`, or `python bench/gpu.py`.

Stages of at most 8 minutes, 25 in all, each with a JSON file of its own: what ran, what came of it, what was left out.
A stage that fails does not keep the next from running, and one that ended well for this commit and machine is not run
again unless it is named. `--rehearse` runs all of them on a CPU at toy sizes, in a folder that git ignores.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from threading import Timer

import torch
from results import REPOSITORY, environment, identity, slug, tree_state

from bpo_fast.runs.files import read_json, write_json

MINUTES = 25
PYTEST = ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
REHEARSED = [*PYTEST, "-p", "gpu_rehearsal"]
# Every kernel once, at sizes that a sanitizer and an interpreter get through.
SMALL = ["tests/kernels/test_cuda.py", "tests/ops/noise/test_known_answers.py", "-k"]
FORMS = "test_token_logps and 127 or one_launch or outside_the_vocabulary or known_answers"
SANITIZER = ["compute-sanitizer", "--error-exitcode=1", "--tool"]
EXTENSION = "from bpo_fast.ops.noise.native import extension as e; print('CUDA half:', e().cuda_built);"
CPU = ["--device=cpu", "--dtype=float32", "--repeats=1"]


@dataclass(frozen=True)
class Stage:
    """Commands that run one after the other within `minutes`, `rehearsed` on a CPU; an argument with a - is Python's.

    Without a package of `peers` its part is left out, without the program `tool` all of it. `variables` are added to
    the environment, those of `stand_in` on a CPU.
    """

    what: str
    minutes: float
    commands: list
    rehearsed: list
    peers: tuple = ()
    tool: str | None = None
    variables: dict = field(default_factory=dict)
    stand_in: dict = field(default_factory=dict)


LLAVA_7B = [
    "--hidden-size",
    4096,
    "--intermediate-size",
    11008,
    "--num-hidden-layers",
    32,
    "--num-attention-heads",
    32,
]
INTERPRETED = {"stand_in": {"TRITON_INTERPRET": "1"}}
STAGES = {
    "build": Stage(
        "the extension with its CUDA half, and what this machine has",
        2,
        [
            ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", "."],
            ["-c", f"{EXTENSION} raise SystemExit(not e().cuda_built)"],
            ["-m", "bpo_fast", "doctor"],
        ],
        [["setup.py", "-q", "build_ext", "--build-lib={scratch}", "--build-temp={scratch}"], ["-c", EXTENSION]],
        variables={"BPO_FAST_CUDA": "on"},
        stand_in={"BPO_FAST_CUDA": "off"},
    ),
    "tests": Stage("`pytest -m gpu`", 4, [PYTEST], [REHEARSED], ("trl", "liger_kernel", "flash_attn")),
    "sanitizer": Stage(
        "`compute-sanitizer` over the kernels",
        3,
        [
            [*SANITIZER, tool, sys.executable, *PYTEST, *SMALL, f"{FORMS} or test_linear_token_logps and 127"]
            for tool in ("memcheck", "racecheck")
        ],
        [[*REHEARSED, *SMALL, FORMS]],
        tool="compute-sanitizer",
        variables={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        **INTERPRETED,
    ),
    "noise": Stage(
        "the noise ops beside copies",
        2,
        [["bench/noise.py", "--shape", 256, 576, 4096, "--dtype", dtype] for dtype in ("bfloat16", "float32")],
        [["bench/noise.py", *CPU, "--shape", 4, 2, 8, "--copies=2"]],
    ),
    "kernels": Stage(
        "the losses beside their peers",
        4,
        [["bench/losses.py", "--vocab-size", 131072]],
        [["bench/losses.py", *CPU, "--levels", "dpo", "token_logps, 4", "--logits-shape", 2, 8, 64, "--in-process"]],
        ("trl", "liger_kernel", "cut_cross_entropy"),
    ),
    "tune": Stage(
        "the launches of the Triton kernels beside the rule",
        2,
        [["bench/tune.py", "--dtypes", "bfloat16", "--shapes", "4096x128256", "8192x32064", "16x128256"]],
        [["bench/tune.py", "--device=cpu", "--dtypes", "float32", "--shapes", "2x512"]],
        **INTERPRETED,
    ),
    "throughput": Stage(
        "training steps beside TRL's",
        8,
        [["bench/throughput.py", "--as", "a40", "--steps", 3]],
        [["bench/throughput.py", "--toy", "--rows", "Trainer", "caches", "prefixes", "pairs", "LoRA", "every_2"]],
        ("trl", "liger_kernel", "bitsandbytes", "flash_attn"),
    ),
    "cards": Stage(
        "13B within 24 GB, 7B within 16 GB",
        2,
        [
            ["bench/throughput.py", "--as", "rtx3090", "--steps", 2, "--rows", "checkpointing full"],
            ["bench/throughput.py", "--as", "rtx4080", "--steps", 2, "--rows", "checkpointing full", *LLAVA_7B],
        ],
        [["bench/throughput.py", "--toy", "--as", "rtx4080", "--rows", "checkpointing full"]],
        ("bitsandbytes", "flash_attn"),
    ),
}


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", nargs="+", choices=tuple(STAGES), help="only these, also if they ended well before")
    parser.add_argument("--rehearse", action="store_true", help="at toy sizes on a CPU, into runs/rehearsal")
    return parser.parse_args(arguments)


def run_command(command, seconds, variables):
    """Run and show it: {"command", "seconds", "code", "said"}, the last lines; code None where it was stopped."""
    print(f"$ {' '.join(command)}", flush=True)
    program = [] if shutil.which(command[0]) else [sys.executable]
    said, started, stopped = b"", time.monotonic(), []
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    process = subprocess.Popen([*program, *command], cwd=REPOSITORY, env=os.environ | variables, **streams)
    timer = Timer(seconds, lambda: (stopped.append(True), os.killpg(process.pid, signal.SIGKILL)))
    timer.start()
    while chunk := process.stdout.read1(1 << 16):
        sys.stdout.write(chunk.decode(errors="replace"))
        sys.stdout.flush()
        said = (said + chunk)[-(1 << 14) :]
    code = process.wait()
    timer.cancel()
    lines = [line for line in re.split(r"[\r\n]+", said.decode(errors="replace")) if line.strip()]
    taken = {"command": command, "seconds": time.monotonic() - started, "code": None if stopped else code}
    return taken | {"said": lines[-30:]}


def run_stage(stage, rehearse, seconds, variables):
    """What is kept of a stage: how it ended, its commands, and what was left out."""
    missing = [name for name in stage.peers if find_spec(name) is None]
    commands = stage.rehearsed if rehearse else stage.commands
    if stage.tool and not rehearse and shutil.which(stage.tool) is None:
        missing, commands = [*missing, stage.tool], []
    variables = variables | (stage.stand_in if rehearse else stage.variables)
    deadline, done = time.monotonic() + seconds, []
    with tempfile.TemporaryDirectory() as scratch:
        for command in commands:
            command = [str(part).replace("{scratch}", scratch) for part in command]
            done.append(run_command(command, max(1.0, deadline - time.monotonic()), variables))
    failures = [
        f"{' '.join(step['command'][:4])}: stopped at the stage's limit of {seconds:.0f} s"
        if step["code"] is None
        else f"{' '.join(step['command'][:4])}: exit code {step['code']}"
        for step in done
        if step["code"] != 0
    ]
    return {"ok": not failures, "failures": failures, "left_out": missing, "commands": done}


def main(arguments):
    options = parse(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        return "make gpu: found no NVIDIA GPU, expected one; `make gpu REHEARSE=1` rehearses it on a CPU."
    commit, changed = tree_state(REPOSITORY)
    folder = REPOSITORY / ("runs/rehearsal" if options.rehearse else "bench/results")
    if not options.rehearse and (changed or not commit):
        folder = REPOSITORY / "runs/gpu"
        what = f"uncommitted changes ({changed})" if changed else "no git repository, and no BPO_FAST_COMMIT"
        print(f"bench/results: found {what}, expected a clean tree; all goes to {folder} instead.", flush=True)
    device, started, outcomes = "cpu" if options.rehearse else "cuda", time.monotonic(), {}
    bin_folders = [str(Path(sys.executable).parent), os.environ["PATH"], "/usr/local/cuda/bin"]
    os.environ["PATH"] = os.pathsep.join(bin_folders)
    variables = {"BPO_FAST_RESULTS": str(folder), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    for name in options.stage or STAGES:
        stage = STAGES[name]
        found = environment(device, f"{commit}-dirty" if changed else commit)
        record = {"stage": name, "what": stage.what, "settings": {"rehearsal": options.rehearse}, "environment": found}
        path = folder / "gpu" / f"{name}-{slug(found['device'])}.json"
        earlier = read_json(path) if path.exists() and not (options.stage or options.rehearse or changed) else None
        if earlier and earlier["ok"] and identity(earlier) == identity(record):
            print(f"== {name}: ended well before; --stage {name} runs it again ==", flush=True)
            outcomes[name] = earlier
            continue
        print(f"\n== {name}: {stage.what} ({time.monotonic() - started:.0f} s) ==", flush=True)
        left, before = 60 * MINUTES - (time.monotonic() - started), time.monotonic()
        if left < 30:
            record |= {"ok": False, "failures": [f"not begun: the {MINUTES} minutes are over"], "left_out": []}
        else:
            record |= run_stage(stage, options.rehearse, min(60 * stage.minutes, left), variables)
        outcomes[name] = record | {"seconds": time.monotonic() - before}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, outcomes[name])
    print(f"\n{folder}")
    for name, record in outcomes.items():
        words = "; ".join(record["failures"]) or "ended well"
        missing = f"; left out, as missing: {', '.join(record['left_out'])}" if record["left_out"] else ""
        print(f"{name:<11} {record['seconds']:6.0f} s  {words}{missing}")
    return int(not all(record["ok"] for record in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
