"""add_noise: its value, its independence of everything but (seed, sample id, element), its gradient, its refusals."""

import doctest
import math
import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bpo_fast.ops.noise.add
from bpo_fast import NoiseSchedule, add_noise
from bpo_fast.ops.noise import native

SIGMOID = NoiseSchedule.sigmoid()
PURE = NoiseSchedule([0.0], name="pure")  # one step that keeps nothing: add_noise gives eps itself
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and native.extension().cuda_built),
        reason="needs an NVIDIA GPU, a CUDA build of torch and bpo_fast._C with its CUDA half",
    ),
]


def make(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def eps_of(shape, *, seed=0, sample_ids=None):
    return add_noise(torch.zeros(shape), 0, schedule=PURE, seed=seed, sample_ids=sample_ids)


@pytest.mark.parametrize("step", [0, 500, 999])
def test_value_is_the_forward_step(step):
    x = make(3, 5, 7)
    signal, noise = SIGMOID.scales(step)
    expected = x.double() * signal + eps_of(x.shape, seed=11).double() * noise
    found = add_noise(x, step, schedule=SIGMOID, seed=11)
    torch.testing.assert_close(found.double(), expected, rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_share_one_stream(dtype):
    x = make(4, 333).to(dtype)
    exact = add_noise(x.float(), 700, schedule=SIGMOID, seed=3)
    assert torch.equal(add_noise(x, 700, schedule=SIGMOID, seed=3), exact.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(samples=st.integers(1, 6), n=st.integers(1, 700), seed=st.integers(-(2**63), 2**63 - 1), data=st.data())
def test_same_bits_in_any_batch_and_order(dtype, samples, n, seed, data):
    x = make(samples, n, dtype=dtype)
    ids = torch.tensor(data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=samples, max_size=samples)))
    steps = torch.tensor(data.draw(st.lists(st.integers(0, 999), min_size=samples, max_size=samples)))
    whole = add_noise(x, steps, schedule=SIGMOID, seed=seed, sample_ids=ids)
    order = torch.tensor(data.draw(st.permutations(range(samples))))
    permuted = add_noise(x[order], steps[order], schedule=SIGMOID, seed=seed, sample_ids=ids[order])
    assert torch.equal(permuted, whole[order])
    for b in range(samples):
        alone = add_noise(x[b : b + 1], int(steps[b]), schedule=SIGMOID, seed=seed, sample_ids=ids[b : b + 1])
        assert torch.equal(alone[0], whole[b])


def test_sample_ids_may_be_a_list():
    ids = [5, -1, 2**40]
    assert torch.equal(eps_of((3, 9), sample_ids=ids), eps_of((3, 9), sample_ids=torch.tensor(ids)))


def test_default_sample_ids_are_the_row_numbers():
    assert torch.equal(eps_of((5, 9)), eps_of((5, 9), sample_ids=torch.arange(5)))


def test_streams_differ():
    base = eps_of((1, 64))
    for other in (eps_of((1, 64), seed=1), eps_of((1, 64), seed=2**32), eps_of((1, 64), sample_ids=torch.tensor([1]))):
        assert bool((base != other).all())
    high = eps_of((2, 64), sample_ids=torch.tensor([1, 1 + 2**32]))
    assert bool((high[0] != high[1]).all())


def test_the_shape_of_a_sample_does_not_matter():
    assert torch.equal(eps_of((2, 4, 6)), eps_of((2, 24)).view(2, 4, 6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 3, 255, 256, 16385])
def test_in_place_and_out(dtype, n):
    x = make(3, n, dtype=dtype)
    expected = add_noise(x, 600, schedule=SIGMOID, seed=2)
    out = torch.empty_like(x)
    assert add_noise(x, 600, schedule=SIGMOID, seed=2, out=out) is out
    assert torch.equal(out, expected)
    version = x._version
    assert add_noise(x, 600, schedule=SIGMOID, seed=2, out=x) is x
    assert torch.equal(x, expected)
    assert x._version > version


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[::2],
        lambda t: t[:, 1:],
        lambda t: t.transpose(1, 2),
        lambda t: t[..., ::3],
        lambda t: t[:1].expand(6, -1, -1),
        lambda t: t.permute(2, 0, 1),
    ],
)
def test_strides_of_x(view):
    x = view(make(6, 5, 8))
    expected = add_noise(x.contiguous(), 400, schedule=SIGMOID, seed=9)
    found = add_noise(x, 400, schedule=SIGMOID, seed=9)
    assert torch.equal(found, expected)
    assert found.is_contiguous()


