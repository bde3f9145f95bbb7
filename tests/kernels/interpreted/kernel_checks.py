"""Every Triton kernel under Triton's interpreter, through the ops, on the path that CUDA tensors take.

Run by test_interpreter.py in a process of its own: the interpreter is chosen when Triton is first imported.
"""

import pytest
import torch
import triton
from numerics import (
    assert_within_contract,
    draw_targets,
    eager_linear_token_logps,
    eager_statistics,
    eager_token_logps,
    final_logits,
    gradients,
)

from bpo_fast import dpo_loss, linear_token_logps, token_logps
from bpo_fast.kernels import heuristics, unit_exponentials, unit_gradient
from bpo_fast.kernels import sequence_logps as kernels
from bpo_fast.kernels import sigmoid_preference as preference_kernel
from bpo_fast.kernels.sequence_logps_backward import launch_sequence_logps_backward
from bpo_fast.kernels.unit_exponentials import launch_unit_exponentials
from bpo_fast.kernels.unit_gradient import launch_unit_gradient
from bpo_fast.losses import preference
from bpo_fast.losses.config import LossConfig
from bpo_fast.losses.preference import sequence_preference
from bpo_fast.ops import head_sweep
from bpo_fast.ops import token_logps as logits_op
from bpo_fast.ops import unit_gradient as head_op
from bpo_fast.ops.linear_token_logps import linear_logsumexp

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter casts to bfloat16 towards zero, a GPU to nearest: one unit in the last place.
BFLOAT16_CAST = {torch.bfloat16: 2**-7}
# One column; a few; a whole tile of float32; one more than a tile; three tiles, odd.
TILE = heuristics.row_launch(1, 10**6, 4, 0).columns
VOCAB_SIZES = [1, 5, TILE, TILE + 1, 2 * TILE + 907]


@pytest.fixture(autouse=True)
def processors(monkeypatch):
    """Sends everything but float64 to the kernels; the fixture's value pretends a GPU with that many processors."""
    assert triton.knobs.runtime.interpret
    for module in (logits_op, head_op, head_sweep, preference):
        monkeypatch.setattr(module, "runs_in_triton", lambda tensor: tensor.dtype != torch.float64)
    return lambda number: monkeypatch.setattr(logits_op, "num_processors", lambda tensor: number)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("transform", [{}, {"logit_softcap": 30.0, "temperature": 0.7}], ids=["plain", "transformed"])
def test_token_logps(dtype, vocab_size, scale, transform):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(2, 3, vocab_size, generator=generator) * scale).to(dtype)
    targets = draw_targets((2, 3), vocab_size, generator)
    targets[0, 0] = vocab_size - 1
    removed = torch.rand(vocab_size, generator=generator) < 0.3
    removed[targets[targets != -100]] = False
    logits = logits.masked_fill(removed, float("-inf"))
    upstream = torch.randn(2, 3, generator=generator)
    ours, (grad,) = gradients(lambda x: token_logps(x, targets, **transform), [logits], upstream)
    plain, (plain_grad,) = gradients(lambda x: eager_token_logps(x, targets, **transform), [logits], upstream)
    exact, (exact_grad,) = gradients(lambda x: eager_token_logps(x, targets, **transform), [logits.double()], upstream)
    assert_within_contract(ours, plain, exact)
    # Without a gradient the kernel leaves out what the backward pass reads, and nothing else.
    assert torch.equal(token_logps(logits, targets, **transform), ours)
    kept = targets != -100
    assert_within_contract(grad[kept], plain_grad[kept], exact_grad[kept], BFLOAT16_CAST.get(dtype, 0))
    assert not grad[~kept].any()
    copy = logits.clone().requires_grad_()
    logps = token_logps(copy, targets, inplace_backward=True, **transform)
    (over,) = torch.autograd.grad((logps * upstream).sum(), copy)
    assert over.data_ptr() == copy.data_ptr()
    assert torch.equal(over, grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_statistics(dtype, vocab_size, scale):
    generator = torch.Generator().manual_seed(vocab_size)
    # Few different values, so that some of the largest are equal.
    logits = (torch.randn(2, 3, vocab_size, generator=generator).mul(8).round() / 8 * scale).to(dtype)
    targets = draw_targets((2, 3), vocab_size, generator)
    logits[1] = logits[1].masked_fill(torch.rand(vocab_size, generator=generator) < 0.3, float("-inf"))
    logits[1, :, targets[1].clamp(min=0)] = 0
    targets[0, 1] = logits[0, 1].argmax()
    logps, found = token_logps(logits, targets, with_statistics=True, temperature=0.9)
    assert torch.equal(logps, token_logps(logits, targets, temperature=0.9))
    plain, exact = (eager_statistics(x, targets, temperature=0.9) for x in (logits, logits.double()))
    assert torch.equal(found.is_top1.double(), exact[1])
    for position in (0, 2, 3):
        assert_within_contract(found[position], plain[position], exact[position])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [24 * TILE + 5, 40 * TILE])
