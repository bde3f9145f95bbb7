"""Time and memory of the candidates for an operation (ours, peers, floors), measured side by side."""

import gc
import itertools
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

# How far a candidate's loss (relative, or absolute below 1) and gradient (relative, Euclidean norm) may be from plain
# PyTorch's in float64. A loss compares sums of a thousand log-probs, about -12,000, of which float32 keeps 1e-3. In 16
# bits, logits of about 4 are rounded by 1e-2.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2}
EAGER, COMPILED, FLOOR, IS_FLOOR = "eager", "torch.compile", "floor", {"is_floor": True}


def synchronise():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def flush_buffer(device):
    """Memory of twice the L2 cache of a CUDA device; None elsewhere."""
    if device != "cuda":
        return None
    return torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.int8, device=device)


def elapsed(function, calls, flushed):
    """Seconds of one of `calls` calls of `function`, by CUDA's own events where `flushed` is a CUDA buffer.

    Writing that buffer first empties the L2 cache, and keeps the device busy until the calls are in its queue.
    """
    synchronise()
    if flushed is None:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronise()
        return (time.perf_counter() - start) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flushed.zero_()
    start.record()
    for _ in range(calls):
        function()
    end.record()
    synchronise()
    return start.elapsed_time(end) / 1e3 / calls


def rotating(steps):
    """One step that is another of `steps` each time, so that none finds its tensors in the cache."""
    if len(steps) == 1:
        return steps[0]
    following = itertools.cycle(steps)
    return lambda: next(following)()


def interleaved(functions, warmup, repeats, calls, progress, flushed=None):
    """Time `functions` in turn, `calls` times each a repeat: name -> `repeats` times of one call in seconds.

    A slow minute of the machine is spread over all candidates, and none always runs behind the same neighbour.
    """
    names, samples = list(functions), {name: [] for name in functions}
    for repeat in range(-warmup, repeats):
        shift = repeat % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            gc.collect()
            seconds = elapsed(functions[name], calls, flushed)
            if repeat >= 0:
                samples[name].append(seconds)
            progress.update()
    return samples


def summary(seconds):
    """What a row keeps of its samples."""
    spread = {"quartiles": np.quantile(seconds, [0.25, 0.75]).tolist(), "min": min(seconds), "max": max(seconds)}
    return {"seconds": seconds, "median": statistics.median(seconds)} | spread


def add_ratios(rows, reference, floor=None):
    """Give rows their time and memory over the reference row's, and their time over row["floor"]'s or `floor`'s."""
    for row in rows.values():
        kinds = [("time_ratio", "median", reference), ("peak_ratio", "peak_bytes", reference)]
        for ratio, key, other in [*kinds, ("floor_ratio", "median", row.get("floor", floor))]:
            below = rows.get(other, {}).get(key)
            if below and key in row:
                row[ratio] = row[key] / below


