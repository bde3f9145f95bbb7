"""Charts show the numbers they are given, in text that can be read at the size they are shown at."""

from itertools import pairwise

import pytest
from matplotlib.text import Text

from bpo_fast.report.figures import PIXELS_PER_INCH, bar_chart, line_chart
from bpo_fast.report.page import NARROW

COLORS = {"first": "#111111", "second": "#222222"}


def bars(width=300):
    return bar_chart({"first": [10.0, 30.0], "second": [40.0]}, COLORS, width=width)


def lines(width=300):
    return line_chart(
        {"first": ([0, 5, 10], [1.0, 2.0, 3.0]), "second": ([0, 5, 10], [3.0, 2.5, 0.5])},
        COLORS,
        x_label="step",
        y_label="nats",
        y_range=(0, 4),
        width=width,
    )


def test_a_bar_is_the_mean_and_a_dot_each_of_several_values():
    (axes,) = bars().axes
    assert [bar.get_height() for bar in axes.patches] == [20.0, 40.0]
    assert [label.get_text() for label in axes.texts] == ["20 %", "40 %"]
    (dots,) = axes.collections
    assert dots.get_offsets().tolist() == [[0, 10], [0, 30]]


def test_a_line_goes_through_its_points():
    (axes,) = lines().axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [
        [[0, 1], [5, 2], [10, 3]],
        [[0, 3], [5, 2.5], [10, 0.5]],
    ]
    assert axes.get_ylim() == (0, 4)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["first", "second"]


@pytest.mark.parametrize("draw", [bars, lines])
@pytest.mark.parametrize("width", [280, 640])
def test_text_is_at_least_12_pixels_high_and_within_the_chart(draw, width):
    figure = draw(width)
    assert figure.get_size_inches()[0] * PIXELS_PER_INCH == pytest.approx(width)
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_text()]
    assert len(texts) > 6
    assert min(text.get_fontsize() for text in texts) / 72 * PIXELS_PER_INCH >= 12
    drawn = figure.get_tightbbox()  # in inches, of what can be seen
    assert drawn.x0 >= 0
    assert drawn.y0 >= 0
    assert drawn.x1 <= figure.get_size_inches()[0]
    assert drawn.y1 <= figure.get_size_inches()[1]


def test_labels_of_four_bars_stand_side_by_side_on_a_phone():
    names = ("Before", "SFT on chosen", "BPO on errors", "BPO")
    (axes,) = bar_chart({name: [50.0] for name in names}, dict.fromkeys(names, "#111111"), width=NARROW).axes
    axes.figure.draw_without_rendering()
    labels = axes.get_xticklabels()
    assert [label.get_text().replace("\n", " ") for label in labels] == list(names)
    boxes = [label.get_window_extent() for label in labels]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
