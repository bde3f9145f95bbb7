"""Charts of results: bars of groups on linear axes, lines of a sweep. One colour a library in all of them."""

import matplotlib
from report import OURS, memory_words, time_unit, time_words

matplotlib.use("Agg")
from matplotlib import pyplot

# By the beginning of a candidate's name.
COLOURS = {OURS: "#1b6ca8", "eager": "#8a8a8a", "TRL": "#c77d1e", "Liger": "#3b8f5a", "cut-": "#8e6bb0", "": "#c9c9c9"}
# Results without times.
UNDRAWN = ("tuning", "flops")
STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "figure.constrained_layout.use": True}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}


def colour(name, row):
    return "#e6d9a8" if row.get("is_floor") else next(c for start, c in COLOURS.items() if name.startswith(start))


def draw_bars(axis, title, rows, key, factor, words):
    """One bar a row, the first on top, with its value behind it, or why there is none."""
    labels = [words(row[key]) if key in row else row.get("missing", "").split(":")[0] for row in rows.values()]
    lengths, colours = [factor * row.get(key, 0) for row in rows.values()], [colour(*item) for item in rows.items()]
    axis.bar_label(axis.barh(list(rows), lengths, color=colours), labels, padding=3)
    axis.invert_yaxis()
    axis.margins(x=0.25)
    axis.set_title(title)


def bars(groups, narrow=False):
    """One line of bar charts a group: median time and, where it was measured, peak memory. groups: title -> group.

    Narrow: time alone, as wide as a phone.
    """
    heights = [len(group["rows"]) + 2.5 for group in groups.values()]
    peaks = [not narrow and any("peak_bytes" in row for row in group["rows"].values()) for group in groups.values()]
    size = {"figsize": (3.8 if narrow else 11, 0.27 * sum(heights)), "height_ratios": heights, "squeeze": False}
    figure, axes = pyplot.subplots(len(groups), 1 + any(peaks), **size)
    for (title, group), (time_axis, *others), with_peak in zip(groups.items(), axes, peaks, strict=True):
        factor, unit = time_unit(max(row.get("median", 0) for row in group["rows"].values()))
        draw_bars(time_axis, f"{title}: median time, {unit}", group["rows"], "median", factor, time_words)
        for axis in others:
            draw_bars(axis, "peak memory, MiB", group["rows"], "peak_bytes", 2**-20, memory_words)
            axis.set_yticklabels([])
            axis.set_visible(with_peak)
    return figure


def lines(groups):
    """One line of two line charts a kind of point ("tokens 256" is of kind "tokens"): time, peak memory; log axes."""
    kinds = list(dict.fromkeys(title.split()[0] for title in groups))
    figure, axes = pyplot.subplots(len(kinds), 2, figsize=(11, 4 * len(kinds)), squeeze=False)
    for kind, pair in zip(kinds, axes, strict=True):
        points = {int(title.split()[1]): group for title, group in groups.items() if title.split()[0] == kind}
        sizes = [set(group["shape"].items()) for group in points.values()]
        fixed = ", ".join(f"{name} {size:,}" for name, size in sorted(set.intersection(*sizes)))
        columns = ("median", 1, "median time, s"), ("peak_bytes", 2**-20, "peak memory, MiB")
        for axis, (key, factor, title) in zip(pair, columns, strict=True):
            axis.set(xscale="log", yscale="log", title=title, xlabel=f"{kind} ({fixed})")
            for name, row in next(iter(points.values()))["rows"].items():
                ys = [factor * (group["rows"][name].get(key) or float("nan")) for group in points.values()]
                axis.plot(list(points), ys, "o-", label=name, color=colour(name, row))
            axis.set_xticks(list(points), [f"{x // 1024}k" if x >= 1024 else str(x) for x in points])
            axis.yaxis.set_major_formatter("{x:g}")
            axis.minorticks_off()
            axis.grid(alpha=0.25)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def draw(path, result):
    """The chart of a result; a sweep of launches and a count have none."""
    if result["bench"] in UNDRAWN:
        return
    with pyplot.rc_context(STYLE):
        narrow = result["bench"] == "overview"
        figure = lines(result["groups"]) if result["settings"].get("sweep") else bars(result["groups"], narrow)
        temporary = path.with_name(f".{path.name}")
        figure.savefig(temporary, dpi=200 if narrow else 110, format="png")
        temporary.replace(path)
        pyplot.close(figure)
