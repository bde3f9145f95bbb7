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


def kernels(result):
    settings = result["settings"]
    parts = []
    for level, rows in result["levels"].items():
        vocabulary = settings["vocab_size" if level == "linear_dpo_loss" else "logits_vocab_size"]
        what = (
            f"`{level}`, forward and backward, live reference, {settings['tokens']:,} tokens, "
            f"V = {vocabulary:,}, {settings['dtype']}"
        )
        lines = [
            [
                name,
                f"{row['median']:.2f}",
                f"{row['time_ratio']:.2f}x",
                "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}",
                "" if row["peak_ratio"] is None else f"{row['peak_ratio']:.3f}x",
            ]
            for name, row in rows.items()
        ]
        header = ["", "seconds", "of eager's", "extra peak MiB", "of eager's"]
        parts.append(f"{caption(result, what)}\n\n{table(header, lines)}")
    return "\n\n".join(parts)


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
