"""The noise ops beside plain PyTorch, torch.compile and bare copies.

    python bench/noise.py [--shape 32 576 1024] [--dtype float32] [--device cpu] [--repeats 15] [--levels 4]

Prints a table and writes bench/results/noise-<device>-<dtype>.json with every sample, and a chart beside it as .png.
Like is compared with like: writing to memory that is there with copy_, making a tensor with clone.
"""

import argparse
from pathlib import Path

import torch
from measure import RESULTS, environment, interleaved, summary, write_json

from bpo_fast import NoiseSchedule, add_noise
from bpo_fast.ops.noise.ladder import add_noise_ladder
from bpo_fast.ops.noise.rows import add_noise_rows

STEP, SEED = 900, 0
SCHEDULE = NoiseSchedule.sigmoid()
OPTIONS = {"schedule": SCHEDULE, "seed": SEED}
OTHER_DTYPE = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32, torch.float16: torch.float32}


def eager(x, a, b):
    return a * x + b * torch.randn_like(x)


def one_level(x):
    """Plain PyTorch, its compiled form, and ours; a new tensor, an existing one, in place."""
    a, b = SCHEDULE.scales(STEP)
    out, buffer = torch.empty_like(x), x.clone()
    functions = {
        "bpo_fast.add_noise": lambda: add_noise(x, STEP, **OPTIONS),
        "bpo_fast.add_noise(out=out)": lambda: add_noise(x, STEP, **OPTIONS, out=out),
        "bpo_fast.add_noise(out=x)": lambda: add_noise(buffer, STEP, **OPTIONS, out=buffer),
        "a * x + b * randn_like(x)": lambda: eager(x, a, b),
    }
    compiled = torch.compile(eager)
    try:
        compiled(x, a, b)
    except Exception as error:  # no working compiler on this machine: said in the table, not hidden
        print(f"torch.compile is left out: {type(error).__name__}: {str(error).splitlines()[0]}")
    else:
        functions["the same, torch.compile"] = lambda: compiled(x, a, b)
    functions["copy"] = lambda: out.copy_(x)
    functions["clone"] = lambda: x.clone()
    return functions


def ladder(x, levels):
    """Several steps of the same samples: one launch, a launch a step, plain PyTorch a step; all into one tensor."""
    steps = [round(k * (SCHEDULE.num_steps - 1) / max(levels - 1, 1)) for k in range(levels)]
    out = x.new_empty((levels, *x.shape))

    def call_by_call():
        for k, step in enumerate(steps):
            add_noise(x, step, **OPTIONS, out=out[k])

    def eager_by_step():
        for k, step in enumerate(steps):
            out[k] = eager(x, *SCHEDULE.scales(step))

    return {
        "bpo_fast.add_noise_ladder": lambda: add_noise_ladder(x, steps, **OPTIONS, out=out),
        "bpo_fast.add_noise, call by call": call_by_call,
        "eager, step by step": eager_by_step,
        "copy, level by level": lambda: out.copy_(x.expand_as(out)),
    }


def packed_rows(x):
    """Half of the pictures of a cache, every second one clean, cast and written between the text rows of a packed row.

    x is the cache [N, M, H]; text takes as many rows as the pictures.
    """
    pictures, tokens, width = x.shape
    source = torch.arange(0, pictures, 2)
    count = len(source) * tokens
    rows = torch.arange(len(source))[:, None] * 2 * tokens + torch.arange(tokens)
    step = torch.where(torch.arange(len(source)) % 2 == 0, STEP, -1)
    out = torch.zeros(2 * count, width, dtype=OTHER_DTYPE[x.dtype], device=x.device)
    scales = torch.tensor([SCHEDULE.scales(STEP) if s >= 0 else (1.0, 0.0) for s in step.tolist()]).to(x.device)
    a, b = scales[:, 0, None, None], scales[:, 1, None, None]
    flat, index = rows.flatten().to(x.device), source.to(x.device)
    features = x.index_select(0, index)

    def eager_steps():
        picked = x.index_select(0, index).float()
        noised = a * picked + b * torch.randn_like(picked)
        out.index_copy_(0, flat, noised.to(out.dtype).flatten(0, 1))

    return {
        "bpo_fast.add_noise_rows": lambda: add_noise_rows(x, step, out=out, rows=rows, source=source, **OPTIONS),
        "index_select, noise, cast, index_copy_": eager_steps,
        "cast copy of as many": lambda: out[:count].copy_(features.flatten(0, 1)),
    }


