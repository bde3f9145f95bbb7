"""Charts from plain dictionaries.

A chart is drawn at the size that it is shown at, `width` CSS pixels, so that its text of 9 pt and more is at least 12
pixels high on the page.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure

PIXELS_PER_INCH = 96  # CSS pixels
_HEIGHT = 270
_LABEL_WIDTH = 9  # characters of a line below a bar: four bars' labels fit side by side on a phone
_INK, _MUTED, _RULE = "#22303c", "#5b6873", "#dfe4e8"


def bar_chart(percentages: Mapping[str, Sequence[float]], colors: Mapping[str, str], *, width: int) -> Figure:
    """A bar for the mean of each name's values, with a dot for each value where there are several.

    Args:
        percentages: name -> values in percent, one a run.
        colors: name -> color.
        width: CSS pixels.
    """
    axes = _axes(width)
    means = [fmean(values) for values in percentages.values()]
    labels = [fill(name, _LABEL_WIDTH) for name in percentages]
    axes.bar(labels, means, width=0.62, color=[colors[name] for name in percentages])
    for place, (mean, values) in enumerate(zip(means, percentages.values(), strict=True)):
        if len(values) > 1:
            axes.scatter([place] * len(values), values, s=12, color=_INK, zorder=3)
        # Above the highest dot, which would hide a part of it.
        label = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{mean:.0f} %", (place, max(values)), fontsize=10, color=_INK, **label)
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 25))
    return axes.figure


def line_chart(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    colors: Mapping[str, str],
    *,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float],
    width: int,
) -> Figure:
    """A line for each name.

    Args:
        lines: name -> (x values, y values).
        colors: name -> color.
        x_label, y_label: what the axes show, with the unit.
        y_range: lower and upper end of the y axis, so that charts side by side can share one.
        width: CSS pixels.
    """
    axes = _axes(width)
    for name, (x, y) in lines.items():
        axes.plot(x, y, color=colors[name], linewidth=2, marker="o", markersize=4, label=name)
    axes.set_xlabel(x_label, color=_MUTED, fontsize=9)
    axes.set_ylabel(y_label, color=_MUTED, fontsize=9)
    axes.set_ylim(*y_range)
    axes.legend(frameon=False, labelcolor="linecolor", fontsize=9)
    return axes.figure


def _axes(width: int) -> Axes:
    size = (width / PIXELS_PER_INCH, _HEIGHT / PIXELS_PER_INCH)
    axes = Figure(figsize=size, layout="constrained", facecolor="white").add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_RULE)
    axes.tick_params(colors=_MUTED, length=0, labelsize=9)
    axes.grid(axis="y", color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes
