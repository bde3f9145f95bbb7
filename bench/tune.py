"""Every launch of the kernels over rows of logits, timed on this GPU beside the stated rule: `python bench/tune.py`.

For each kernel, shape and dtype all tiles, unrollings, warps and splits of a row are tried in place of what
`bpo_fast.kernels.heuristics.row_launch` says, and the rule is put beside the best of them. JSON per GPU in
bench/results/tuning-<gpu>.json, written as it comes: a run that is given again after being killed goes on behind its
last whole shape. Without a GPU it runs at toy size under TRITON_INTERPRET=1 with --device cpu, which checks the sweep
itself; such times mean nothing.
"""

import argparse
import itertools
import re
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import triton
from measure import RESULTS, environment, write_json
from partial import Partial
from tqdm import tqdm

from bpo_fast.kernels import heuristics, sequence_logps, sequence_logps_backward, unit_gradient

COLUMNS = tuple(2**power for power in range(9, 15))
UNROLLS = (1, 2, 4)
WARPS = (1, 2, 4, 8, 16)
SPLITS = (1, 2, 4, 8, 16, 32, 64)
# Bytes that one thread reads at once: below, accesses are narrower than 16 bytes; above, registers spill.
BYTES_PER_THREAD = (16, 128)
CHOICES = ("columns", "unroll", "num_warps", "splits")
# (rows, vocabulary): training, and few rows as in decoding.
SHAPES = ((8192, 32064), (4096, 128256), (2048, 152064), (64, 128256), (16, 128256), (4, 128256), (1, 128256))


