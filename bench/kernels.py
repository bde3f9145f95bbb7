"""Time and memory of the losses beside their peers: `python bench/kernels.py` prints tables, writes JSON and a chart.

Every candidate of a job works on the same tensors in one interleaved run; its loss and gradient are compared with
plain PyTorch's in float64, and a candidate that differs by more than the tolerance is marked. Extra peak memory is
that of one step in a fresh process, after one of toy size has brought in what is imported at first use, and for
candidates that compile after one of full size, so that no compiler's memory is counted. `--sweep` measures
linear_dpo_loss over tokens and over vocabulary instead. What is measured is kept as it comes: a run that is given
again after being killed goes on behind its last whole job.
"""

import argparse
import ctypes
import sys
from pathlib import Path

import torch
from kernel_levels import DPO, EAGER, FLOOR, LINEAR_DPO, LINEAR_LOGPS, OURS, TOLERANCE, decode_level
from kernel_plots import plot_levels, plot_sweep
from measure import RESULTS, environment, extra_peak, interleaved, peak_memory, summary, write_json
from partial import Partial
from tqdm import tqdm

TOY = {"tokens": 16, "policy_tokens": 16, "hidden_size": 16, "vocab_size": 64, "logits_shape": [2, 8, 64]}
SWEEP = (OURS, EAGER, "TRL fused head", "Liger DPO, trained head")


def levels_of(options):
    """name -> Level, in the order in which they are measured."""
    found = [LINEAR_DPO, LINEAR_LOGPS, DPO, *map(decode_level, options.decode_rows)]
    return {level.name: level for level in found}


def differences(result, reference):
    """(loss, gradient) error of a result: relative, of losses below 1 absolute; None if there is no gradient."""
    (loss, gradient), (ref_loss, ref_gradient) = result, reference
    loss_error = (loss.double() - ref_loss.double()).abs().item() / max(1.0, abs(ref_loss.item()))
    if ref_gradient is None:
        return loss_error, None
    distance = torch.linalg.vector_norm(gradient.double().sub_(ref_gradient))
    return loss_error, (distance / torch.linalg.vector_norm(ref_gradient)).item()


def reference_of(level, problem):
    """(loss, gradient) of plain PyTorch in float64 on the same values."""
    return level.candidate(EAGER).make(problem.in_float64())()


def first_steps(level, candidates, problem, options, rows):
    """Fill `rows` with what each candidate's first step gives, and return name -> step of those that run here."""
    reference = reference_of(level, problem)
    tolerance, steps = TOLERANCE[options.dtype], {}
    for candidate in candidates:
        reason = candidate.missing(options.device)
        if reason is None:
            try:
                step = candidate.make(problem)
                result = step()
            except Exception as error:  # out of memory, or a peer that does not support the shape: said in the table
                first_line = (str(error).splitlines() or [""])[0]
                reason = f"failed: {type(error).__name__}: {first_line}"[:200]
        if reason is not None:
            rows[candidate.name] = {"missing": reason}
            continue
        steps[candidate.name] = step
        rows[candidate.name] = row = {"trains_head": candidate.trains_head}
        if not candidate.is_floor:
            row["loss"] = result[0].item()
            row["loss_error"], row["gradient_error"] = differences(result, reference)
            row["agrees"] = max(row["loss_error"], row["gradient_error"] or 0.0) <= tolerance
        del result
    return steps


def quartiles(samples):
    """First and third quartile."""
    return torch.quantile(torch.tensor(samples, dtype=torch.float64), torch.tensor([0.25, 0.75]).double()).tolist()


def repeated(step, calls):
    def run():
        for _ in range(calls):
            step()

    return run


