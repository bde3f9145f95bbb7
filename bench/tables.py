"""Put the figures of bench/results/ into docs/benchmarks.md, all, and the README, a few: `python bench/tables.py`.

They stand between `<!-- begin figures -->` and `<!-- end figures -->`.
"""

import argparse
import json
import re
import sys
from itertools import chain

import charts
import report
from results import REPOSITORY

from bpo_fast.runs.files import replacing

FIGURES = re.compile(r"(<!-- begin figures -->\n).*?(<!-- end figures -->)", re.DOTALL)
# What the README shows beside the best peer: (bench, group) -> its name there.
HEADLINES = {
    ("throughput", "training"): "training step",
    ("kernels", "linear_dpo_loss"): "linear_dpo_loss",
    ("kernels", "dpo_loss"): "dpo_loss",
    ("noise", "one level"): "add_noise",
}


def load(folder):
    """{device: {file stem: result}}, GPUs first."""
    found = {}
    for path in sorted(set(folder.glob("*.json")) - set(folder.glob("*.partial.json"))):
        result = json.loads(path.read_text())
        found.setdefault(result["environment"]["device"], {})[path.stem] = result
    return dict(sorted(found.items(), key=lambda item: item[0] == "cpu"))


def details(devices):
    """Every table and chart."""
    for device, results in devices.items():
        yield f"## Figures on {'a CPU' if device == 'cpu' else device}"
        for stem, result in results.items():
            chart = "" if result["bench"] in charts.UNDRAWN else f"\n\n![{stem}](../bench/results/{stem}.png)"
            yield f"### {stem}\n\n{report.caption(result)}{chart}\n\n{report.text(result)}"


def stages(folder):
    """How the stages of `make gpu` ended, a table a device."""
    devices = {}
    for path in sorted((folder / "gpu").glob("*.json")):
        record = json.loads(path.read_text())
        devices.setdefault(record["environment"]["device"], []).append(record)
    for device, records in devices.items():
        yield f"## `make gpu` on {device}"
        lines = []
        for record in sorted(records, key=lambda record: record["environment"]["time"]):
            said = [step["said"][-1] for step in record.get("commands", []) if step["said"]][-1:]
            outcome = "; ".join(record["failures"]) or (*said, "ended well")[0]
            left_out = ", ".join(record["left_out"])
            lines.append([record["stage"], f"{record['seconds']:.0f} s", outcome.replace("|", "/"), left_out])
        yield report.table(["stage", "time", "outcome", "left out, as missing"], lines)


def headlines(results):
    """{name: group of ours and its fastest peer}; of several results with that group the last."""
    found = {}
    for (bench, title), name in HEADLINES.items():
        groups = [result["groups"].get(title) for result in results if result["bench"] == bench]
        for rows in (group["rows"] for group in groups if group):
            ours = next((row for row in rows if row.startswith(report.OURS)), None)
            for peer, row in list(report.peers_of(rows, ours).items())[:1]:
                found[name] = {"rows": {ours: rows[ours], peer: row}}
    return found


def overview(devices):
    """The README's small table a device, and the chart of the first device."""
    for device, found in devices.items():
        results = [result for result in found.values() if result["bench"] != "flops"]
        lines = []
        for name, group in headlines(results).items():
            (_, ours), (peer, other) = group["rows"].items()
            cells = [name, peer]
            for key in ("median", "peak_bytes"):
                words, both = report.COLUMNS[key][1], key in ours and key in other
                cells += [words(ours[key]), words(other[key]), f"{ours[key] / other[key]:.2g}x"] if both else [""] * 3
            lines.append(cells)
        where = "a CPU" + "; there are none on a GPU yet" * (len(devices) == 1) if device == "cpu" else device
        yield f"Figures on {where}. {report.caption(*results)} Lower is better, in all columns."
        yield report.table(["", "best peer", "time", "peer's", "ratio", "peak MiB", "peer's", "ratio"], lines)
        if device == next(iter(devices)):
            yield '<img src="bench/results/overview.png" width="380" alt="Time beside the best peer">'
        groups = [group for result in results for group in result["groups"].values()]
        slower = [group for group in groups if any(word == "time" for _, word, _ in report.ahead(group["rows"]))]
        if names := ", ".join(dict.fromkeys(group["what"].split(":")[0] for group in slower)):
            yield f"A peer is faster than ours in: {names}; [all figures](docs/benchmarks.md) say which."


def main(arguments, repository=REPOSITORY):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; end with code 1 if something would be")
    check = parser.parse_args(arguments).check
    folder, behind = repository / "bench/results", False
    devices = load(folder)
    if not check:
        for stem, result in (item for results in devices.values() for item in results.items()):
            charts.draw(folder / f"{stem}.png", result)
        if groups := headlines(next(iter(devices.values()), {}).values()):
            charts.draw(folder / "overview.png", {"bench": "overview", "settings": {}, "groups": groups})
    documents = {"docs/benchmarks.md": chain(details(devices), stages(folder)), "README.md": overview(devices)}
    for name, parts in documents.items():
        before, body = (repository / name).read_text(), "\n\n".join(parts)
        after, number = FIGURES.subn(lambda match, body=body: f"{match[1]}\n{body}\n\n{match[2]}", before)
        if not number:
            return f"{name}: found no '<!-- begin figures -->' with its end, expected one to write the figures behind."
        if after != before:
            behind = True
            print(f"{name}: {'behind bench/results; run python bench/tables.py.' if check else 'written.'}")
        if not check:
            with replacing(repository / name) as file:
                file.write(after)
    return int(check and behind)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
