"""add_noise_rows: the same bits as gather, add_noise, cast and index_copy; clean copies; its refusals."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bpo_fast import NoiseSchedule, add_noise
from bpo_fast.ops.noise.rows import CLEAN, add_noise_rows

SIGMOID = NoiseSchedule.sigmoid()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def one_after_another(x, step, *, out, rows, seed=0, source=None, sample_ids=None):
    """What add_noise_rows does, in PyTorch and add_noise, on copies of everything."""
    source = torch.arange(len(x)) if source is None else source
    picked = x[source].float()
    step = torch.as_tensor(step).expand(len(picked))
    ids = source if sample_ids is None else sample_ids
    noised = add_noise(picked, step.clamp(min=0), schedule=SIGMOID, seed=seed, sample_ids=ids)
    values = torch.where((step == CLEAN).reshape(-1, 1, 1), picked, noised)
    return out.clone().index_copy_(0, rows.flatten(), values.to(out.dtype).flatten(0, 1))


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 300)),
    samples=st.integers(1, 4),
    seed=st.integers(-(2**63), 2**63 - 1),
    data=st.data(),
)
def test_same_bits_as_one_after_another(dtype, out_dtype, shape, samples, seed, data):
    images, tokens, width = shape
    x, out = make(*shape, dtype=dtype), make(samples * tokens + 3, width, dtype=out_dtype, seed=1)
    source = torch.tensor(data.draw(st.lists(st.integers(0, images - 1), min_size=samples, max_size=samples)))
    step = torch.tensor(data.draw(st.lists(st.integers(CLEAN, 999), min_size=samples, max_size=samples)))
    rows = torch.tensor(data.draw(st.permutations(range(len(out)))))[: samples * tokens]
    named = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=samples, max_size=samples).map(torch.tensor)
    ids = data.draw(st.none() | named)
    options = {"rows": rows, "seed": seed, "source": source, "sample_ids": ids}
    expected = one_after_another(x, step, out=out, **options)
    assert add_noise_rows(x, step, out=out, schedule=SIGMOID, **options) is out
    assert torch.equal(out, expected)


def test_threads_and_units_change_nothing():
    x, before = make(3, 5, 4099, dtype=torch.bfloat16), torch.get_num_threads()
    rows, made = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:15].view(3, 5), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            out = torch.zeros(20, 4099)
            made.append(add_noise_rows(x, 800, out=out, rows=rows, schedule=SIGMOID, seed=8))
        finally:
            torch.set_num_threads(before)
    expected = one_after_another(x, 800, out=torch.zeros(20, 4099), rows=rows, seed=8)
    assert all(torch.equal(out, expected) for out in made)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [CLEAN, torch.tensor([CLEAN])])
def test_clean_is_an_exact_cast(dtype, out_dtype, step):
    """Every 16-bit word, or fp32 values around every rounding boundary, infinities and NaN included."""
    words = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    if dtype == torch.float32:
        x = torch.cat([((words << 16) + low).view(torch.float32) for low in (-1, 0, 1, 0x7FFF, 0x8000, 0x1000, 0xFFF)])
    else:
        x = words.to(torch.int16).view(dtype)
    out = torch.zeros(x.numel() // 64, 64, dtype=out_dtype)
    options = {} if step is CLEAN else {"schedule": SIGMOID}
    add_noise_rows(x.view(1, -1, 64), step, out=out, rows=torch.arange(len(out)), **options)
    expected, found, nan = x.to(out_dtype), out.flatten(), x.isnan()
    raw, one_nan = (torch.int32, 0x7FFFFFFF) if out_dtype == torch.float32 else (torch.int16, 0x7FFF)
    assert torch.equal(found[~nan].view(raw), expected[~nan].view(raw))
    assert set(found[nan].view(raw).tolist()) == {one_nan}


def test_noise_of_an_image_is_its_own_by_default():
    """An image has the noise that add_noise gives its number, in any batch and at any place of the sequence."""
    x = make(6, 2, 8)
    out = torch.zeros(6, 8)
    add_noise_rows(x, 700, out=out, rows=torch.arange(6), source=torch.tensor([4, 1, 4]), schedule=SIGMOID, seed=3)
    expected = add_noise(x, 700, schedule=SIGMOID, seed=3)
    assert torch.equal(out.view(3, 2, 8), expected[[4, 1, 4]])


@pytest.mark.parametrize("index", [torch.int64, torch.int32, torch.int16])
def test_index_dtypes(index):
    x, out = make(3, 2, 8), torch.zeros(5, 8)
    options = {"rows": torch.tensor([[4, 0], [3, 1]]), "source": torch.tensor([2, 0])}
    expected = one_after_another(x, torch.tensor([9, CLEAN]), out=out, **options)
    options = {name: tensor.to(index) for name, tensor in options.items()}
    add_noise_rows(x, torch.tensor([9, CLEAN], dtype=index), out=out, schedule=SIGMOID, **options)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "view", [lambda t: t[::2], lambda t: t[..., ::2], lambda t: t.transpose(1, 2), lambda t: t[:, 1:]]
)
@pytest.mark.parametrize("source", [None, torch.tensor([1, 1, 0])])
def test_strides(view, source):
    x = view(make(4, 4, 4))
    samples = len(x) if source is None else len(source)
    memory = torch.zeros(samples * x.shape[1] + 1, x.shape[2] + 3)
    out = memory[:, 2 : 2 + x.shape[2]]
    rows = torch.arange(samples * x.shape[1], 0, -1)
    expected = one_after_another(x, 500, out=out, rows=rows, source=source)
    add_noise_rows(x, 500, out=out, rows=rows, source=source, schedule=SIGMOID)
    assert torch.equal(out, expected)
    assert int(memory.count_nonzero()) == out[1:].numel()


@pytest.mark.parametrize("shape", [(0, 2, 8), (2, 0, 8), (2, 2, 0)])
def test_empty(shape):
    out = torch.ones(4, shape[2])
    rows = torch.arange(shape[0] * shape[1])
    assert bool((add_noise_rows(torch.empty(shape), 5, out=out, rows=rows, schedule=SIGMOID) == 1).all())


def operands(*, steps, ids, source):
    table = SIGMOID.table() if steps else SIGMOID.table().narrow(0, 5, 1)
    return (
        make(2, 3, 8),
        table,
        torch.tensor([1, CLEAN]) if steps else None,
        torch.tensor([4, 5]) if ids else None,
        7,
        torch.tensor([1, 1]) if source else None,
        torch.tensor([0, 2, 4, 1, 3, 6]),
        torch.zeros(7, 8, dtype=torch.bfloat16),
    )


@pytest.mark.parametrize("given_all", [False, True])
def test_opcheck(given_all):
    arguments = operands(steps=given_all, ids=given_all, source=given_all)
    torch.library.opcheck(torch.ops.bpo_fast.add_noise_rows, arguments)


def test_no_graph_break_under_compile():
    def embed(table, ids, x, step, rows, source, schedule=SIGMOID):
        embeds = table[ids]
        return add_noise_rows(x, step, out=embeds, rows=rows, source=source, schedule=schedule, seed=3) * 2

    compiled = torch.compile(embed, fullgraph=True, backend="aot_eager")
    arguments = (make(9, 8), torch.arange(9) % 4, make(3, 2, 8, dtype=torch.bfloat16))
    places = (torch.tensor([1, 2, 7, 8]), torch.tensor([2, 0]))
    for step in (CLEAN, 100, torch.tensor([CLEAN, 999])):
        assert torch.equal(compiled(*arguments, step, *places), embed(*arguments, step, *places))
    assert torch.equal(compiled(*arguments, CLEAN, *places, None), embed(*arguments, CLEAN, *places, None))


X, OUT = make(3, 2, 8), torch.zeros(7, 8)
ROWS = torch.arange(6)
INTEGERS = "int64, int32, int16, uint8 or int8"
REFUSED = [
    ({"x": [1.0]}, TypeError, "x: found list, expected a tensor [N, M, H] of float32, bfloat16 or float16."),
    ({"x": X.double()}, TypeError, "x: found float64 [3, 2, 8], expected a tensor [N, M, H] of float32,"),
    ({"x": X[0]}, ValueError, "x: found float32 [2, 8], expected [N, M, H]."),
    ({"out": "y"}, TypeError, "out: found str, expected a tensor [S, 8] of float32, bfloat16 or float16."),
    ({"out": OUT[:, :7]}, ValueError, "out: found float32 [7, 7], expected [S, 8]."),
    ({"out": OUT.to("meta")}, ValueError, "out: found on meta, expected on the CPU or a CUDA device."),
    ({"out": torch.zeros(8, 7).t()}, ValueError, "out: found rows with gaps inside or that share memory, expected"),
    ({"out": torch.zeros(1, 8).expand(7, 8)}, ValueError, "out: found rows with gaps inside or that share memory,"),
    ({"out": OUT.clone().requires_grad_()}, ValueError, "out: found x or out requiring a gradient, expected neither"),
    ({"rows": ROWS[:5]}, ValueError, "rows: found int64 [5], expected [3, 2] or [6]."),
    ({"rows": ROWS + 2}, ValueError, "rows: found 7, expected 0 to 6, the rows of out."),
    ({"rows": ROWS - 1}, ValueError, "rows: found -1, expected 0 to 6, the rows of out."),
    (
        {"rows": torch.tensor([0, 1, 2, 4, 4, 5])},
        ValueError,
        "rows: found row 4 of out more than once, expected each row at most once.",
    ),
    ({"rows": ROWS.float()}, TypeError, f"rows: found float32 [6], expected a tensor [3, 2] or [6] of {INTEGERS}."),
    ({"rows": [0, 1]}, TypeError, f"rows: found list, expected a tensor [3, 2] or [6] of {INTEGERS}."),
    ({"source": torch.tensor([0, 3, 1])}, ValueError, "source: found 3, expected 0 to 2, the images of x."),
    ({"source": torch.tensor([[0, 3]])}, ValueError, "source: found int64 [1, 2], expected [B]."),
    ({"source": [0, 1, 2]}, TypeError, f"source: found list, expected a tensor [B] of {INTEGERS}."),
    ({"step": 1000}, ValueError, "step: found 1000, expected 0 to 999, the steps of the sigmoid schedule."),
    ({"step": -2}, ValueError, "step: found -2, expected 0 to 999, the steps of the sigmoid schedule."),
    ({"step": torch.tensor([0, 1, 1000])}, ValueError, "step: found 1000, expected -1 to 999, CLEAN (-1) or a step"),
    ({"step": torch.tensor([0, 1, -2])}, ValueError, "step: found -2, expected -1 to 999, CLEAN (-1) or a step of"),
    ({"step": torch.tensor([0, 1])}, ValueError, "step: found int64 [2], expected an int or [3]."),
    ({"step": 0.5}, TypeError, f"step: found float, expected an int or a tensor [3] of {INTEGERS}."),
    ({"schedule": None}, TypeError, "schedule: found NoneType, expected a NoiseSchedule such as"),
    ({"seed": 2**63}, ValueError, f"seed: found {2**63}, expected -2**63 to 2**63 - 1."),
    ({"sample_ids": torch.arange(2)}, ValueError, "sample_ids: found int64 [2], expected a list of ints or [3]."),
]


@pytest.mark.parametrize(("change", "error", "sentence"), REFUSED)
def test_refusals(change, error, sentence):
    arguments = {"x": X, "step": 10, "out": OUT, "rows": ROWS, "schedule": SIGMOID, **change}
    with pytest.raises(error, match="^" + re.escape(sentence)) as caught:
        add_noise_rows(arguments.pop("x"), arguments.pop("step"), **arguments)
    assert "\n" not in str(caught.value)


def test_overlap_with_out_is_refused():
    memory = torch.zeros(7, 8)
    with pytest.raises(ValueError, match=r"^out: found memory that overlaps x, expected its own"):
        add_noise_rows(memory[:6].view(3, 2, 8), 10, out=memory, rows=ROWS, schedule=SIGMOID)