def memory(device, peak=False):
    """Bytes that this process holds now, or at its peak so far: allocated on CUDA, resident (on Linux) on the CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    field = "VmHWM" if peak else "VmRSS"
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def extra_peak(function, device):
    """Peak memory of `function()` above what was held before, in bytes."""
    gc.collect()
    synchronise()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:  # Linux keeps one high-water mark a process, which this resets
        Path("/proc/self/clear_refs").write_text("5")
    before = memory(device)
    function()
    synchronise()
    return memory(device, peak=True) - before


def fresh_peak(*command):
    """What a script prints last, as an int, in a fresh process: freed memory that is kept would hide the next peak."""
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with code {result.returncode}:\n{result.stderr}")
    return int(result.stdout.split()[-1])


@dataclass(frozen=True)
class Candidate:
    """One way to do an operation: `setup(problem)` imports what it needs and returns its step.

    `row` is what its row in the results begins with: "is_floor"; "floor", the name of its own one; "variant", what it
    does besides, as it is compared with candidates of the same variant only.
    """

    setup: object
    row: dict = field(default_factory=dict)
    package: str | None = None
    cuda_only: bool = False
    compiles: bool = False

    def first_step(self, problem, options, expected):
        """The row that its first step begins, and its step; None for the step if it cannot run here."""
        if self.package and find_spec(self.package) is None:
            return self.row | {"missing": f"{self.package} is not installed"}, None
        if self.cuda_only and options.device != "cuda":
            return self.row | {"missing": "CUDA only"}, None
        try:
            step = self.setup(problem)
            result = step()
        except Exception as error:  # out of memory, or a peer that does not support the shape: said in the table
            first_line = f"failed: {type(error).__name__}: {error}".splitlines()[0]
            return self.row | {"missing": first_line[:200]}, None
        compared = expected is not None and "is_floor" not in self.row
        return self.row | (errors(result, expected, TOLERANCE[options.dtype]) if compared else {}), step


def errors(result, expected, tolerance):
    """Errors of (loss, gradient or None), as TOLERANCE says; and whether they are tolerable."""
    (loss, gradient), (expected_loss, expected_gradient) = result, expected
    loss_error = (loss.double() - expected_loss.double()).abs().item() / max(1.0, abs(expected_loss.item()))
    gradient_error = None
    if expected_gradient is not None:
        distance = torch.linalg.vector_norm(gradient.double().sub_(expected_gradient))
        gradient_error = (distance / torch.linalg.vector_norm(expected_gradient)).item()
    agrees = max(loss_error, gradient_error or 0.0) <= tolerance
    return {"loss": loss.item(), "loss_error": loss_error, "gradient_error": gradient_error, "agrees": agrees}


@dataclass(frozen=True)
class Operation:
    """What one group measures: `shape(options)` its sizes, `problem(options, shape)` its tensors, name -> candidate.

    `calls` make a timed step. With `with_peak` memory is measured. If `compared`, steps return (loss, gradient or
    None), which are compared with those of EAGER on `problem.in_float64()`. Calls rotate among problems of
    `options.copies` sets of tensors where the options have it.
    """

    name: str
    what: str
    shape: object
    problem: object
    candidates: dict
    calls: int = 1
    with_peak: bool = True
    compared: bool = True

    def job(self, options, names=None, peak_command=()):
        """As `Results.run` takes it; to `peak_command` is added `--peak OPERATION CANDIDATE` for a fresh process."""
        names = names or self.candidates
        steps = len(names) * (1 + options.warmup + options.repeats + self.with_peak)
        return steps, lambda progress: self.measure(options, names, peak_command, progress)

    def measure(self, options, names, peak_command, progress):
        shape, rows, steps = self.shape(options), {}, {}
        problem, *others = (self.problem(options, shape) for _ in range(getattr(options, "copies", 1)))
        what, expected = self.what, None
        try:
            expected = self.candidates[EAGER].setup(problem.in_float64())() if self.compared else None
        except torch.OutOfMemoryError:
            what += " (not compared with float64, which needs more memory)"
        for name in names:
            rows[name], step = self.candidates[name].first_step(problem, options, expected)
            if step:
                more = [self.candidates[name].setup(other) for other in others]
                for first in more:
                    first()
                steps[name] = rotating([step, *more])
            progress.update()
        del expected
        timing = options.warmup, options.repeats, self.calls, progress, flush_buffer(options.device)
        for name, seconds in interleaved(steps, *timing).items():
            rows[name] |= summary(seconds)
        peaked = [name for name in steps if self.with_peak and "is_floor" not in rows[name]]
        for name in () if peak_command else peaked:
            rows[name]["peak_bytes"] = extra_peak(steps[name], options.device)
            progress.update()
        del steps, step, problem, others
        if options.device == "cuda":
            torch.cuda.empty_cache()
        for name in peaked if peak_command else ():
            rows[name]["peak_bytes"] = fresh_peak(*peak_command, "--peak", self.name, name)
            progress.update()
        add_ratios(rows, EAGER, FLOOR)
        return {"what": what, "shape": shape, "reference": EAGER, "rows": rows}
