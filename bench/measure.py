"""Timing, memory and environment for every benchmark in this folder.

Benchmarks are scripts run from the repository root (`python bench/kernels.py`), so they import this file as
`from measure import interleaved, environment, write_json, summary, peak_memory`.
"""

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"
_PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "liger-kernel", "numpy")


def _synchronise():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(functions, warmup=2, repeats=10):
    """Time `functions` (name -> callable without arguments) in turn: every repeat runs each of them once.

    Interleaving spreads a slow minute of the machine over all candidates instead of over one. The order is rotated
    from repeat to repeat, so that nobody always runs behind the same neighbour. CUDA is synchronised around each call.
    Returns name -> list of `repeats` wall times in seconds.
    """
    names = list(functions)
    for _ in range(warmup):
        for name in names:
            functions[name]()
    samples = {name: [] for name in names}
    for repeat in range(repeats):
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            _synchronise()
            start = time.perf_counter()
            functions[name]()
            _synchronise()
            samples[name].append(time.perf_counter() - start)
    return samples


def summary(samples):
    """Median, minimum and maximum of one list of samples, in the samples' unit."""
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}


def _cpu_model():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _package_version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit():
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment():
    """What a figure depends on: device, processor, threads, load, package versions and commit (None if unknown)."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {name: _package_version(name) for name in _PACKAGES},
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write_json(path, payload):
    """Write `payload` as JSON to `path`: under a temporary name first, so that no half-written file is ever left."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(payload, indent=2) + "\n")
    os.replace(temporary, path)


def _status_bytes(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no field {field}; peak memory is measured on Linux only")


def process_peak():
    """Peak resident memory of this process so far, in bytes (Linux)."""
    return _status_bytes("VmHWM")


def extra_peak(function, device="cpu"):
    """Peak memory of `function()` above what was held before, in bytes: allocated on CUDA, resident on the CPU.

    On the CPU (Linux) the kernel keeps one high-water mark a process; it is reset through /proc/self/clear_refs first.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    function()
    return process_peak() - before


def peak_memory(script, *arguments):
    """Run `script` with `arguments` in a fresh Python process and return the last line it prints, as an int.

    The script makes its inputs, then prints `extra_peak(step)`: a fresh process a candidate, because freed memory that
    an allocator keeps would hide the next candidate's peak.
    """
    command = [sys.executable, str(script), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with code {result.returncode}:\n{result.stderr}")
    return int(result.stdout.strip().splitlines()[-1])
