"""add_noise beside plain PyTorch, torch.compile and a bare copy.

    python bench/noise.py [--shape 32 576 1024] [--dtype float32] [--device cpu] [--repeats 15]

Prints a table and writes bench/results/noise-<device>-<dtype>.json with every sample.
"""

import argparse

import torch
from measure import RESULTS, environment, interleaved, summary, write_json

from bpo_fast import NoiseSchedule, add_noise

STEP, SEED = 900, 0


def eager(x, a, b):
    return a * x + b * torch.randn_like(x)


def candidates(x):
    """name -> callable; all but the copy make the noised x, the in-place one in a buffer of its own."""
    schedule = NoiseSchedule.sigmoid()
    a, b = schedule.scales(STEP)
    out, buffer = torch.empty_like(x), x.clone()
    functions = {
        "bpo_fast.add_noise": lambda: add_noise(x, STEP, schedule=schedule, seed=SEED),
        "bpo_fast.add_noise(out=x)": lambda: add_noise(buffer, STEP, schedule=schedule, seed=SEED, out=buffer),
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
    return functions


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs="+", default=[32, 576, 1024])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()

    x = torch.randn(arguments.shape, device=arguments.device).to(getattr(torch, arguments.dtype))
    samples = interleaved(candidates(x), warmup=2, repeats=arguments.repeats)
    rows = {name: summary(seconds) for name, seconds in samples.items()}
    plain = rows["a * x + b * randn_like(x)"]["median"]

    setting = environment()
    shape = "x".join(map(str, arguments.shape))
    print(f"{setting['device']}, {setting['cpu']}, {setting['threads']} threads; [{shape}] {arguments.dtype}")
    print(f"{'':28} {'median ms':>10} {'min':>8} {'max':>8} {'GB/s':>7} {'speed-up':>9}")
    for name, row in rows.items():
        median, low, high = (row[key] * 1e3 for key in ("median", "min", "max"))
        rate = 2 * x.numel() * x.element_size() / row["median"] / 1e9
        print(f"{name:28} {median:10.2f} {low:8.2f} {high:8.2f} {rate:7.2f} {plain / row['median']:8.2f}x")
    path = RESULTS / f"noise-{x.device.type}-{arguments.dtype}.json"
    write_json(
        path,
        {
            "environment": setting,
            "shape": arguments.shape,
            "dtype": arguments.dtype,
            "summary_s": rows,
            "speedup_over_eager": {name: plain / row["median"] for name, row in rows.items()},
            "samples_s": samples,
        },
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