# group -> (the candidate that others are compared with, the floor)
GROUPS = {
    "one level": ("a * x + b * randn_like(x)", "copy"),
    "ladder": ("eager, step by step", "copy, level by level"),
    "packed rows": ("index_select, noise, cast, index_copy_", "cast copy of as many"),
}


# What makes a new tensor has clone for its floor.
NEW_TENSOR = ("bpo_fast.add_noise", "a * x + b * randn_like(x)", "the same, torch.compile", "clone")


def floor_of(group, key):
    return "clone" if group == "one level" and key in NEW_TENSOR else GROUPS[group][1]


def chart(path, title, groups):
    """A bar a candidate, its median over the floor of its group, with the samples' spread."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is missing, so there is no chart; install bpo-fast[plots]")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(groups), 1, figsize=(8, 7), height_ratios=[len(rows) for rows in groups.values()]
    )
    for axis, (name, rows) in zip(axes, groups.items(), strict=True):
        floor = GROUPS[name][1]
        medians = [row["median"] * 1e3 for row in rows.values()]
        low = [(row["median"] - row["min"]) * 1e3 for row in rows.values()]
        high = [(row["max"] - row["median"]) * 1e3 for row in rows.values()]
        colours = ["C0" if label.startswith("bpo_fast") else "0.6" for label in rows]
        axis.barh(list(rows), medians, xerr=[low, high], color=colours, capsize=2)
        axis.axvline(rows[floor]["median"] * 1e3, color="C3", linestyle=":", label=f"floor: {floor}")
        axis.set_xscale("log")
        axis.invert_yaxis()
        axis.set_title(name, loc="left", fontsize=10)
        axis.legend(fontsize=8)
    axes[-1].set_xlabel("milliseconds (median; whiskers: fastest and slowest)")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3, default=[32, 576, 1024], metavar=("N", "M", "H"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--levels", type=int, default=4, help="steps of the ladder")
    parser.add_argument("--results", default=RESULTS, help="folder to write to")
    arguments = parser.parse_args()

    x = torch.randn(arguments.shape, device=arguments.device).to(getattr(torch, arguments.dtype))
    candidates = {"one level": one_level(x), "ladder": ladder(x, arguments.levels), "packed rows": packed_rows(x)}
    samples = {name: interleaved(group, warmup=2, repeats=arguments.repeats) for name, group in candidates.items()}
    groups = {name: {key: summary(seconds) for key, seconds in group.items()} for name, group in samples.items()}

    setting = environment()
    shape = "x".join(map(str, arguments.shape))
    title = f"{setting['device']}, {setting['cpu']}, {setting['threads']} threads; [{shape}] {arguments.dtype}"
    print(title)
    ratios = {}
    for name, rows in groups.items():
        plain = rows[GROUPS[name][0]]["median"]
        ratios[name] = {
            key: {
                "speedup_over_eager": plain / row["median"],
                "time_over_floor": row["median"] / rows[floor_of(name, key)]["median"],
            }
            for key, row in rows.items()
        }
        print(f"{name:40} {'median ms':>10} {'min':>8} {'max':>8} {'speed-up':>9} {'of floor':>9}")
        for key, row in rows.items():
            median, low, high = (row[part] * 1e3 for part in ("median", "min", "max"))
            ratio = ratios[name][key]
            print(
                f"  {key:38} {median:10.2f} {low:8.2f} {high:8.2f} {ratio['speedup_over_eager']:8.2f}x "
                f"{ratio['time_over_floor']:8.2f}x"
            )
    path = Path(arguments.results) / f"noise-{x.device.type}-{arguments.dtype}.json"
    write_json(
        path,
        {
            "environment": setting,
            "shape": arguments.shape,
            "dtype": arguments.dtype,
            "levels": arguments.levels,
            "summary_s": groups["one level"],
            "speedup_over_eager": {key: ratio["speedup_over_eager"] for key, ratio in ratios["one level"].items()},
            "groups": {name: {"summary_s": groups[name], "ratios": ratios[name]} for name in groups},
            "samples_s": samples,
        },
    )
    chart(path.with_suffix(".png"), title, groups)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
