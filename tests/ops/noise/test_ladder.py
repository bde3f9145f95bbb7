"""add_noise_ladder: each level is add_noise of that step, bit for bit; its gradient, its refusals."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bpo_fast import NoiseSchedule, add_noise
from bpo_fast.ops.noise.ladder import add_noise_ladder

SIGMOID = NoiseSchedule.sigmoid()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def one_by_one(x, steps, **options):
    return torch.stack([add_noise(x, int(step), schedule=SIGMOID, **options) for step in steps])


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30, deadline=None)
@given(
    samples=st.integers(1, 4),
    n=st.integers(1, 700),
    seed=st.integers(-(2**63), 2**63 - 1),
    steps=st.lists(st.integers(0, 999), min_size=1, max_size=5),
    data=st.data(),
)
def test_levels_are_add_noise(dtype, samples, n, seed, steps, data):
    x = make(samples, n, dtype=dtype)
    ids = torch.tensor(data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=samples, max_size=samples)))
    expected = one_by_one(x, steps, seed=seed, sample_ids=ids)
    assert torch.equal(add_noise_ladder(x, steps, schedule=SIGMOID, seed=seed, sample_ids=ids), expected)
    for b in range(samples):
        alone = add_noise_ladder(x[b : b + 1], steps, schedule=SIGMOID, seed=seed, sample_ids=ids[b : b + 1])
        assert torch.equal(alone[:, 0], expected[:, b])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_and_units_change_nothing(threads):
    x, before = make(2, 3, 20_001, dtype=torch.bfloat16), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = add_noise_ladder(x, (5, 995), schedule=SIGMOID, seed=8)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, one_by_one(x, (5, 995), seed=8))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
def test_steps_may_be_a_tensor(dtype):
    x, steps = make(2, 9), torch.tensor([999, 3, 3], dtype=dtype)
    assert torch.equal(add_noise_ladder(x, steps, schedule=SIGMOID, seed=1), one_by_one(x, steps, seed=1))


@pytest.mark.parametrize("view", [lambda t: t[::2], lambda t: t.transpose(1, 2), lambda t: t[:1].expand(4, -1, -1)])
def test_strides_of_x(view):
    x = view(make(6, 5, 8))
    expected = one_by_one(x.contiguous(), [1, 700], seed=9)
    assert torch.equal(add_noise_ladder(x, [1, 700], schedule=SIGMOID, seed=9), expected)


@pytest.mark.parametrize(
    "view", [lambda t: t[:, :, :8], lambda t: t[:, :, 1:9], lambda t: t[:, :, :8].transpose(0, 1)]
)
def test_strides_of_out(view):
    memory = torch.zeros(3, 3, 10)
    out = view(memory)
    x = make(3, 8)
    assert add_noise_ladder(x, [1, 2, 900], schedule=SIGMOID, seed=9, out=out) is out
    assert torch.equal(out, one_by_one(x, [1, 2, 900], seed=9))
    assert int(memory.count_nonzero()) == out.numel()


@pytest.mark.parametrize(("shape", "steps"), [((0, 4), [1]), ((3, 0), [1]), ((3, 4), [])])
def test_empty(shape, steps):
    assert add_noise_ladder(torch.empty(shape), steps, schedule=SIGMOID, seed=0).shape == (len(steps), *shape)


@pytest.mark.parametrize("steps", [[300], [0, 500, 999], []])
def test_gradient(steps):
    x = make(3, 2, 5).requires_grad_()
    weight = make(len(steps), 3, 2, 5, seed=1)
    (add_noise_ladder(x, steps, schedule=SIGMOID, seed=4) * weight).sum().backward()
    kept = SIGMOID.alpha_bar[steps].sqrt().reshape(-1, 1, 1, 1)
    expected = (weight.double() * kept).sum(0)
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-6, atol=1e-6)


def test_gradient_is_summed_in_fp32_and_rounded_once():
    x = make(3, 64, dtype=torch.bfloat16).requires_grad_()
    weight, steps = make(6, 3, 64, seed=1, dtype=torch.bfloat16), [0, 100, 300, 500, 700, 900]
    add_noise_ladder(x, steps, schedule=SIGMOID, seed=4).backward(weight)
    exact = (weight.double() * SIGMOID.alpha_bar[steps].sqrt().reshape(-1, 1, 1)).sum(0)
    # Half a unit of bfloat16's last place, and fp32's rounding on top.
    assert bool(((x.grad.double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-6).all())


@pytest.mark.parametrize("ids", [False, True])
def test_opcheck(ids):
    arguments = (SIGMOID.table(), torch.tensor([1, 2, 900, 4]), torch.tensor([4, 5, 6]) if ids else None, 7)
    torch.library.opcheck(torch.ops.bpo_fast.add_noise_ladder, (make(3, 8).requires_grad_(), *arguments))
    torch.library.opcheck(torch.ops.bpo_fast.add_noise_ladder_out, (make(3, 8), *arguments, torch.empty(4, 3, 8)), {})


def test_no_graph_break_under_compile():
    def chain(x, steps, out):
        y = add_noise_ladder(x * 2, steps, schedule=SIGMOID, seed=3)
        add_noise_ladder(x, [3, 4], schedule=SIGMOID, seed=3, out=out)
        return (y.sum(0) * 2 + out[1]).sum()

    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    for steps in ([100, 200], torch.tensor([1, 2, 3])):
        x, out = make(3, 8), torch.empty(2, 3, 8)
        assert torch.equal(compiled(x, steps, out), chain(x, steps, torch.empty(2, 3, 8)))
        assert torch.equal(out, one_by_one(x, [3, 4], seed=3))


def test_gradient_under_compile():
    def loss(x):
        return (add_noise_ladder(x, [100, 900], schedule=SIGMOID, seed=3) ** 2).sum()

    x, y = make(3, 8).requires_grad_(), make(3, 8).requires_grad_()
    loss(x).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(y).backward()
    assert torch.equal(x.grad, y.grad)


X = make(3, 8)
EXPECTED_STEPS = "expected a list of ints or a tensor [K] of int64, int32, int16, uint8 or int8."
REFUSED = [
    ({"x": [1.0]}, TypeError, "x: found list, expected a tensor [B, ...] of float32, bfloat16 or float16."),
    ({"x": torch.tensor(1.0)}, ValueError, "x: found float32 [], expected [B, ...]."),
    ({"steps": [1, 1000]}, ValueError, "steps: found 1000, expected 0 to 999, the steps of the sigmoid"),
    ({"steps": torch.tensor([1, 1000])}, ValueError, "steps: found 1000, expected 0 to 999, the steps of the"),
    ({"steps": torch.tensor([-1, 5])}, ValueError, "steps: found -1, expected 0 to 999, the steps of the schedule."),
    ({"steps": torch.tensor([[1, 5]])}, ValueError, "steps: found int64 [1, 2], expected a list of ints or [K]."),
    ({"steps": torch.tensor([1.0])}, TypeError, f"steps: found float32 [1], {EXPECTED_STEPS}"),
    ({"steps": [1, 0.5]}, TypeError, f"steps: found list, {EXPECTED_STEPS}"),
    ({"steps": 7}, TypeError, f"steps: found int, {EXPECTED_STEPS}"),
    ({"schedule": "sigmoid"}, TypeError, "schedule: found str, expected a NoiseSchedule such as"),
    ({"seed": 1.0}, TypeError, "seed: found float, expected an int."),
    ({"sample_ids": torch.arange(2)}, ValueError, "sample_ids: found int64 [2], expected a list of ints or [3]."),
    ({"out": torch.empty(3, 8)}, ValueError, "out: found float32 [3, 8], expected [2, 3, 8]."),
    ({"out": torch.empty(2, 3, 8, dtype=torch.float16)}, TypeError, "out: found float16, expected float32 like x;"),
    ({"out": torch.empty(2, 8, 3).transpose(1, 2)}, ValueError, "out: found samples with gaps inside"),
    ({"out": torch.empty(2, 1, 8).expand(2, 3, 8)}, ValueError, "out: found samples that share memory"),
    ({"out": torch.empty(1, 3, 8).expand(2, 3, 8)}, ValueError, "out: found samples that share memory"),
    (
        {"x": X.clone().requires_grad_(), "out": torch.empty(2, 3, 8)},
        ValueError,
        "out: found x or out requiring a gradient, expected neither",
    ),
]


@pytest.mark.parametrize(("change", "error", "sentence"), REFUSED)
def test_refusals(change, error, sentence):
    arguments = {"x": X, "steps": [10, 20], "schedule": SIGMOID, "seed": 0, **change}
    with pytest.raises(error, match="^" + re.escape(sentence)) as caught:
        add_noise_ladder(arguments.pop("x"), arguments.pop("steps"), **arguments)
    assert "\n" not in str(caught.value)


def test_overlap_with_out_is_refused():
    memory = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match=r"^out: found memory that overlaps x, expected its own: x is read once"):
        add_noise_ladder(memory[0], [1, 2], schedule=SIGMOID, seed=0, out=memory)
