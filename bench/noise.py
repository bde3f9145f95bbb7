"""The noise ops beside plain PyTorch, torch.compile and bare copies: `python bench/noise.py`.

Like is compared with like: writing to memory that is there has copy_ for its floor, making a tensor clone. On CUDA
calls rotate among as many sets of tensors as make each larger than the L2 cache, and events time them.
"""

import argparse
import math
import sys
from functools import partial
from pathlib import Path

import torch
from measure import COMPILED, EAGER, FLOOR, IS_FLOOR, Candidate, Operation
from results import Results

from bpo_fast import NoiseSchedule, add_noise, add_noise_ladder, add_noise_rows

STEP, SCHEDULE, NEW = 900, NoiseSchedule.sigmoid(), {"floor": "clone"}
OTHER_DTYPE = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32, torch.float16: torch.float32}


class Problem:
    """Image features x [N, M, H]; `same` and `levels` to write to; a packed sequence `out`, one half of it text.

    Every second image (`source`) goes to `rows` of the packed sequence, and every second of these stays clean.
    """

    def __init__(self, options, shape):
        self.x = torch.randn(options.shape, device=options.device).to(getattr(torch, options.dtype))
        last, (_, tokens, width) = max(options.levels - 1, 1), options.shape
        self.steps = [round(k * (SCHEDULE.num_steps - 1) / last) for k in range(options.levels)]
        self.same, self.levels = self.x.clone(), self.x.new_empty((options.levels, *options.shape))
        self.ladder = list(zip(self.steps, self.levels, strict=True))
        self.source = torch.arange(0, len(self.x), 2)
        self.rows = torch.arange(len(self.source))[:, None] * 2 * tokens + torch.arange(tokens)
        self.row_steps = torch.where(torch.arange(len(self.source)) % 2 == 0, STEP, -1)
        self.out = self.x.new_zeros(2 * self.rows.numel(), width, dtype=OTHER_DTYPE[self.x.dtype])


def plain(x, a, b):
    return a * x + b * torch.randn_like(x)


def ours(function, *arguments, **options):
    return partial(function, *arguments, schedule=SCHEDULE, seed=0, **options)


def ours_call_by_call(p):
    calls = [ours(add_noise, p.x, step, out=level) for step, level in p.ladder]
    return lambda: [call() for call in calls]


def eager_rows(p):
    scales = [SCHEDULE.scales(STEP) if step >= 0 else (1.0, 0.0) for step in p.row_steps.tolist()]
    a, b = torch.tensor(scales, device=p.x.device)[:, :, None, None].unbind(1)
    flat, index = p.rows.flatten().to(p.x.device), p.source.to(p.x.device)

    def step():
        noised = plain(p.x.index_select(0, index).float(), a, b)
        p.out.index_copy_(0, flat, noised.to(p.out.dtype).flatten(0, 1))

    return step


LEVEL = {
    "bpo_fast.add_noise": Candidate(lambda p: ours(add_noise, p.x, STEP), NEW),
    "bpo_fast.add_noise(out=out)": Candidate(lambda p: ours(add_noise, p.x, STEP, out=p.same)),
    "bpo_fast.add_noise(out=x)": Candidate(lambda p: ours(add_noise, p.same, STEP, out=p.same)),
    EAGER: Candidate(lambda p: partial(plain, p.x, *SCHEDULE.scales(STEP)), NEW),
    COMPILED: Candidate(lambda p: partial(torch.compile(plain), p.x, *SCHEDULE.scales(STEP)), NEW),
    FLOOR: Candidate(lambda p: partial(p.same.copy_, p.x), IS_FLOOR),
    "clone": Candidate(lambda p: p.x.clone, IS_FLOOR | NEW),
}
LADDER = {
    "bpo_fast.add_noise_ladder": Candidate(lambda p: ours(add_noise_ladder, p.x, p.steps, out=p.levels)),
    "bpo_fast.add_noise, call by call": Candidate(ours_call_by_call),
    EAGER: Candidate(lambda p: lambda: [out.copy_(plain(p.x, *SCHEDULE.scales(step))) for step, out in p.ladder]),
    FLOOR: Candidate(lambda p: partial(p.levels.copy_, p.x.expand_as(p.levels)), IS_FLOOR),
}
ROWS = {
    "bpo_fast.add_noise_rows": Candidate(
        lambda p: ours(add_noise_rows, p.x, p.row_steps, out=p.out, rows=p.rows, source=p.source)
    ),
    EAGER: Candidate(eager_rows),
    FLOOR: Candidate(lambda p: partial(p.out[: p.rows.numel()].copy_, p.x[::2].flatten(0, 1)), IS_FLOOR),
}
GROUPS = (
    ("one level", "`add_noise` of one step: a new tensor, an existing one, in place", LEVEL),
    ("ladder", "`add_noise_ladder`: several steps of the same samples, into one tensor", LADDER),
    ("rows", "`add_noise_rows`: every second image cast into a packed sequence, half of them clean", ROWS),
)


def copies_past_the_cache(options):
    """How many tensors of the shape are twice a CUDA device's L2 cache; 1 on the CPU."""
    if options.device != "cuda":
        return 1
    size = math.prod(options.shape) * getattr(torch, options.dtype).itemsize
    return max(1, math.ceil(2 * torch.cuda.get_device_properties(0).L2_cache_size / size))


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3, default=[32, 576, 1024], metavar=("N", "M", "H"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--levels", type=int, default=4, help="steps of the ladder")
    parser.add_argument("--copies", type=int, help="sets of tensors that calls rotate among (default: see above)")
    parser.add_argument("--output", type=Path, help="JSON path, the chart beside it (default: below bench/results)")
    options = parser.parse_args(arguments)
    options.copies = options.copies or copies_past_the_cache(options)
    kind = {"shape": lambda o: dict(zip("NMH", o.shape, strict=True)), "problem": Problem, "with_peak": False}
    groups = [Operation(*texts, candidates=found, compared=False, **kind) for *texts, found in GROUPS]
    jobs = {group.name: group.job(options) for group in groups}
    Results("noise", vars(options), options.output, f"-{options.dtype}").run(jobs)


if __name__ == "__main__":
    main(sys.argv[1:])
