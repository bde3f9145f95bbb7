"""Time and memory of the losses beside their peers: `python bench/losses.py` prints tables, writes JSON and a chart.

All candidates of an operation work on the same tensors in one interleaved run. Extra peak memory is that of one step:
on CUDA what its allocator counts; on the CPU in a fresh process, after one of toy size has imported what is imported
at first use, and one of full size for candidates that compile. A run that is given again after being killed goes on
behind its last whole group.
"""

import argparse
import ctypes
import sys
from pathlib import Path

import torch
from measure import EAGER, TOLERANCE, extra_peak
from operations import LINEAR_DPO, operations
from report import OURS
from results import Results

TOY = {"tokens": 16, "policy_tokens": 16, "hidden_size": 16, "vocab_size": 64, "logits_shape": [2, 8, 64]}
SWEEP = (OURS, EAGER, "TRL fused head", "Liger DPO, trained head")


def parse(arguments):
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    add("--dtype", choices=tuple(TOLERANCE), default="bfloat16" if cuda else "float32")
    add("--levels", nargs="+", default=[""], help="only operations whose name begins with one of these texts")
    add("--tokens", type=int, default=2048, help="linear_dpo_loss: tokens of both sequences together")
    add("--policy-tokens", type=int, default=8192 if cuda else 1024, help="linear_token_logps: tokens")
    add("--hidden-size", type=int, default=4096 if cuda else 1024)
    add("--vocab-size", type=int, default=128256, help="of all operations but dpo_loss")
    logits_shape = [8, 512, 128256 if cuda else 32064]
    add("--logits-shape", type=int, nargs=3, default=logits_shape, metavar=("2B", "T", "V"), help="dpo_loss: logits")
    add("--decode-rows", type=int, nargs="*", default=[1, 4, 16], help="token_logps: numbers of rows")
    add("--response-fraction", type=float, default=1.0, help="share of positions that are a response")
    add("--warmup", type=int, default=0, help="rounds before the timed ones, besides the first step of each candidate")
    add("--repeats", type=int, default=5)
    add("--output", type=Path, help="JSON path; the chart lies beside it (default: below bench/results)")
    add("--in-process", action="store_true", default=cuda, help="measure peak memory in this process, as on CUDA")
    add("--sweep", action="store_true", help="linear_dpo_loss over tokens and over vocabulary instead")
    add("--sweep-tokens", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, *([8192, 16384] if cuda else [])])
    add("--sweep-vocab-size", type=int, default=128256 if cuda else 32064, help="while tokens vary")
    add("--sweep-vocabularies", type=int, nargs="+", default=[8192, 16384, 32768, 65536, 131072, 262144])
    add("--sweep-fixed-tokens", type=int, default=2048 if cuda else 512, help="while the vocabulary varies")
    add("--peak", nargs=2, metavar=("LEVEL", "NAME"), help="print the extra peak memory of one candidate and end")
    return parser.parse_args(arguments)


def changed(options, **values):
    return argparse.Namespace(**vars(options) | values)


def print_peak(options):
    level, name = options.peak
    operation = operations(options)[level]
    candidate = operation.candidates[name]
    toy = changed(options, **TOY)
    candidate.setup(operation.problem(toy, operation.shape(toy)))()
    step = candidate.setup(operation.problem(options, operation.shape(options)))
    if candidate.compiles:
        step()
        ctypes.CDLL(None).malloc_trim(0)  # what it left with the C allocator would hide the second step's memory
    print(extra_peak(step, options.device))


def sweep_jobs(options, command):
    """linear_dpo_loss at each number of tokens, then at each size of the vocabulary."""
    points = {f"tokens {tokens}": (tokens, options.sweep_vocab_size) for tokens in options.sweep_tokens}
    points |= {f"vocabulary {size}": (options.sweep_fixed_tokens, size) for size in options.sweep_vocabularies}
    for title, (tokens, size) in points.items():
        sizes = [f"--tokens={tokens}", f"--vocab-size={size}"]
        point = changed(options, tokens=tokens, vocab_size=size)
        yield title, LINEAR_DPO.job(point, SWEEP, command and [*command, *sizes])


def main(arguments):
    options = parse(arguments)
    command = () if options.in_process else [__file__, *arguments]
    if options.peak:
        return print_peak(options)
    found = operations(options)
    chosen = {name: operation for name, operation in found.items() if name.startswith(tuple(options.levels))}
    if not chosen:
        return f"--levels: found {' '.join(options.levels)}, expected the beginning of one of: {', '.join(found)}."
    jobs = {name: operation.job(options, peak_command=command) for name, operation in chosen.items()}
    if options.sweep:
        jobs = dict(sweep_jobs(options, command))
    result = Results("kernels-sweep" if options.sweep else "kernels", vars(options), options.output).run(jobs)
    ours = [row for group in result["groups"].values() for name, row in group["rows"].items() if name.startswith(OURS)]
    return int(any("missing" in row or not row.get("agrees", True) for row in ours))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
