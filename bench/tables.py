"""Put the figures of bench/results/ into the README's tables: `python bench/tables.py`.

Between `<!-- begin NAME -->` and `<!-- end NAME -->` stands what `NAME` below makes of its newest result files, and
nothing that was typed by hand. `--check` changes nothing and ends with code 1 if the README is behind.
"""

import argparse
import json
import os
import re
import sys

from measure import RESULTS

README = RESULTS.parents[1] / "README.md"


def caption(result, what):
    found = result["environment"]
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "trl", "liger-kernel"))
    return f"{what}. {found['cpu']}, {found['threads']} threads, {versions}; {found['time'][:10]}, {found['commit']}."


def table(header, rows):
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def throughput(result):
    setup = result["setup"]
    tokens = (setup["image_size"] // setup["patch_size"]) ** 2
    what = (
        f"Training, {setup['pairs']} pairs a step, LLaVA with {tokens} image tokens, V = {setup['vocab_size']:,}, "
        f"responses of about {setup['response_tokens']} tokens, LoRA r = {setup['lora_r']}, live reference, fp32"
    )
    rows = [
        [
            row["trainer"],
            f"{row['pairs_per_second']:.3f}",
            f"{row['speed_over_trl']:.2f}x",
            f"{row['peak_mib']:,.0f}",
            f"{row['memory_over_trl']:.2f}x",
        ]
        for row in result["table"]
    ]
    header = ["trainer", "pairs/s", "over TRL", "peak MiB", "of TRL's"]
    return f"{caption(result, what)}\n\n{table(header, rows)}\n\n![throughput](bench/results/throughput-cpu.png)"


def time_cells(row):
    """Median and quartiles in a unit that suits them."""
    factor, unit = (1, "s") if row["median"] >= 0.1 else (1e3, "ms")
    low, high = (f"{factor * value:.3g}" for value in row["quartiles"])
    return f"{factor * row['median']:.3g} {unit}", f"{low} - {high}"


def kernel_line(name, row):
    if "missing" in row:
        return [name, row["missing"].split(":")[0], "", "", "", "", ""]
    mark = "" if row.get("agrees", True) else " (**differs** from plain PyTorch)"
    peak = row.get("peak_bytes")
    return [
        name + mark,
        *time_cells(row),
        f"{row['time_ratio']:.2f}x" if "time_ratio" in row else "",
        f"{row['floor_ratio']:.2f}x" if "floor_ratio" in row else "",
        "" if peak is None else f"{peak / 2**20:,.0f}",
        f"{row['peak_ratio']:.3f}x" if "peak_ratio" in row else "",
    ]


def decode_table(levels):
    """One table of all numbers of rows: names down, rows across."""
    names = list(next(iter(levels.values()))["rows"])
    lines = []
    for name in names:
        rows = [level["rows"][name] for level in levels.values()]
        cells = [row["missing"].split(":")[0] if "missing" in row else f"{1e3 * row['median']:.3g}" for row in rows]
        agrees = all(row.get("agrees", True) for row in rows)
        lines.append([name if agrees else f"{name} (**differs** from plain PyTorch)", *cells])
    return table(["milliseconds", *(title.removeprefix("token_logps, ") for title in levels)], lines)


def kernels(result):
    settings, parts = result["settings"], []
    decode = {title: level for title, level in result["levels"].items() if title.startswith("token_logps, ")}
    for title, level in result["levels"].items():
        if title in decode:
            continue
        sizes = ", ".join(f"{name} {size:,}" for name, size in level["shape"].items())
        what = f"`{title}`: {level['what']}; {sizes}, {settings['dtype']}"
        header = ["", "median", "quartiles", "of eager's", "of the floor", "extra peak MiB", "of eager's"]
        lines = [kernel_line(name, row) for name, row in level["rows"].items()]
        parts.append(f"{caption(result, what)}\n\n{table(header, lines)}")
    if decode:
        first = next(iter(decode.values()))
        what = f"`token_logps`: {first['what']}; V {first['shape']['V']:,}, {settings['dtype']}"
        parts.append(f"{caption(result, what)}\n\n{decode_table(decode)}")
    return "\n\n".join(parts)


def sweep(result):
    settings = result["settings"]
    what = f"`linear_dpo_loss` over tokens and over vocabulary, forward and backward, {settings['dtype']}"
    return f"{caption(result, what)}\n\n![time and memory](bench/results/kernels-sweep-cpu.png)"


def noise(result):
    what = f"Noise on {result['shape']} {result['dtype']}"
    rows = [
        [f"`{name}`", f"{1000 * times['median']:.0f}", f"{result['speedup_over_eager'][name]:.1f}x"]
        for name, times in result["summary_s"].items()
    ]
    return f"{caption(result, what)}\n\n{table(['', 'milliseconds', 'speed over eager'], rows)}"


TABLES = {
    "throughput": ("throughput-cpu.json", throughput),
    "kernels": ("kernels-cpu.json", kernels),
    "sweep": ("kernels-sweep-cpu.json", sweep),
    "noise": ("noise-cpu-float32.json", noise),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; end with code 1 if something would be")
    arguments = parser.parse_args(argv)
    before = text = README.read_text()
    for name, (file, make) in TABLES.items():
        path = RESULTS / file
        if not path.exists():
            print(f"{path} is missing; run its benchmark first", file=sys.stderr)
            continue
        made = make(json.loads(path.read_text()))
        pattern = re.compile(f"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        text = pattern.sub(lambda match, made=made: f"{match[1]}\n{made}\n\n{match[2]}", text)
    if arguments.check:
        return int(text != before)
    temporary = README.with_name(f".{README.name}")
    temporary.write_text(text)
    os.replace(temporary, README)
    return 0


if __name__ == "__main__":
    sys.exit(main())
