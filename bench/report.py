"""What is said of a result: one form of table, and a sentence where a candidate differs or a peer is ahead."""

from collections import defaultdict
from itertools import groupby

OURS = "bpo_fast"


def time_unit(seconds):
    """(factor, unit) in which these seconds are at least 0.1."""
    return (1, "s") if seconds >= 0.1 else (1e3, "ms") if seconds >= 1e-4 else (1e6, "us")


def time_words(seconds):
    factor, unit = time_unit(seconds)
    return f"{factor * seconds:.3g} {unit}"


def memory_words(peak_bytes):
    return f"{peak_bytes / 2**20:,.0f}"


# A row's key -> heading, words. A column without a cell is left out.
COLUMNS = {
    "launch": ("columns*unroll x warps / splits", str),
    "pairs_per_second": ("pairs/s (higher is better)", "{:.3f}".format),
    "answers_per_second": ("answers/s (higher is better)", "{:,.1f}".format),
    "tokens_per_second": ("tokens/s", "{:,.0f}".format),
    "tflops_per_pair": ("TFLOP a pair", "{:.1f}".format),
    "flops_ratio": ("of {reference}'s FLOPs", "{:.3f}x".format),
    "tokens": ("tokens", "{:,}".format),
    "gigabytes_per_pair": ("GB moved a pair", "{:.0f}".format),
    "other_gigabytes_per_pair": ("of those, no operands of products", "{:.0f}".format),
    "other_share": ("their share", "{:.1%}".format),
    "same_answers": ("answers as {reference}'s", "{:.1%}".format),
    "median": ("median time", time_words),
    "quartiles": ("quartiles", lambda pair: " - ".join(map(time_words, pair))),
    "time_ratio": ("of {reference}'s time", "{:.3g}x".format),
    "floor_ratio": ("of the floor's time", "{:.3g}x".format),
    "recompute_floor_ratio": ("of the floor with recompute", "{:.3g}x".format),
    "projected": ("projected", time_words),
    "fill_seconds": ("filling caches", time_words),
    "peak_bytes": ("peak MiB", memory_words),
    "forecast_bytes": ("forecast MiB", memory_words),
    "peak_ratio": ("of {reference}'s peak", "{:.3g}x".format),
}


def peers_of(rows, name):
    """{peer: row} of what was measured and does the same as `name`, the fastest first; floors are no peers."""
    kind = rows.get(name, {}).get("variant")
    same = [(peer, row) for peer, row in rows.items() if row.get("variant") == kind and row.get("agrees", True)]
    peers = [(peer, row) for peer, row in same if "median" in row and not row.get("is_floor")]
    return dict(sorted((pair for pair in peers if not pair[0].startswith(OURS)), key=lambda pair: pair[1]["median"]))


def ahead(rows):
    """(ours, "time" or "memory", {peer: its share of ours}) wherever peers take less of it."""
    for name, row in rows.items():
        for key, word in (("median", "time"), ("peak_bytes", "memory")) if name.startswith(OURS) else ():
            peers = [(peer, other[key]) for peer, other in peers_of(rows, name).items() if key in other and key in row]
            if less := {peer: value / row[key] for peer, value in peers if value < row[key]}:
                yield name, word, less


def remarks(title, group):
    """Sentences on one group: who differs from float64, and where a peer is ahead of ours."""
    for name, row in group["rows"].items():
        if not row.get("agrees", True):
            gradient = "" if row["gradient_error"] is None else f", gradient by {row['gradient_error']:.1e}"
            yield f"{title}: {name} differs from float64 (loss by {row['loss_error']:.1e}{gradient})."
    for name, word, shares in ahead(group["rows"]):
        peers = ", ".join(f"{peer} ({share:.3g}x)" for peer, share in shares.items())
        yield f"{title}: less {word} than {name} is taken by {peers}."


def table(header, lines):
    """A markdown table whose columns are aligned for the terminal, too."""
    widths = [max(3, *map(len, column)) for column in zip(header, *lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    formats = [f"{{:<{widths[0]}}}", *(f"{{:>{width}}}" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(formats)} |".format(*line) for line in (header, rule, *lines))


def group_table(groups):
    """The table of groups (title -> group) that do the same, perhaps at several sizes."""
    rows = {(title, name): row for title, group in groups.items() for name, row in group["rows"].items()}
    columns = {key: column for key, column in COLUMNS.items() if any(key in row for row in rows.values())}
    lines = []
    for (title, name), row in rows.items():
        cells = [words(row[key]) if key in row else "" for key, (_, words) in columns.items()]
        if "missing" in row and cells:
            cells[0] = row["missing"].split(":")[0]
        differs = "" if row.get("agrees", True) else " (differs)"
        lines.append([f"{f'{title}: ' if len(groups) > 1 else ''}{name}{differs}", *cells])
    reference = next(iter(groups.values()))["reference"]
    return table(["", *(heading.format(reference=reference) for heading, _ in columns.values())], lines)


def text(result):
    """All tables of a result; consecutive groups that do the same share one."""
    parts = []
    for what, items in groupby(result["groups"].items(), key=lambda item: item[1]["what"]):
        groups = dict(items)
        shapes = [group["shape"].items() for group in groups.values()]
        sizes = [f"{name} {size:,}" for name, size in shapes[0] if all((name, size) in shape for shape in shapes)]
        sentences = [sentence for item in groups.items() for sentence in remarks(*item)]
        title = ", ".join(filter(None, [*sizes, result["settings"].get("dtype")]))
        parts.append(" ".join([f"{what}; {title}. Lower is better.", *sentences]) + f"\n\n{group_table(groups)}")
    return "\n\n".join(parts)


def caption(*results):
    """Where, with what and when results were measured, a sentence a machine."""
    measured, named = defaultdict(set), ("torch", "trl", "liger-kernel")
    for found in (result["environment"] for result in results):
        versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items() if name in named)
        gpu = "" if found["device"] == "cpu" else f"{found['device']}; "
        machine = f"{gpu}{found['cpu']}, {found['threads']} threads; {versions}"
        measured[machine].add(f"{found['time'][:10]} {found['commit']}")
    return " ".join(f"{machine}; {', '.join(sorted(commits))}." for machine, commits in measured.items())
