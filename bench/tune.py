"""Every launch of the kernels over rows of logits, timed on this GPU beside the stated rule: `python bench/tune.py`.

The rule is `bpo_fast.kernels.heuristics.row_launch`. Without a GPU it runs at toy size under TRITON_INTERPRET=1 with
--device cpu, which checks the sweep itself; such times mean nothing.
"""

import argparse
import itertools
import re
import sys
from functools import partial
from pathlib import Path
from timeit import timeit

import torch
import triton
from measure import add_ratios
from results import Results

from bpo_fast.kernels.sequence_logps import launch_sequence_logps
from bpo_fast.kernels.sequence_logps_backward import launch_sequence_logps_backward
from bpo_fast.kernels.unit_gradient import launch_unit_gradient

COLUMNS, UNROLLS, WARPS, SPLITS = [2**k for k in range(9, 15)], (1, 2, 4), (1, 2, 4, 8, 16), [2**k for k in range(7)]
# Bytes that one thread reads at once: below, accesses are narrower than 16 bytes; above, registers spill.
BYTES_PER_THREAD = (16, 128)
# Rows x vocabulary: training, and few rows as in decoding.
SHAPES = ("8192x32064", "4096x128256", "2048x152064", "64x128256", "16x128256", "4x128256", "1x128256")


def choices(vocab_size, element_size, splittable):
    """What of a launch is worth timing, in a fixed order."""
    for columns, unroll, num_warps, splits in itertools.product(COLUMNS, UNROLLS, WARPS, SPLITS):
        bytes_per_thread = columns * element_size / (32 * num_warps)
        fits = BYTES_PER_THREAD[0] <= bytes_per_thread and bytes_per_thread * unroll <= BYTES_PER_THREAD[1]
        if fits and (splits == 1 or (splittable and 2 * splits <= -(-vocab_size // columns))):
            yield {"columns": columns, "unroll": unroll, "num_warps": num_warps, "splits": splits}


def forward(logits, targets, num_processors):
    """Over policy and reference, with sums, as `dpo_loss` asks for it."""
    token_logps, row_numbers = torch.empty(2, 2, *targets.shape, device=logits.device)
    sums = dict(zip(("policy_sums", "reference_sums"), torch.empty(2, 1, device=logits.device), strict=True))
    results = sums | {"token_logps": token_logps, "row_numbers": row_numbers, "num_targets": targets.new_empty(1)}
    options = {"statistics": None, "softcap": None, "temperature": 1.0, "num_processors": num_processors}
    return partial(launch_sequence_logps, logits, torch.randn_like(logits), targets, **results, **options)


def backward(logits, targets, num_processors):
    """From the gradient of the sequence's sum to that of the logits."""
    row_numbers = torch.stack([logits.float().amax(-1), torch.ones(targets.shape, device=logits.device)])
    options = {"grad_token_logps": None, "grad_sums": row_numbers[1, :, 0], "softcap": None, "temperature": 1.0}
    return partial(launch_sequence_logps_backward, logits, targets, row_numbers, torch.empty_like(logits), **options)


def unit_gradient(logits, targets, num_processors):
    """A chunk of float32 logits into unit gradients of the dtype, in its memory, which a second call finds instead."""
    chunk, logps = logits[0].float(), torch.empty(targets.shape[1], device=logits.device)
    gradient = chunk.view(logits.dtype)[:, : chunk.shape[1]]
    return partial(launch_unit_gradient, chunk, gradient, targets[0], None, None, logps, None, None, 1.0)


JOBS = {make.__name__: make for make in (forward, backward, unit_gradient)}


def entry(launch, choice, device):
    """A launch in words and its median time, on a GPU with a cold L2 cache, or why it fails."""
    words = f"{choice.columns}*{choice.unroll} x{choice.num_warps} /{choice.splits}"
    chosen = partial(launch, launch=choice)
    try:
        chosen()
        if device == "cpu":
            return {"launch": words, "median": timeit(chosen, number=1)}
        milliseconds = triton.testing.do_bench(chosen, warmup=10, rep=40, return_mode="median")
        return {"launch": words, "median": milliseconds / 1e3}
    except Exception as error:  # too many registers or too much shared memory: said in the table
        return {"launch": words, "missing": f"failed: {type(error).__name__}: {error}".splitlines()[0]}


def compare(entries):
    """The rows of rule and best, and all that was timed; the rule's is the first of `entries`."""
    best = min((entry for entry in entries if "median" in entry), key=lambda entry: entry["median"])
    rows = {"rule": dict(entries[0]), "best": dict(best)}
    add_ratios(rows, "best")
    return {"reference": "best", "rows": rows, "timed": entries}


def tune(name, dtype, shape, options, progress):
    """The group of one kernel at one shape."""
    num_rows, vocab_size = map(int, shape.split("x"))
    logits = torch.randn(1, num_rows, vocab_size, device=options.device).to(getattr(torch, dtype))
    targets = torch.randint(0, vocab_size, (1, num_rows), device=options.device)
    launch = JOBS[name](logits, targets, options.num_processors)
    rule = launch()
    # Unit gradients are made of float32 logits whatever they are; only the forward pass splits rows over programs.
    element_size = 4 if name == "unit_gradient" else logits.element_size()
    worth = choices(vocab_size, element_size, splittable=name == "forward")
    tried = dict.fromkeys([rule, *(rule._replace(**choice) for choice in worth)])
    entries = []
    for choice in tried:
        entries.append(entry(launch, choice, options.device))
        progress.update(1 / len(tried))
    shape = {"rows": num_rows, "V": vocab_size}
    return {"what": f"The kernel `{name}`, {dtype}", "shape": shape} | compare(entries)


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--jobs", nargs="+", choices=tuple(JOBS), default=tuple(JOBS))
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="ROWSxV")
    parser.add_argument("--output", type=Path, help="JSON path (default: below bench/results)")
    options = parser.parse_args(arguments)
    if wrong := [shape for shape in options.shapes if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape)]:
        parser.error(f"--shapes: found {wrong[0]}, expected rows and vocabulary such as 16x128256.")
    if options.device == "cuda" and not torch.cuda.is_available():
        return "--device: found no NVIDIA GPU, expected one, so nothing was measured."
    if options.device == "cpu" and not triton.knobs.runtime.interpret:
        return "--device: found cpu without TRITON_INTERPRET=1, expected an NVIDIA GPU or Triton's interpreter."
    cuda = options.device == "cuda"
    options.num_processors = torch.cuda.get_device_properties(0).multi_processor_count if cuda else 4
    keys = itertools.product(options.jobs, options.dtypes, options.shapes)
    jobs = {" ".join(key): (1, partial(tune, *key, options)) for key in keys}
    Results("tuning", vars(options), options.output).run(jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