def test_a_row_in_parts(dtype, vocab_size, processors):
    generator = torch.Generator().manual_seed(vocab_size)
    logits, ref_logits = (torch.randn(2, 2, vocab_size, generator=generator).mul(4).to(dtype) for _ in range(2))
    # A part of nothing but -inf has no maximum to count from.
    logits[:, :, : 4 * TILE] = float("-inf")
    targets = torch.tensor([[vocab_size - 1, -100], [vocab_size - 7, vocab_size - 9]])
    whole = logits_op.sequence_logps(logits, ref_logits, targets, with_statistics=True)
    assert heuristics.row_launch(8, vocab_size, logits.element_size(), 132).splits > 1
    processors(132)
    parts = logits_op.sequence_logps(logits, ref_logits, targets, with_statistics=True)
    for ours, expected in zip((*parts[:4], *parts.statistics), (*whole[:4], *whole.statistics), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=2e-6)
    assert torch.equal(parts.num_tokens, whole.num_tokens)
    again = logits_op.sequence_logps(logits, logits.clone(), targets)
    assert torch.equal(again.token_logps, parts.token_logps)
    assert torch.equal(again.ref_logps, again.logps)
    alone = token_logps(logits, targets)
    torch.testing.assert_close(alone, whole.token_logps, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 6])
def test_policy_reference_and_sums_in_one_launch(dtype, num_tokens, monkeypatch):
    launches = []
    launch = kernels.launch_sequence_logps
    monkeypatch.setattr(kernels, "launch_sequence_logps", lambda *a, **k: (launches.append(1), launch(*a, **k)))
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = ((torch.randn(4, num_tokens, 301, generator=generator) * 3).to(dtype) for _ in range(2))
    targets = draw_targets((4, num_tokens), 301, generator)
    found = logits_op.sequence_logps(logits, ref_logits, targets)
    assert launches == [1]
    results = ((logits, found.token_logps, found.logps), (ref_logits, found.ref_token_logps, found.ref_logps))
    for source, tokens, sums in results:
        exact = eager_token_logps(source.double(), targets)
        torch.testing.assert_close(tokens.double(), exact, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(sums.double(), exact.sum(1), rtol=1e-6, atol=1e-5)
    assert torch.equal(found.num_tokens, (targets != -100).sum(1))
    same = logits_op.sequence_logps(logits, logits.clone(), targets)
    assert torch.equal(same.token_logps, same.ref_token_logps)
    assert torch.equal(same.logps, same.ref_logps)


def test_sequences_longer_than_one_block_of_the_sum(monkeypatch):
    monkeypatch.setattr(kernels, "TOKENS", 4)
    logits, targets = torch.randn(2, 11, 7), torch.randint(0, 7, (2, 11))
    found = logits_op.sequence_logps(logits, None, targets)
    torch.testing.assert_close(found.logps, found.token_logps.sum(1))


@pytest.mark.parametrize("average_logps", [False, True])
@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("num_pairs", [1, 3, 9])
def test_sigmoid_preference_is_the_loss_of_the_table(num_pairs, with_reference, average_logps, monkeypatch):
    monkeypatch.setattr(preference_kernel, "PAIRS", 4)
    generator = torch.Generator().manual_seed(num_pairs)
    logps = torch.randn(2 * num_pairs, generator=generator) * 50
    ref_logps = torch.randn(2 * num_pairs, generator=generator) * 50 if with_reference else None
    num_tokens = torch.randint(0, 5, (2 * num_pairs,), generator=generator)
    config = LossConfig(beta=0.3, label_smoothing=0.1, average_logps=average_logps)
    results = []
    # float64 goes through the table.
    for dtype in (torch.float32, torch.float64):
        leaf = logps.to(dtype).requires_grad_()
        reference = None if ref_logps is None else ref_logps.to(dtype)
        loss, rewards = sequence_preference(leaf, reference, num_tokens, config)
        results.append((loss, torch.autograd.grad(loss, leaf)[0], rewards))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact.double(), rtol=1e-5, atol=1e-6)