def test_strides_of_out():
    x = make(3, 8)
    expected = add_noise(x, 400, schedule=SIGMOID, seed=9)
    wide = torch.zeros(3, 10)
    add_noise(x, 400, schedule=SIGMOID, seed=9, out=wide[:, :8])
    assert torch.equal(wide[:, :8], expected)
    assert bool((wide[:, 8:] == 0).all())


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,)])
def test_empty(shape):
    x = torch.empty(shape)
    assert add_noise(x, 1, schedule=SIGMOID, seed=0).shape == shape
    assert add_noise(x, 1, schedule=SIGMOID, seed=0, out=x) is x


def test_one_dimension():
    assert torch.equal(eps_of((4,)), eps_of((4, 1))[:, 0])


@pytest.mark.parametrize("step", [300, torch.tensor([0, 999, 300], dtype=torch.int32)])
def test_gradient(step):
    x = make(3, 2, 5).requires_grad_()
    weight = make(3, 2, 5, seed=1)
    (add_noise(x, step, schedule=SIGMOID, seed=4) * weight).sum().backward()
    kept = SIGMOID.alpha_bar[step].sqrt().reshape(-1, 1, 1)
    torch.testing.assert_close(x.grad.double(), weight.double() * kept, rtol=1e-6, atol=0)


