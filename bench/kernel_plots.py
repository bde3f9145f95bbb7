"""Charts of `kernels.py`: bars of one run, lines of a sweep."""

from kernel_levels import EAGER, FLOOR, OURS

COLOURS = {OURS: "#1b6ca8", EAGER: "#8a8a8a", "TRL fused head": "#c77d1e", "Liger DPO, trained head": "#3b8f5a"}
OTHER, OTHER_OURS, FLOOR_COLOUR = "#c9c9c9", "#7fb2d9", "#e6d9a8"


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _colour(name):
    if name == OURS:
        return COLOURS[OURS]
    return OTHER_OURS if name.startswith(OURS) else FLOOR_COLOUR if name == FLOOR else OTHER


def _missing(row):
    return row.get("missing", "").split(":")[0]


def _bars(axis, rows, values, words):
    names = list(rows)[::-1]
    bars = axis.barh(names, [values(rows[name]) for name in names], color=[_colour(name) for name in names])
    axis.bar_label(bars, [_missing(rows[name]) or words(rows[name]) for name in names], padding=3, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.3)
    axis.tick_params(labelsize=8)


def plot_levels(path, levels):
    """One line of two bar charts a job: median time, extra peak memory."""
    pyplot = _pyplot()
    heights = [len(level["rows"]) + 2.5 for level in levels.values()]
    figure, axes = pyplot.subplots(
        len(levels), 2, figsize=(11, 0.27 * sum(heights)), squeeze=False, height_ratios=heights
    )
    for (title, level), (time_axis, peak_axis) in zip(levels.items(), axes, strict=True):
        slow = max(row.get("median", 0) for row in level["rows"].values()) >= 0.1
        factor, unit = (1, "s") if slow else (1e3, "ms")
        _bars(
            time_axis,
            level["rows"],
            lambda row, factor=factor: factor * row.get("median", 0),
            lambda row, factor=factor: f"{factor * row['median']:.3g}",
        )
        time_axis.set_title(f"{title}: {unit} a step, median", fontsize=9, loc="left")
        _bars(
            peak_axis,
            level["rows"],
            lambda row: row.get("peak_bytes", 0) / 2**20,
            lambda row: f"{row['peak_bytes'] / 2**20:,.0f}" if "peak_bytes" in row else "",
        )
        if not any("peak_bytes" in row for row in level["rows"].values()):
            peak_axis.set_visible(False)
        peak_axis.set_title("extra peak memory, MiB", fontsize=9, loc="left")
        peak_axis.set_yticklabels([])
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _direct_labels(axis, ends):
    """Names at the right ends of the lines, pushed apart where they would cover. ends: (y, x, name, colour)."""
    low = axis.get_ylim()[0]
    free = float("-inf")
    for y, x, name, colour in sorted(ends):
        position = axis.transData.transform((x, y))[1] - axis.transData.transform((x, low))[1]
        free = max(position, free + (30 if "\n" in name else 17))
        axis.annotate(
            name,
            xy=(x, y),
            xytext=(8, (free - position) * 72 / axis.figure.dpi),
            textcoords="offset points",
            color=colour,
            fontsize=10,
            va="center",
        )


def plot_sweep(path, points):
    """Two rows of line charts, over tokens and over vocabulary: time, extra peak memory. Logarithmic axes."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8))
    for axis_name, row_axes in zip(("tokens", "vocabulary"), axes, strict=True):
        found = {int(key.split()[1]): point for key, point in points.items() if key.startswith(axis_name)}
        first = next(iter(found.values()))["shape"]
        fixed = f"V = {first['V']:,}" if axis_name == "tokens" else f"{first['tokens']:,} tokens"
        for axis, key, factor, title in zip(
            row_axes, ("median", "peak_bytes"), (1, 2**-20), ("seconds a step", "extra peak memory, MiB"), strict=True
        ):
            axis.set(xscale="log", yscale="log")
            axis.set_title(f"linear_dpo_loss: {title}", fontsize=11, loc="left")
            axis.set_xlabel(f"{axis_name} (H = {first['H']:,}, {fixed})", fontsize=10)
            ends = []
            for name, colour in COLOURS.items():
                line = [
                    (x, factor * point["rows"][name][key])
                    for x, point in found.items()
                    if point["rows"].get(name, {}).get(key)
                ]
                if line:
                    xs, ys = zip(*line, strict=True)
                    axis.plot(xs, ys, color=colour, marker="o", markersize=4, linewidth=2.4 if name == OURS else 1.6)
                    ends.append((ys[-1], xs[-1], name.replace("bpo_fast", "bpo-fast").replace(", ", ",\n"), colour))
            ticks = list(found)
            axis.set_xticks(ticks, [f"{x // 1024}k" if x >= 1024 else str(x) for x in ticks], minor=False)
            axis.minorticks_off()
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xlim(min(ticks) / 1.15, max(ticks) * 1.05)
            axis.label_ends = ends
    figure.tight_layout(w_pad=9, rect=(0, 0, 0.9, 1))
    figure.canvas.draw()
    for axis in axes.flat:
        _direct_labels(axis, axis.label_ends)
    figure.savefig(path, dpi=110)