def test_dpo_loss_and_gradient():
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = (torch.randn(4, 5, 67, generator=generator) for _ in range(2))
    labels = draw_targets((4, 5), 67, generator)
    results = []
    for cast in (torch.float32, torch.float64):
        leaf = logits.to(cast).requires_grad_()
        output = dpo_loss(leaf, labels, ref_logits=ref_logits.to(cast))
        results.append((output.loss, torch.autograd.grad(output.loss, leaf)[0]))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("view", ["transposed", "sliced", "vocabulary not contiguous"])
def test_strides(view):
    base = torch.randn(6, 5, 14)
    logits = {
        "transposed": base.transpose(0, 1),
        "sliced": base[1:, ::2, 1:],
        "vocabulary not contiguous": base[:, :, ::2],
    }[view]
    targets = torch.randint(0, logits.shape[-1], logits.shape[:-1])

    def view_of(x):
        return x.as_strided(logits.shape, logits.stride(), logits.storage_offset())

    ones = torch.ones(targets.shape)
    ours, (grad,) = gradients(lambda x: token_logps(view_of(x), targets), [base], ones)
    exact, (exact_grad,) = gradients(lambda x: eager_token_logps(view_of(x), targets), [base.double()], ones)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-6, atol=1e-6)


def test_targets_that_are_a_view_at_an_odd_offset():
    # Labels are often read one place further on: a view that is neither packed nor aligned to 16 bytes.
    logits, labels = torch.randn(3, 6, 50), torch.randint(0, 50, (3, 7))
    found = logits_op.sequence_logps(logits, None, labels[:, 1:])
    torch.testing.assert_close(found.token_logps, eager_token_logps(logits, labels[:, 1:]), rtol=1e-5, atol=1e-5)