def launches(vocab_size, element_size, splittable):
    """(columns, unroll, num_warps, splits) worth timing, in a fixed order."""
    for columns, unroll, num_warps, splits in itertools.product(
        COLUMNS, UNROLLS, WARPS, SPLITS if splittable else (1,)
    ):
        bytes_per_thread = columns * element_size / (32 * num_warps)
        fits = BYTES_PER_THREAD[0] <= bytes_per_thread and bytes_per_thread * unroll <= BYTES_PER_THREAD[1]
        tiles = -(-vocab_size // columns)
        if fits and (splits == 1 or 2 * splits <= tiles):
            yield columns, unroll, num_warps, splits


@contextmanager
def launched_as(**choice):
    """Within, the kernels are launched like this, whatever the shape; the rest is the rule's."""
    rule = heuristics.row_launch

    def fixed(*arguments, **options):
        return rule(*arguments, **options)._replace(**choice)

    heuristics.row_launch = fixed
    try:
        yield
    finally:
        heuristics.row_launch = rule


@contextmanager
def noted_rule(found):
    """Within, what the rule answers is appended to the list `found`."""
    rule = heuristics.row_launch

    def noting(*arguments, **options):
        found.append(rule(*arguments, **options))
        return found[-1]

    heuristics.row_launch = noting
    try:
        yield
    finally:
        heuristics.row_launch = rule


def forward(num_rows, vocab_size, dtype, device, num_processors):
    """The forward launch over policy and reference, with sums, as `dpo_loss` asks for it."""
    policy, reference = (torch.randn(1, num_rows, vocab_size, device=device).to(dtype) for _ in range(2))
    targets = torch.randint(0, vocab_size, (1, num_rows), device=device)
    token_logps = torch.empty(2, 1, num_rows, device=device)
    policy_sums, reference_sums = torch.empty(2, 1, device=device)
    outputs = {
        "token_logps": token_logps,
        "row_numbers": torch.empty(2, 1, num_rows, device=device),
        "policy_sums": policy_sums,
        "reference_sums": reference_sums,
        "num_targets": torch.empty(1, dtype=torch.int64, device=device),
    }
    options = {"statistics": None, "softcap": None, "temperature": 1.0, "num_processors": num_processors}
    return lambda: sequence_logps.launch_sequence_logps(policy, reference, targets, **outputs, **options)


def backward(num_rows, vocab_size, dtype, device, num_processors):
    """The backward launch, from the gradient of the sequence's sum to that of the logits."""
    logits = torch.randn(1, num_rows, vocab_size, device=device).to(dtype)
    targets = torch.randint(0, vocab_size, (1, num_rows), device=device)
    row_numbers = torch.stack([logits.float().amax(-1), torch.ones(1, num_rows, device=device)])
    tensors = (logits, targets, row_numbers, torch.empty_like(logits))
    options = {
        "grad_token_logps": None,
        "grad_sums": torch.ones(1, device=device),
        "softcap": None,
        "temperature": 1.0,
    }
    return lambda: sequence_logps_backward.launch_sequence_logps_backward(*tensors, **options)


def unit_rows(num_rows, vocab_size, dtype, device, num_processors):
    """The transform of a chunk of float32 logits into unit gradients of `dtype`, in the chunk's memory.

    A second call finds gradients where the logits were; how long it takes does not depend on what they are.
    """
    logits = torch.randn(num_rows, vocab_size, device=device)
    gradient = logits.view(dtype)[:, :vocab_size]
    targets = torch.randint(0, vocab_size, (num_rows,), device=device)
    logps = torch.empty(num_rows, device=device)
    return lambda: unit_gradient.launch_unit_gradient(logits, gradient, targets, None, None, logps, None, None, 1.0)


# name -> (what makes the launch, whether a row can be split over programs)
JOBS = {"forward": (forward, True), "backward": (backward, False), "unit_gradient": (unit_rows, False)}


def seconds(function, device):
    """Median time of a call, on a GPU with a cold L2 cache."""
    if device == "cuda":
        return triton.testing.do_bench(function, warmup=10, rep=40, return_mode="median") / 1e3
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(timed, rule):
    """The rule's launch, the best of `timed` [{**launch, seconds}], and the ratio of their times."""
    measured = [entry for entry in timed if "seconds" in entry]
    best = min(measured, key=lambda entry: entry["seconds"])
    chosen = next(entry for entry in timed if tuple(entry[name] for name in CHOICES) == rule)
    ratio = chosen["seconds"] / best["seconds"] if "seconds" in chosen else None
    return {"rule": chosen, "best": best, "over_best": ratio, "timed": timed}


def tune(job, num_rows, vocab_size, dtype, device, num_processors, progress):
    """Time every launch of one job at one shape."""
    make, splittable = JOBS[job]
    launch = make(num_rows, vocab_size, getattr(torch, dtype), device, num_processors)
    noted = []
    with noted_rule(noted):
        launch()
    rule = tuple(getattr(noted[0]._replace(**({} if splittable else {"splits": 1})), name) for name in CHOICES)
    # The transform works on float32 whatever it writes.
    element_size = 4 if job == "unit_gradient" else getattr(torch, dtype).itemsize
    timed = []
    for choice in dict.fromkeys([rule, *launches(vocab_size, element_size, splittable)]):
        entry = dict(zip(CHOICES, choice, strict=True))
        with launched_as(**entry):
            try:
                launch()
                entry["seconds"] = seconds(launch, device)
            except Exception as error:  # too many registers or too much shared memory: said in the JSON
                entry["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
        timed.append(entry)
        progress.update()
    return compare(timed, rule)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--jobs", nargs="+", choices=tuple(JOBS), default=tuple(JOBS))
    parser.add_argument(
        "--shapes", nargs="+", default=[f"{rows}x{size}" for rows, size in SHAPES], metavar="ROWSxV", help="shapes"
    )
    parser.add_argument("--output", type=Path, help="JSON path (default: bench/results/tuning-<gpu>.json)")
    options = parser.parse_args(arguments)
    for shape in options.shapes:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape):
            parser.error(f"--shapes takes rows and vocabulary such as 16x128256, got {shape!r}.")
    return options


def main(arguments=None):
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench/tune.py needs an NVIDIA GPU, and PyTorch sees none; nothing was measured.", file=sys.stderr)
        return 2
    if options.device == "cpu" and not triton.knobs.runtime.interpret:
        print("--device cpu runs under Triton's interpreter only; set TRITON_INTERPRET=1.", file=sys.stderr)
        return 2
    found = environment()
    num_processors = 4
    if options.device == "cuda":
        num_processors = torch.cuda.get_device_properties(0).multi_processor_count
    gpu = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")
    output = options.output or RESULTS / f"tuning-{gpu}.json"
    settings = {"device": options.device, "num_processors": num_processors}
    partial = Partial(output, settings, found)
    done = partial.load()
    todo = list(itertools.product(options.jobs, options.dtypes, options.shapes))
    with tqdm(unit="launch", mininterval=1) as progress:
        for index, (job, dtype, shape) in enumerate(todo):
            key = f"{job} {dtype} {shape}"
            progress.set_description(f"{key} ({index + 1} of {len(todo)})")
            if key not in done:
                sizes = map(int, shape.split("x"))
                done[key] = tune(job, *sizes, dtype, options.device, num_processors, progress)
                partial.save(done)
    results = {" ".join(names): done[" ".join(names)] for names in todo}
    write_json(output, {"environment": found, "settings": settings, "shapes": results})
    partial.remove()
    print(f"{'':<34}{'rule':>24}{'best':>24}{'rule / best':>13}")
    for key, result in results.items():
        words = ["{columns}*{unroll} x{num_warps} /{splits}".format(**result[which]) for which in ("rule", "best")]
        ratio = "failed" if result["over_best"] is None else f"{result['over_best']:.3f}"
        print(f"{key:<34}{words[0]:>24}{words[1]:>24}{ratio:>13}")
    print(f"columns * unrolled x warps / splits; written: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
