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
    eager_token_logps,
    gradients,
)

from bpo_fast import dpo_loss, linear_token_logps, token_logps
from bpo_fast.kernels import sequence_logps as kernels
from bpo_fast.ops import linear_token_logps as linear_op
from bpo_fast.ops import token_logps as logits_op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter casts to bfloat16 towards zero, a GPU to nearest: one unit in the last place.
BFLOAT16_CAST = {torch.bfloat16: 2**-7}
# One column; a few; a whole block; one more than a block; three blocks, odd.
VOCAB_SIZES = [1, 5, kernels.COLUMNS, kernels.COLUMNS + 1, 2 * kernels.COLUMNS + 907]


@pytest.fixture(autouse=True)
def triton_path(monkeypatch):
    assert triton.knobs.runtime.interpret
    for module in (logits_op, linear_op):
        monkeypatch.setattr(module, "runs_in_triton", lambda tensor: tensor.dtype != torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_token_logps(dtype, vocab_size, scale):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(2, 3, vocab_size, generator=generator) * scale).to(dtype)
    targets = draw_targets((2, 3), vocab_size, generator)
    targets[0, 0] = vocab_size - 1
    removed = torch.rand(vocab_size, generator=generator) < 0.3
    removed[targets[targets != -100]] = False
    logits = logits.masked_fill(removed, float("-inf"))
    upstream = torch.randn(2, 3, generator=generator)
    ours, (grad,) = gradients(lambda x: token_logps(x, targets), [logits], upstream)
    plain, (plain_grad,) = gradients(lambda x: eager_token_logps(x, targets), [logits], upstream)
    exact, (exact_grad,) = gradients(lambda x: eager_token_logps(x, targets), [logits.double()], upstream)
    assert_within_contract(ours, plain, exact)
    kept = targets != -100
    assert_within_contract(grad[kept], plain_grad[kept], exact_grad[kept], BFLOAT16_CAST.get(dtype, 0))
    assert not grad[~kept].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 6])
def test_policy_reference_and_sums_in_one_launch(dtype, num_tokens, monkeypatch):
    launches = []
    launch = kernels.launch_sequence_logps
    monkeypatch.setattr(kernels, "launch_sequence_logps", lambda *args: (launches.append(1), launch(*args)))
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = ((torch.randn(4, num_tokens, 301, generator=generator) * 3).to(dtype) for _ in range(2))
    targets = draw_targets((4, num_tokens), 301, generator)
    tokens, sums = logits_op.sequence_logps(logits, ref_logits, targets)
    assert launches == [1]
    for plane, source in enumerate((logits, ref_logits)):
        exact = eager_token_logps(source.double(), targets)
        torch.testing.assert_close(tokens[plane].double(), exact, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(sums[plane].double(), exact.sum(1), rtol=1e-6, atol=1e-5)
    same_tokens, same_sums = logits_op.sequence_logps(logits, logits.clone(), targets)
    assert torch.equal(same_tokens[0], same_tokens[1])
    assert torch.equal(same_sums[0], same_sums[1])


def test_sequences_longer_than_one_block_of_the_sum(monkeypatch):
    monkeypatch.setattr(kernels, "TOKENS", 4)
    logits, targets = torch.randn(2, 11, 7), torch.randint(0, 7, (2, 11))
    tokens, sums = logits_op.sequence_logps(logits, None, targets)
    torch.testing.assert_close(sums[0], tokens[0].sum(1))


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


def test_rows_beyond_two_to_the_31_elements():
    # The stride fits 32 bits, the third token's offset does not; only its own pages of the 4 GiB are ever touched.
    stride = 2**30 + 64
    logits = torch.empty(2 * stride + 32, dtype=torch.float16).as_strided((1, 3, 32), (stride, stride, 1))
    logits.copy_(torch.randn(1, 3, 32))
    targets = torch.tensor([[3, 31, 7]])
    tokens, sums = logits_op.sequence_logps(logits, None, targets)
    exact = eager_token_logps(logits.double(), targets)
    torch.testing.assert_close(tokens[0].double(), exact, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(sums[0].double(), exact.sum(1), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("options", ["plain", "bias and cap"])
def test_linear_token_logps(dtype, vocab_size, options, monkeypatch):
    monkeypatch.setattr(linear_op, "SCRATCH_BYTES", 4 * vocab_size * 2)
    generator = torch.Generator().manual_seed(vocab_size)
    inputs = [
        torch.randn(5, 16, generator=generator).to(dtype),
        torch.randn(vocab_size, 16, generator=generator).to(dtype),
    ]
    softcap = None
    if options == "bias and cap":
        inputs.append(torch.randn(vocab_size, generator=generator).to(dtype))
        softcap = 5.0
    targets = draw_targets((5,), vocab_size, generator)
    targets[0] = vocab_size - 1
    upstream = torch.randn(5, generator=generator)

    def eager(*tensors):
        return eager_linear_token_logps(*tensors[:2], targets, tensors[2] if softcap else None, softcap)

    def ours(*tensors):
        bias = tensors[2] if softcap else None
        return linear_token_logps(*tensors[:2], targets, bias=bias, logit_softcap=softcap)

    logps, grads = gradients(ours, inputs, upstream)
    plain, plain_grads = gradients(eager, inputs, upstream)
    exact, exact_grads = gradients(eager, [x.double() for x in inputs], upstream)
    assert_within_contract(logps, plain, exact)
    for grad, plain_grad, exact_grad in zip(grads, plain_grads, exact_grads, strict=True):
        assert_within_contract(grad, plain_grad, exact_grad, BFLOAT16_CAST.get(dtype, 0))
    with torch.no_grad():
        assert torch.equal(ours(*inputs), logps)


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


def test_a_target_that_cannot_be_checked_gives_nan_and_reads_nothing(monkeypatch):
    monkeypatch.setattr(logits_op, "check_target_range", lambda targets, vocab_size: None)
    ours = token_logps(torch.zeros(3, 4), torch.tensor([4, -1, 2**40]))
    assert ours.isnan().all()