def measure(level, candidates, options, arguments, progress):
    """Rows of one job: name -> loss, errors, seconds, spread, extra peak bytes, ratios; or why it is missing."""
    problem, rows = level.problem(options), {}
    steps = first_steps(level, candidates, problem, options, rows)
    progress.update(len(rows))
    steps = {name: repeated(step, level.calls) for name, step in steps.items()}
    samples = {name: [] for name in steps}
    names = list(steps)
    for repeat in range(options.warmup + options.repeats):
        shift = repeat % max(1, len(names))
        order = names[shift:] + names[:shift]
        for name, seconds in interleaved({name: steps[name] for name in order}, warmup=0, repeats=1).items():
            if repeat >= options.warmup:
                samples[name].append(seconds[0] / level.calls)
        progress.update(len(names))
    del steps, problem
    if options.device == "cuda":
        torch.cuda.empty_cache()
    for name in names:
        rows[name] |= {"seconds": samples[name], **summary(samples[name]), "quartiles": quartiles(samples[name])}
        if level.with_peak and name != FLOOR:
            rows[name]["peak_bytes"] = peak_memory(__file__, *arguments, "--peak", level.name, name)
            progress.update()
    for row in (rows[name] for name in names):
        for key, ratio in (("median", "time_ratio"), ("peak_bytes", "peak_ratio")):
            if rows[EAGER].get(key) and row.get(key) is not None:
                row[ratio] = row[key] / rows[EAGER][key]
        if rows.get(FLOOR, {}).get("median"):
            row["floor_ratio"] = row["median"] / rows[FLOOR]["median"]
    return rows


def steps_of(level, candidates, options):
    """How many progress steps one job takes: a first step, the timed ones and a peak for each candidate that runs."""
    runs = [candidate for candidate in candidates if candidate.missing(options.device) is None]
    peaks = sum(not candidate.is_floor for candidate in runs) if level.with_peak else 0
    return len(candidates) + len(runs) * (options.warmup + options.repeats) + peaks


def print_peak(options):
    level_name, name = options.peak
    level = levels_of(options)[level_name]
    candidate = level.candidate(name)
    candidate.make(level.problem(argparse.Namespace(**{**vars(options), **TOY})))()
    step = candidate.make(level.problem(options))
    if candidate.compiles:
        step()
        # What the first step left with the C allocator would hide the second one's memory.
        ctypes.CDLL(None).malloc_trim(0)
    print(extra_peak(step, options.device))


def time_words(seconds):
    return f"{seconds:.3f} s" if seconds >= 0.1 else f"{1e3 * seconds:.3f} ms"


def print_table(level):
    print(f"\n{level['what']}: {level['shape']}")
    print(
        f"{'':<38}{'median':>12}{'quartiles':>28}{'min':>12}{'max':>12}{'x eager':>9}{'x floor':>9}{'peak MiB':>10}"
        f"{'x':>8}{'loss':>14}"
    )
    for name, row in level["rows"].items():
        if "missing" in row:
            print(f"{name:<38}{row['missing']}")
            continue
        low, high = time_words(row["quartiles"][0]), time_words(row["quartiles"][1])
        words = [time_words(row["median"]), f"{low} - {high}", time_words(row["min"]), time_words(row["max"])]
        ratios = [f"{row[key]:.2f}" if key in row else "" for key in ("time_ratio", "floor_ratio")]
        peak = f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else ""
        share = f"{row['peak_ratio']:.3f}" if "peak_ratio" in row else ""
        loss = f"{row['loss']:.6f}" if "loss" in row else ""
        print(
            f"{name:<38}{words[0]:>12}{words[1]:>28}{words[2]:>12}{words[3]:>12}{ratios[0]:>9}{ratios[1]:>9}{peak:>10}"
            f"{share:>8}{loss:>14}{'' if row.get('agrees', True) else difference_words(row)}"
        )


def difference_words(row):
    gradient = "" if row["gradient_error"] is None else f", gradient by {row['gradient_error']:.1e}"
    return f"  DIFFERS: loss by {row['loss_error']:.1e}{gradient}"


def run_jobs(jobs, options, output, settings, found_environment):
    """Measure jobs {key: (level, candidates, options, arguments)}, keeping each result as it comes.

    Returns {key: result} and the `Partial` that kept them.
    """
    partial = Partial(output, settings, found_environment)
    done = partial.load()
    todo = {key: job for key, job in jobs.items() if key not in done}
    total = sum(steps_of(level, candidates, there) for level, candidates, there, _ in todo.values())
    with tqdm(total=total, unit="step", desc="kernels", mininterval=1) as progress:
        for key, (level, candidates, job_options, arguments) in todo.items():
            progress.set_description(key)
            rows = measure(level, candidates, job_options, arguments, progress)
            done[key] = {"what": level.what, "shape": level.shape(job_options), "rows": rows}
            partial.save(done)
    return {key: done[key] for key in jobs}, partial


