"""The forecast of a training that is about to start, made by `bpo-fast plan` in a process of its own.

A process that trains on a GPU has set its devices up, and the plan's fake tensors say that they are on a CPU.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence

from bpo_fast.plan.cards import GIB, Card

# What launchers of several processes set: the plan's is none of them, and would wait for the others.
_LAUNCHED = re.compile("(RANK|WORLD_SIZE|LOCAL_|GROUP_|ROLE_|MASTER_|TORCHELASTIC_|ACCELERATE_|OMPI_|PMI_|MV2_).*")
_SECONDS = 180


def forecast_of(argv: Sequence[str], lengths: Sequence[tuple[int, int, int]], card: Card) -> str:
    """A sentence on what a training will hold, or why that is not known.

    Args:
        argv: options of the training, as `bpo-fast train` was given them.
        lengths: tokens of prefix (with its image), chosen and rejected of its first batch.
        card: that it runs on.

    Raises:
        ValueError: its tensors alone are more than the card has; the sentence says what would fit.
    """
    command = ["plan", *argv, "--gpu", f"{card.name}:{card.memory_bytes / GIB:.3f}", "--json", "true"]
    command += ["--batch_lengths", *(",".join(map(str, each)) for each in lengths)]
    found = _run(command)
    if isinstance(found, str):
        return f"Forecast: none ({found})"
    peak, tensors = found["peak_gib"], found["tensors_gib"]
    where = f"of {card.memory_gib:.1f} GiB on {card.name}"
    if tensors > card.memory_gib:
        raise ValueError(
            f"model_name_or_path: found a step of {tensors:.1f} GiB of tensors {where}, expected less; "
            f"{_what_fits(_run([*command, '--fit', 'true']))}"
        )
    seconds = found["seconds_per_pair"]
    time = "" if seconds is None else f", {seconds:.2f} s a pair (assumed rates)"
    work = f"{found['flops_per_pair'] / 1e12:.3g} TFLOP a pair{time}"
    return f"Forecast: {peak:.1f} {where} with the lengths of the first batch; {work}."


def _run(command):
    """The plan as JSON values, or the sentence of its error."""
    environment = {name: value for name, value in os.environ.items() if not _LAUNCHED.fullmatch(name)}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    argv = [sys.executable, "-m", "bpo_fast", *command]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return f"it took more than {_SECONDS} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["it ended without a word"])[-1].removeprefix("bpo-fast: error: ")
    return json.loads(done.stdout)


def _what_fits(found):
    if isinstance(found, str):
        return found
    chosen = {name: found["settings"][name] for name in ("checkpointing", "optim", "token_budget")}
    options = [f"--{name} {value}" for name, value in chosen.items() if value is not None]
    caches = [f"--{name} true" for name, value in found["settings"].items() if value is True]
    return f"{' '.join([*options, *caches])} would take {found['peak_gib']:.1f} GiB."