def draws(count, chunk=10_000_000):
    for first in range(0, count, chunk):
        yield eps_of((10, chunk // 10), seed=2024, sample_ids=torch.arange(10) + first).view(-1)


def test_statistics_of_1e8_draws():
    """Each statistic within 5 standard deviations of its own, as a standard normal's."""
    count, bins = 10**8, 256
    thresholds = [1, 2, 3, 4, 4.5, 5, 5.5]
    powers = torch.zeros(4, dtype=torch.float64)
    products = torch.zeros(4, dtype=torch.float64)
    cells = torch.zeros(bins, dtype=torch.int64)
    above = dict.fromkeys(thresholds, 0)
    largest = 0.0
    for z in draws(count):
        squares = z * z
        powers += torch.stack([t.sum(dtype=torch.float64) for t in (z, squares, squares * z, squares * squares)])
        products += torch.stack([(z[lag:] * z[:-lag]).sum(dtype=torch.float64) for lag in (1, 2, 3, 4)])
        cells += torch.histc(torch.special.ndtr(z), bins, 0, 1).long()
        for threshold in thresholds:
            above[threshold] += int((z.abs() > threshold).sum())
        largest = max(largest, z.abs().max().item())
    mean, second, third, fourth = (powers / count).tolist()
    root = math.sqrt(count)
    assert abs(mean) * root < 5
    assert abs(second - 1) * root / math.sqrt(2) < 5
    assert abs(third) * root / math.sqrt(15) < 5
    assert abs(fourth - 3) * root / math.sqrt(96) < 5
    assert products.abs().max().item() / root < 5  # neighbours at distance 1 to 4 are uncorrelated
    for threshold, found in above.items():
        expected = count * math.erfc(threshold / math.sqrt(2))
        assert abs(found - expected) < 5 * math.sqrt(expected), threshold
    assert 5.3 < largest < 6.77  # 1e8 draws of a normal stay below 5.3 once in 1e5 times
    chi_square = ((cells - count / bins) ** 2 / (count / bins)).sum().item()
    assert abs(chi_square - (bins - 1)) < 5 * math.sqrt(2 * (bins - 1))


def operands(*, steps, ids, requires_grad=False):
    x = make(3, 8).requires_grad_(requires_grad)
    table = SIGMOID.table() if steps else SIGMOID.table().narrow(0, 5, 1)
    return x, table, torch.tensor([1, 2, 900]) if steps else None, torch.tensor([4, 5, 6]) if ids else None, 7


@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("ids", [False, True])
def test_opcheck(steps, ids):
    torch.library.opcheck(torch.ops.bpo_fast.add_noise, operands(steps=steps, ids=ids, requires_grad=True))
    torch.library.opcheck(torch.ops.bpo_fast.add_noise_out, (*operands(steps=steps, ids=ids), torch.empty(3, 8)))


def test_no_graph_break_under_compile():
    def chain(x, step, ids):
        y = add_noise(x * 2, step, schedule=SIGMOID, seed=3, sample_ids=ids)
        return add_noise(y, 10, schedule=SIGMOID, seed=4, out=y) + 1

    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    x, ids = make(3, 8), torch.tensor([5, 6, 7])
    for step in (100, 200, torch.tensor([1, 2, 3])):
        assert torch.equal(compiled(x, step, ids), chain(x, step, ids))


def test_gradient_under_compile():
    def loss(x):
        return (add_noise(x, 300, schedule=SIGMOID, seed=3) ** 2).sum()

    x, y = make(3, 8).requires_grad_(), make(3, 8).requires_grad_()
    loss(x).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(y).backward()
    assert torch.equal(x.grad, y.grad)


X = make(3, 8)
INTEGERS = "int64, int32, int16, uint8 or int8"
REFUSED = [
    ({"x": [1.0]}, TypeError, "x: found list, expected a tensor [B, ...] of float32, bfloat16 or float16."),
    ({"x": X.double()}, TypeError, "x: found float64 [3, 8], expected a tensor [B, ...] of float32, bfloat16 or"),
    ({"x": torch.tensor(1.0)}, ValueError, "x: found float32 [], expected [B, ...]."),
    ({"x": X.to("meta")}, ValueError, "x: found on meta, expected on the CPU or a CUDA device."),
    ({"step": 1000}, ValueError, "step: found 1000, expected 0 to 999, the steps of the sigmoid schedule."),
    ({"step": -1}, ValueError, "step: found -1, expected 0 to 999, the steps of the sigmoid schedule."),
    ({"step": torch.tensor([0, 1, 1000])}, ValueError, "step: found 1000, expected 0 to 999, the steps of the"),
    ({"step": torch.tensor([0, -2, 5])}, ValueError, "step: found -2, expected 0 to 999, the steps of the schedule."),
    ({"step": torch.tensor([0, 1])}, ValueError, "step: found int64 [2], expected an int or [3]."),
    (
        {"step": torch.tensor([0.0, 1.0, 2.0])},
        TypeError,
        f"step: found float32 [3], expected an int or a tensor [3] of {INTEGERS}.",
    ),
    ({"step": 0.5}, TypeError, f"step: found float, expected an int or a tensor [3] of {INTEGERS}."),
    ({"step": True}, TypeError, f"step: found bool, expected an int or a tensor [3] of {INTEGERS}."),
    ({"schedule": "sigmoid"}, TypeError, "schedule: found str, expected a NoiseSchedule such as"),
    ({"seed": 2**63}, ValueError, f"seed: found {2**63}, expected -2**63 to 2**63 - 1."),
    ({"seed": 1.0}, TypeError, "seed: found float, expected an int."),
    ({"sample_ids": torch.arange(2)}, ValueError, "sample_ids: found int64 [2], expected a list of ints or [3]."),
    (
        {"sample_ids": torch.arange(3, dtype=torch.int32)},
        TypeError,
        "sample_ids: found int32 [3], expected a list of ints or a tensor [3] of int64.",
    ),
    ({"sample_ids": [0, 1]}, ValueError, "sample_ids: found int64 [2], expected a list of ints or [3]."),
    ({"sample_ids": [0, 1, 2**63]}, ValueError, f"sample_ids: found {2**63}, expected -2**63 to 2**63 - 1."),
    (
        {"sample_ids": [0, 1, 2.0]},
        TypeError,
        "sample_ids: found list, expected a list of ints or a tensor [3] of int64.",
    ),
    ({"out": torch.empty(3, 9)}, ValueError, "out: found float32 [3, 9], expected [3, 8]."),
    ({"out": torch.empty(3, 8, dtype=torch.bfloat16)}, TypeError, "out: found bfloat16, expected float32 like x;"),
    ({"out": torch.empty(3, 8, device="meta")}, ValueError, "out: found on meta, expected on the CPU or"),
    ({"out": torch.empty(8, 3).t()}, ValueError, "out: found samples with gaps inside (out[b] is not contiguous)"),
    ({"out": torch.empty(1, 8).expand(3, 8)}, ValueError, "out: found samples that share memory, as after expand(),"),
    ({"out": "y"}, TypeError, "out: found str, expected a tensor [3, 8] of float32, bfloat16 or float16."),
    (
        {"x": X.clone().requires_grad_(), "out": torch.empty(3, 8)},
        ValueError,
        "out: found x or out requiring a gradient, expected neither",
    ),
]


@pytest.mark.parametrize(("change", "error", "sentence"), REFUSED)
def test_refusals(change, error, sentence):
    arguments = {"x": X, "step": 10, "schedule": SIGMOID, "seed": 0, **change}
    with pytest.raises(error, match="^" + re.escape(sentence)) as caught:
        add_noise(arguments.pop("x"), arguments.pop("step"), **arguments)
    assert "\n" not in str(caught.value)


def test_overlap_with_out_is_refused():
    memory = torch.zeros(40)
    with pytest.raises(ValueError, match=r"^out: found memory that overlaps x, expected that of x itself or its own;"):
        add_noise(memory[:24].view(3, 8), 1, schedule=SIGMOID, seed=0, out=memory[8:32].view(3, 8))


def test_a_missing_extension_is_one_sentence(monkeypatch):
    native.extension.cache_clear()
    monkeypatch.setitem(sys.modules, "bpo_fast._C", None)
    with pytest.raises(
        ImportError, match=r"^bpo_fast\._C: found .*, expected .* run `pip install --force-reinstall --no-deps \.`"
    ) as caught:
        add_noise(X, 1, schedule=SIGMOID, seed=0)
    assert "\n" not in str(caught.value)


def test_a_missing_cuda_half_is_one_sentence(monkeypatch):
    class WithoutCuda:
        cuda_built = False

    monkeypatch.setattr(native, "extension", WithoutCuda)
    with pytest.raises(
        RuntimeError, match=r"^bpo_fast._C: found no CUDA half, expected .*; run BPO_FAST_CUDA=on pip install"
    ):
        native.cuda_extension()


@pytest.mark.parametrize("module", [bpo_fast.ops.noise.add, native])
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 3, 4, 1000, 1023, 100_001])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_cpu_and_cuda_bits_are_equal(device, dtype, n):
    x = make(5, n, dtype=dtype)
    x[0, 0] = float("nan")
    ids, steps = torch.tensor([0, -1, 2**40, 7, 3]), torch.tensor([0, 999, 500, 20, 700])
    raw = {torch.float32: torch.int32}.get(dtype, torch.int16)
    for step in (900, steps):
        on_cpu = add_noise(x, step, schedule=SIGMOID, seed=-5, sample_ids=ids)
        on_gpu = add_noise(x.to(device), step, schedule=SIGMOID, seed=-5, sample_ids=ids)
        assert torch.equal(on_gpu.cpu().view(raw), on_cpu.view(raw))
    wide = torch.zeros(5, n + 3, dtype=dtype, device=device)
    add_noise(x.to(device), 900, schedule=SIGMOID, seed=-5, sample_ids=ids, out=wide[:, 1 : n + 1])
    expected = add_noise(x, 900, schedule=SIGMOID, seed=-5, sample_ids=ids)
    assert torch.equal(wide[:, 1 : n + 1].cpu().view(raw), expected.view(raw))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_cuda_gradient_and_range_check(device):
    x = make(3, 8).to(device).requires_grad_()
    add_noise(x, 300, schedule=SIGMOID, seed=4).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, SIGMOID.scales(300)[0]))
    with pytest.raises(ValueError, match=r"^step: found 1000, expected 0 to 999"):
        add_noise(x, torch.tensor([1, 2, 1000], device=device), schedule=SIGMOID, seed=4)