def level_jobs(options, arguments):
    """The jobs of a plain run: every chosen level with all its candidates."""
    return {
        name: (level, level.candidates, options, arguments)
        for name, level in levels_of(options).items()
        if options.levels is None or name.startswith(tuple(options.levels))
    }


def sweep_jobs(options, arguments):
    """The jobs of a sweep: linear_dpo_loss at each number of tokens, then at each size of the vocabulary."""
    points = [("tokens", tokens, options.sweep_vocab_size) for tokens in options.sweep_tokens]
    points += [("vocabulary", options.sweep_fixed_tokens, size) for size in options.sweep_vocabularies]
    jobs = {}
    for axis, tokens, vocab_size in points:
        there = argparse.Namespace(**{**vars(options), "tokens": tokens, "vocab_size": vocab_size})
        extra = ["--tokens", str(tokens), "--vocab-size", str(vocab_size)]
        candidates = tuple(LINEAR_DPO.candidate(name) for name in SWEEP)
        value = tokens if axis == "tokens" else vocab_size
        jobs[f"{axis} {value}"] = (LINEAR_DPO, candidates, there, [*arguments, *extra])
    return jobs


def parse(arguments):
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    add("--dtype", choices=tuple(TOLERANCE), default="bfloat16" if cuda else "float32")
    add("--levels", nargs="+", metavar="TEXT", help="only jobs whose name begins with one of these texts")
    add("--tokens", type=int, default=2048, help="linear_dpo_loss: tokens of the chosen and the rejected row together")
    add("--policy-tokens", type=int, default=8192 if cuda else 1024, help="linear_token_logps: tokens")
    add("--hidden-size", type=int, default=4096 if cuda else 1024)
    add("--vocab-size", type=int, default=128256, help="of all jobs but dpo_loss")
    add(
        "--logits-shape",
        type=int,
        nargs=3,
        default=[8, 512, 128256 if cuda else 32064],
        metavar=("2B", "T", "V"),
        help="dpo_loss: sequences (chosen and rejected), tokens of each, vocabulary",
    )
    add("--decode-rows", type=int, nargs="*", default=[1, 4, 16], help="token_logps: numbers of rows")
    add("--response-fraction", type=float, default=1.0, help="share of positions that are a response")
    add("--warmup", type=int, default=0, help="rounds before the timed ones, besides the first step of each candidate")
    add("--repeats", type=int, default=5)
    add("--output", type=Path, help="JSON path; the chart lies beside it (default: bench/results/)")
    add("--sweep", action="store_true", help="linear_dpo_loss over tokens and over vocabulary instead")
    add("--sweep-tokens", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, *([8192, 16384] if cuda else [])])
    add("--sweep-vocab-size", type=int, default=128256 if cuda else 32064, help="while tokens vary")
    add("--sweep-vocabularies", type=int, nargs="+", default=[8192, 16384, 32768, 65536, 131072, 262144])
    add("--sweep-fixed-tokens", type=int, default=2048 if cuda else 512, help="while the vocabulary varies")
    add("--peak", nargs=2, metavar=("LEVEL", "NAME"), help="print the extra peak memory of one candidate and end")
    return parser.parse_args(arguments)


def main(arguments):
    options = parse(arguments)
    if options.peak:
        print_peak(options)
        return 0
    found = environment()
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    name = f"kernels-{'sweep-' if options.sweep else ''}{options.device}.json"
    output = options.output or RESULTS / name
    jobs = (sweep_jobs if options.sweep else level_jobs)(options, arguments)
    if not jobs:
        print(f"--levels {' '.join(options.levels)} names no job; there are: {', '.join(levels_of(options))}.")
        return 2
    results, partial = run_jobs(jobs, options, output, settings, found)
    kind = "points" if options.sweep else "levels"
    write_json(output, {"environment": found, "settings": settings, kind: results})
    (plot_sweep if options.sweep else plot_levels)(output.with_suffix(".png"), results)
    partial.remove()
    for result in results.values():
        print_table(result)
    print(f"\n{options.device}, {options.dtype}; written: {output} and {output.with_suffix('.png')}")
    ours = [row for result in results.values() for key, row in result["rows"].items() if key.startswith(OURS)]
    return int(any("missing" in row or not row["agrees"] for row in ours))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