def test_rows_beyond_two_to_the_31_elements():
    # The stride fits 32 bits, the third token's offset does not; only its own pages of the 4 GiB are ever touched.
    stride = 2**30 + 64
    logits = torch.empty(2 * stride + 32, dtype=torch.float16).as_strided((1, 3, 32), (stride, stride, 1))
    logits.copy_(torch.randn(1, 3, 32))
    targets = torch.tensor([[3, 31, 7]])
    found = logits_op.sequence_logps(logits, None, targets)
    exact = eager_token_logps(logits.double(), targets)
    torch.testing.assert_close(found.token_logps.double(), exact, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found.logps.double(), exact.sum(1), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("options", ["plain", "everything"])
def test_linear_token_logps(dtype, vocab_size, options, monkeypatch):
    monkeypatch.setattr(head_sweep, "chunk_rows", lambda *_: 2)
    generator = torch.Generator().manual_seed(vocab_size)
    shapes = [(5, 16), (vocab_size, 16)]
    transform = {}
    if options == "everything":
        shapes += [(vocab_size,), (2, 16), (vocab_size, 2)]
        transform = {"logit_softcap": 5.0, "temperature": 0.7}
    inputs = [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]
    targets = draw_targets((5,), vocab_size, generator)
    targets[0] = vocab_size - 1
    upstream = torch.randn(5, generator=generator)

    def call(function, tensors, **keywords):
        hidden, weight, *rest = tensors
        keywords |= transform | ({"bias": rest[0], "lora": (*rest[1:], 0.5)} if rest else {})
        return function(hidden, weight, targets, **keywords)

    def ours(*tensors):
        return call(linear_token_logps, tensors)

    def eager(*tensors):
        return call(eager_linear_token_logps, tensors)

    logps, grads = gradients(ours, inputs, upstream)
    plain, plain_grads = gradients(eager, inputs, upstream)
    exact, exact_grads = gradients(eager, [x.double() for x in inputs], upstream)
    assert_within_contract(logps, plain, exact)
    for grad, plain_grad, exact_grad in zip(grads, plain_grads, exact_grads, strict=True):
        assert_within_contract(grad, plain_grad, exact_grad, BFLOAT16_CAST.get(dtype, 0))
    with torch.no_grad():
        assert torch.equal(ours(*inputs), logps)
    (_, found), (_, expected) = (
        call(linear_token_logps, tensors, with_statistics=True) for tensors in (inputs, [x.double() for x in inputs])
    )
    # In 16 bits the adapter's own rows are rounded before the head sees them, in plain PyTorch as here.
    tolerance = 1e-5 if dtype == torch.float32 or options == "plain" else 0.05
    for position in (0, 2, 3):
        torch.testing.assert_close(found[position].double(), expected[position], rtol=tolerance, atol=tolerance)


def one_pass(logits, targets, bias=None, softcap=None, temperature=1.0):
    """logps, statistics, row_scale, target_scale and exponentials of the kernel that reads logits once."""
    logps, row_scale, target_scale = torch.empty(3, len(logits))
    exponentials, statistics = torch.empty(logits.shape, dtype=torch.bfloat16), torch.empty(4, len(logits))
    outputs = (logps, row_scale, target_scale, statistics)
    launch_unit_exponentials(logits, exponentials, targets, bias, *outputs, softcap, temperature)
    return logps, statistics, row_scale, target_scale, exponentials


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("transform", [{}, {"softcap": 30.0, "temperature": 0.2}], ids=["plain", "transformed"])
def test_one_pass_whatever_the_first_tile_holds(vocab_size, transform):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(8, vocab_size, generator=generator)
    first, targets = min(TILE, vocab_size - 1), torch.randint(0, vocab_size, (8,), generator=generator)
    targets[4:6] = torch.tensor([vocab_size - 1, 0])
    logits[1, :first] -= 100.0  # exp(100) is no float32
    logits[2, :first] = float("-inf")
    logits[3] *= 1e4
    logits[4, -1], logits[5, 0] = 13.0, 13.0  # 1 - p of 2e-4 and more: in bfloat16 it would be 0
    logits[6, :first] -= 39.0  # high above the first tile, and still written once
    logits[7] -= 1e4
    bias = torch.randn(vocab_size, generator=generator).bfloat16() if transform else None
    logps, statistics, row_scale, target_scale, exponentials = one_pass(logits, targets, bias, **transform)
    leaf = logits.double() if bias is None else logits.double() + bias.double()
    leaf.requires_grad_()
    cap, temperature = transform.get("softcap"), transform.get("temperature", 1.0)
    exact = eager_token_logps(leaf, targets, cap, temperature)
    (expected,) = torch.autograd.grad(exact.sum(), leaf)
    onehot = torch.nn.functional.one_hot(targets, vocab_size).bool()
    assert not exponentials[onehot].any()
    # Each element by itself: rounded once (the interpreter cuts off), or below what float32 tells from 0; the slope of
    # a cap, 1 - tanh^2, is as good as float32 is at 1.
    others = row_scale[:, None].double() * exponentials.double()
    p = torch.softmax(final_logits(leaf.detach(), cap, temperature), -1)
    allowed = 2**-7 * expected.abs() + (2**-18 * p if cap else 0) + 1e-30
    assert ((others - expected).abs() <= allowed)[~onehot].all()
    # Logits of 1e4, or times 5 after a cap, are themselves rounded.
    slack = (2**-22 * logits.abs().amax(1).clamp(min=1.0).nan_to_num(posinf=1.0) / temperature).clamp(max=1e-2)
    slack[2] = 1e-6
    target_error = (target_scale.double() - expected[onehot]).abs()
    assert (target_error <= 1e-5 * expected[onehot].abs() + slack).all()
    # The same bits of what is not a gradient as from the kernel that reads twice, and of each row by itself.
    two_pass, two_pass_statistics = torch.empty(8), torch.empty(4, 8)
    outputs = (bias, None, two_pass, two_pass_statistics)
    launch_unit_gradient(logits.clone(), None, targets, *outputs, cap, temperature)
    assert torch.equal(logps, two_pass)
    assert torch.equal(statistics, two_pass_statistics)
    for row in range(8):
        here = slice(row, row + 1)
        alone = one_pass(logits[here], targets[here], bias, **transform)
        beside = (logps[here], statistics[:, here], row_scale[here], target_scale[here], exponentials[here])
        for ours, expected in zip(alone, beside, strict=True):
            assert torch.equal(ours, expected)


def test_one_pass_is_for_bfloat16_and_what_is_scaled_takes_two(monkeypatch):
    launched = []

    def spy(module, name):
        launch = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: (launched.append(name), launch(*a, **k))[1])

    spy(unit_exponentials, "launch_unit_exponentials")
    spy(unit_gradient, "launch_unit_gradient")
    for dtype in DTYPES:
        hidden, weight = torch.randn(3, 8).to(dtype).requires_grad_(), torch.randn(50, 8).to(dtype)
        linear_token_logps(hidden, weight, torch.tensor([0, -100, 49])).sum().backward()
    assert launched == ["launch_unit_gradient", "launch_unit_exponentials", "launch_unit_gradient"]
    launched.clear()
    weight = torch.randn(50, 8).bfloat16().requires_grad_()
    linear_token_logps(
        torch.randn(3, 8).bfloat16().requires_grad_(), weight, torch.tensor([0, 7, 49])
    ).sum().backward()
    assert launched == ["launch_unit_exponentials", "launch_unit_gradient"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_sum_exp_of_a_shard(dtype):
    hidden, weight, upstream = torch.randn(3, 8).to(dtype), torch.randn(500, 8).to(dtype), torch.randn(3)

    def eager(h, w):
        return torch.logsumexp(h @ w.t(), -1)

    ours, grads = gradients(linear_logsumexp, [hidden, weight], upstream)
    plain, plain_grads = gradients(eager, [hidden, weight], upstream)
    exact, exact_grads = gradients(eager, [hidden.double(), weight.double()], upstream)
    assert_within_contract(ours, plain, exact)
    for grad, plain_grad, exact_grad in zip(grads, plain_grads, exact_grads, strict=True):
        assert_within_contract(grad, plain_grad, exact_grad, BFLOAT16_CAST.get(dtype, 0))


def test_gradient_of_a_nearly_certain_target_is_not_rounded_to_zero():
    logits = torch.zeros(1, 100, dtype=torch.bfloat16)
    logits[0, 7] = 13.0
    _, (grad,) = gradients(lambda x: token_logps(x, torch.tensor([7])), [logits], torch.ones(1))
    assert abs(grad[0, 7].double() / (1 - torch.softmax(logits.double(), -1)[0, 7]) - 1) < 2**-7


def test_unusual_rows():
    infinity = float("inf")
    logits = torch.tensor([[-infinity] * 3, [0.0, -infinity, 0.0], [float("nan"), 0.0, 0.0], [1.0, 2.0, 3.0]])
    targets = torch.tensor([0, 1, 1, -100])
    ours = token_logps(logits, targets)
    torch.testing.assert_close(ours, eager_token_logps(logits, targets), equal_nan=True)


@pytest.mark.parametrize("transform", [{}, {"logit_softcap": 30.0, "temperature": 0.7}], ids=["plain", "transformed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace_backward", [False, True])
def test_a_target_outside_the_vocabulary_gives_nan_as_log_prob_and_as_gradient(dtype, inplace_backward, transform):
    # The first column past the vocabulary, one before it, one past 32 bits; a good one and an ignored one beside them.
    targets = torch.tensor([[4, -1, 2**40], [3, -100, 0]])
    lost = torch.tensor([[True, True, True], [False, False, False]])
    logits = torch.zeros(2, 3, 4, dtype=dtype)
    logits[0, :, 1] = float("-inf")
    options = {"inplace_backward": inplace_backward, **transform}
    logps, (grad,) = gradients(lambda x: token_logps(x * 1, targets, **options), [logits], torch.ones(2, 3))
    assert torch.equal(logps.isnan(), lost)
    assert torch.equal(grad.isnan(), lost[..., None].expand(grad.shape))
    assert not grad[1, 1].any()
    # From sums: the sequence that holds such a target is lost with it, its neighbour's gradient is not.
    leaf = logits.clone().requires_grad_()
    sums = logits_op.sequence_logps(leaf, None, targets).logps
    assert sums.isnan().tolist() == [True, False]
    (grad,) = torch.autograd.grad(sums.sum(), leaf)
    assert torch.equal(grad.isnan(), lost[..., None].expand(grad.shape))
    inputs = [torch.ones(2, 3, 8, dtype=dtype), torch.ones(4, 8, dtype=dtype), torch.zeros(4, dtype=dtype)]

    def linear(hidden, weight, bias):
        return linear_token_logps(hidden, weight, targets, bias=bias, **transform)

    logps, (grad, *head_grads) = gradients(linear, inputs, torch.ones(2, 3))
    assert torch.equal(logps.isnan(), lost)
    assert torch.equal(grad.isnan(), lost[..., None].expand(grad.shape))
    assert not grad[1, 1].any()
    assert all(head_grad.isnan().all() for head_grad in head_grads)


@pytest.mark.parametrize("splits", [1, 4])
def test_any_launch_gives_the_same_values(splits):
    vocab_size = 16 * TILE + 5
    logits, targets = torch.randn(1, 3, vocab_size), torch.tensor([[7, 0, vocab_size - 1]])
    rule = heuristics.row_launch(3, vocab_size, 4, 0, aligned=False)
    launch = rule._replace(columns=2 * rule.columns, vector=2 * rule.vector, unroll=4, num_warps=4, splits=splits)
    options = {"softcap": None, "temperature": 1.0, "launch": launch}
    logps, row_numbers, grad_logits = torch.empty(1, 1, 3), torch.empty(2, 1, 3), torch.empty_like(logits)
    outputs = dict.fromkeys(("policy_sums", "reference_sums", "num_targets", "statistics"))
    outputs |= {"token_logps": logps, "row_numbers": row_numbers, "num_processors": 0}
    assert kernels.launch_sequence_logps(logits, None, targets, **outputs, **options) == launch
    exact = eager_token_logps(logits.double(), targets)
    torch.testing.assert_close(logps[0].double(), exact, rtol=1e-6, atol=1e-5)
    tensors, grads = (logits, targets, row_numbers, grad_logits), {"grad_token_logps": torch.ones(1, 3)}
    assert launch_sequence_logps_backward(*tensors, **grads, grad_sums=None, **options) == launch
    exact_grad = torch.nn.functional.one_hot(targets, vocab_size) - logits.double().softmax(-1)
    torch.testing.assert_close(grad_logits.double(), exact_grad, rtol=1e-5, atol=1e-6)
    chunk, unit_logps = logits[0].clone(), torch.empty(3)
    tensors = (chunk, chunk, targets[0], None, None, unit_logps, None, None, 1.0)
    assert launch_unit_gradient(*tensors, launch=launch) == launch
    torch.testing.assert_close(chunk.double(), exact_grad[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(unit_logps.double(), exact[0], rtol=1e-6, atol=1e-5)
