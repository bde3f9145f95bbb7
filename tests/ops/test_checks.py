"""The checks of arguments: what they let through, and the sentence for what they do not."""

import re

import pytest
import torch

from bpo_fast.ops import checks

FLOATS, INDICES = torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.int64)


@pytest.mark.parametrize("shape", [(3, 4), ("B", 4), ("...",), ("...", 4), ("B", "...", 4), (3, "..."), (3, 4, "...")])
def test_shapes_that_fit(shape):
    checks.check_tensor("x", FLOATS, shape)
    checks.check_indices("x", INDICES, (9, 9), shape)


@pytest.mark.parametrize(
    "shape", [(3,), (3, 4, 1), (4, 3), ("B", "T", "V"), ("...", 3), (4, "..."), ("A", "...", "B", "C"), ()]
)
def test_shapes_that_do_not_fit(shape):
    expected = re.escape(f"x: found float32 [3, 4], expected [{', '.join(map(str, shape))}].")
    with pytest.raises(ValueError, match=f"^{expected}$"):
        checks.check_tensor("x", FLOATS, shape)
    with pytest.raises(ValueError, match=r"^x: found int64 \[3, 4\], expected an int or \[5\] or \["):
        checks.check_indices("x", INDICES, (5,), shape, otherwise="an int")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: checks.check_tensor("x", INDICES, (9,)),
            "x: found int64 [3, 4], expected a tensor [9] of a floating-point dtype.",
        ),
        (
            lambda: checks.check_tensor("x", FLOATS, (3, 4), (torch.float16, torch.float64)),
            "x: found float32 [3, 4], expected a tensor [3, 4] of float16 or float64.",
        ),
        (
            lambda: checks.check_indices("x", INDICES.bool(), (3, 4)),
            "x: found bool [3, 4], expected a tensor [3, 4] of int64 or int32.",
        ),
        (
            lambda: checks.check_same("x", FLOATS, "y", FLOATS.half()),
            "x: found float32, expected float16 like y; cast one of them.",
        ),
    ],
)
def test_wrong_dtypes(call, sentence):
    with pytest.raises(TypeError, match=f"^{re.escape(sentence)}$"):
        call()


def test_same_leaves_integers_alone_but_not_devices():
    checks.check_same("x", INDICES, "y", FLOATS)
    with pytest.raises(ValueError, match=r"^x: found on cpu, expected on meta like y; move one of them\.$"):
        checks.check_same("x", INDICES, "y", FLOATS.to("meta"))


def test_ranges_name_the_first_tensor_out_of_range():
    inside, outside = torch.tensor([-1, 2]), torch.tensor([[0, 5], [3, -2]], dtype=torch.int32)
    checks.check_ranges([("a", inside, -1, 3, "rows"), ("b", None, 0, 0, "rows"), ("c", outside, -2, 6, "rows")])
    for low, past, found in ((0, 9, -2), (-2, 5, 5)):
        with pytest.raises(ValueError, match=rf"^c: found {found}, expected {low} to {past - 1}, rows of x\.$"):
            checks.check_ranges([("a", inside, -1, 3, "rows"), ("c", outside, low, past, "rows of x")])


@pytest.mark.parametrize(("value", "answer"), [(3, True), (-1, True), (True, False), (1.0, False), ("1", False)])
def test_is_int(value, answer):
    assert checks.is_int(value) is answer


def test_checks_do_not_pin_the_shapes_of_a_compiled_graph():
    graphs = []

    def function(x, targets):
        checks.check_tensor("x", x, ("...", "V"))
        checks.check_indices("targets", targets, x.shape[:-1])
        checks.check_same("targets", targets, "x", x)
        return x.sum()

    compiled = torch.compile(
        function, fullgraph=True, dynamic=True, backend=lambda graph, _: (graphs.append(1), graph.forward)[1]
    )
    for rows, width in ((3, 4), (5, 6), (7, 2)):
        compiled(torch.zeros(rows, width), torch.zeros(rows, dtype=torch.int64))
    assert len(graphs) == 1
