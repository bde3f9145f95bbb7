"""A bar's length is its value: bars stand on linear axes from 0, and only points stand on logarithmic ones."""

import pytest
from benching import group, row
from matplotlib import pyplot


def groups():
    rows = {"bpo_fast": row(0.002, 10), "eager": row(0.4, 2000), "absent": {"missing": "CUDA only: no device"}}
    return {"tokens 256": group(**rows), "tokens 1024": group(**rows)}


@pytest.mark.parametrize("narrow", [False, True])
def test_bars_are_as_long_as_their_values_however_far_these_are_apart(narrow):
    from charts import bars

    figure = bars(groups(), narrow)
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert len(shown) == (2 if narrow else 4)
    for axis in shown:
        assert axis.get_xscale() == "linear"
        assert axis.get_xlim()[0] == 0
        widths = [bar.get_width() for bar in axis.patches]
        assert [bar.get_x() for bar in axis.patches] == [0, 0, 0]
        expected = [0.002, 0.4, 0] if "time" in axis.get_title() else [10, 2000, 0]
        assert widths == pytest.approx(expected)
        assert axis.texts[-1].get_text() == "CUDA only"
    pyplot.close(figure)


def test_a_sweep_on_logarithmic_axes_is_drawn_in_points_and_lines():
    from charts import lines

    figure = lines(
        {title: {**found, "rows": dict(list(found["rows"].items())[:2])} for title, found in groups().items()}
    )
    for axis, (ours, eager) in zip(figure.axes, (([2e-3] * 2, [0.4] * 2), ([10] * 2, [2000] * 2)), strict=True):
        assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
        assert not axis.patches
        assert [line.get_xydata().tolist() for line in axis.lines] == [
            [list(point) for point in zip((256, 1024), values, strict=True)] for values in (ours, eager)
        ]
    pyplot.close(figure)
