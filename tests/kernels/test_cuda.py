"""Real launches on an NVIDIA GPU, against the CPU path and float64."""

import pytest
import torch
from numerics import (
    assert_within_contract,
    draw_targets,
    eager_linear_token_logps,
    eager_statistics,
    eager_token_logps,
    gradients,
)

from bpo_fast import dpo_loss, linear_dpo_loss, linear_token_logps, token_logps
from bpo_fast.kernels.heuristics import row_launch
from bpo_fast.losses.config import LossConfig
from bpo_fast.losses.preference import sequence_preference
from bpo_fast.ops.rows import num_processors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of PyTorch"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCAB_SIZES = [1, 127, 2049, 32064, 128257]


@pytest.fixture(autouse=True)
def full_float32_products():
    # By hand: monkeypatch would delete the attribute at the end, which this module of PyTorch has no way to.
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_token_logps(dtype, vocab_size, scale):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(3, 7, vocab_size, generator=generator) * scale).to(dtype).cuda()
    targets = draw_targets((3, 7), vocab_size, generator).cuda()
    upstream = torch.randn(3, 7, generator=generator).cuda()
    ours, (grad,) = gradients(lambda x: token_logps(x, targets), [logits], upstream)
    plain, (plain_grad,) = gradients(lambda x: eager_token_logps(x, targets), [logits], upstream)
    exact, (exact_grad,) = gradients(lambda x: eager_token_logps(x, targets), [logits.double()], upstream)
    assert_within_contract(ours, plain, exact)
    assert_within_contract(grad, plain_grad, exact_grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_linear_token_logps(dtype, vocab_size, softcap):
    generator = torch.Generator().manual_seed(vocab_size)
    shapes = ((600, 64), (vocab_size, 64), (vocab_size,))
    inputs = [torch.randn(*shape, generator=generator).to(dtype).cuda() for shape in shapes]
    targets = draw_targets((600,), vocab_size, generator).cuda()
    upstream = torch.randn(600, generator=generator).cuda()
    ours, grads = gradients(
        lambda h, w, b: linear_token_logps(h, w, targets, bias=b, logit_softcap=softcap), inputs, upstream
    )

    def eager(h, w, b):
        return eager_linear_token_logps(h, w, targets, b, softcap)

    plain, plain_grads = gradients(eager, inputs, upstream)
    exact, exact_grads = gradients(eager, [x.double() for x in inputs], upstream)
    assert_within_contract(ours, plain, exact)
    for grad, plain_grad, exact_grad in zip(grads, plain_grads, exact_grads, strict=True):
        assert_within_contract(grad, plain_grad, exact_grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_do_not_depend_on_who_arrives_last(dtype):
    logits, ref_logits = (torch.randn(8, 700, 4001, device="cuda").to(dtype) for _ in range(2))
    labels = torch.randint(0, 4001, (8, 700), device="cuda")
    first = dpo_loss(logits.requires_grad_(), labels, ref_logits=ref_logits)
    (first_grad,) = torch.autograd.grad(first.loss, logits)
    for _ in range(20):
        again = dpo_loss(logits, labels, ref_logits=ref_logits)
        assert torch.equal(again.chosen_logps, first.chosen_logps)
        assert torch.equal(again.rejected_rewards, first.rejected_rewards)
    assert torch.equal(torch.autograd.grad(again.loss, logits)[0], first_grad)
    torch.testing.assert_close(first.chosen_logps, first.token_logps[:4].sum(1), rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_agree_with_the_cpu(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden, ref_hidden = (torch.randn(4, 50, 32, generator=generator).to(dtype) for _ in range(2))
    head = torch.randn(1003, 32, generator=generator).to(dtype)
    labels = draw_targets((4, 50), 1003, generator)
    on_cpu = linear_dpo_loss(hidden, head, labels, ref_hidden=ref_hidden)
    on_cuda = linear_dpo_loss(hidden.cuda(), head.cuda(), labels.cuda(), ref_hidden=ref_hidden.cuda())
    torch.testing.assert_close(on_cuda.token_logps.cpu(), on_cpu.token_logps, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(on_cuda.loss.cpu(), on_cpu.loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_policy_equal_to_reference_gives_margins_of_exactly_zero(dtype):
    logits, hidden = torch.randn(4, 30, 2003).to(dtype).cuda(), torch.randn(4, 30, 64).to(dtype).cuda()
    head, labels = torch.randn(2003, 64).to(dtype).cuda(), torch.randint(0, 2003, (4, 30)).cuda()
    outputs = (
        dpo_loss(logits.clone().requires_grad_(), labels, ref_logits=logits),
        linear_dpo_loss(hidden.clone().requires_grad_(), head, labels, ref_hidden=hidden),
    )
    for output in outputs:
        assert not output.chosen_rewards.any()
        assert not output.rejected_rewards.any()


@pytest.mark.gpu("several multiprocessors")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 4, 16])
def test_few_rows_of_a_large_vocabulary_are_split(dtype, num_rows):
    logits = torch.randn(num_rows, 128256, device="cuda").mul(3).to(dtype)
    targets = torch.randint(0, 128256, (num_rows,), device="cuda")
    assert row_launch(num_rows, 128256, logits.element_size(), num_processors(logits)).splits > 1
    logps, statistics = token_logps(logits, targets, with_statistics=True, temperature=0.8)
    exact = eager_token_logps(logits.double(), targets, temperature=0.8)
    torch.testing.assert_close(logps.double(), exact, rtol=1e-6, atol=1e-5)
    for ours, expected in zip(statistics, eager_statistics(logits.double(), targets, temperature=0.8), strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    for _ in range(20):
        assert torch.equal(token_logps(logits, targets, temperature=0.8), logps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_over_the_logits(dtype):
    logits, ref_logits = (torch.randn(4, 60, 32064, device="cuda").to(dtype) for _ in range(2))
    labels = torch.randint(0, 32064, (4, 60), device="cuda")
    labels[:, :20] = -100
    results = []
    for inplace_backward in (False, True):
        leaf = logits.clone().requires_grad_()
        output = dpo_loss(leaf, labels, ref_logits=ref_logits, inplace_backward=inplace_backward)
        results.append((output.loss, torch.autograd.grad(output.loss, leaf)[0]))
    assert results[1][1].data_ptr() == leaf.data_ptr()
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.gpu("Triton")
def test_targets_outside_the_vocabulary_give_rows_of_nan_and_read_nothing():
    targets = torch.tensor([4, -1, 2**40, 0, -100], device="cuda")
    lost = [True, True, True, False, False]
    logits, hidden = torch.zeros(5, 4, device="cuda"), torch.zeros(5, 8, device="cuda")
    weight, ones = torch.ones(4, 8, device="cuda"), torch.ones(5, device="cuda")
    for function, rows in ((token_logps, logits), (lambda h, t: linear_token_logps(h, weight, t), hidden)):
        logps, (grad,) = gradients(lambda x, function=function: function(x, targets), [rows], ones)
        assert logps.isnan().tolist() == lost
        assert grad.isnan().all(1).tolist() == grad.isnan().any(1).tolist() == lost
    # In float64 PyTorch's own steps run, which would read there: such targets are looked for.
    with pytest.raises(ValueError, match=r"^targets \(labels\): found 4, expected 0 to 3"):
        token_logps(logits.double(), targets)


@pytest.mark.parametrize("average_logps", [False, True])
def test_the_loss_in_one_launch_is_that_of_the_table(average_logps):
    logps, ref_logps = torch.randn(2, 600, device="cuda") * 30
    num_tokens = torch.randint(0, 9, (600,), device="cuda")
    config = LossConfig(label_smoothing=0.1, average_logps=average_logps)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaf = logps.to(dtype).requires_grad_()
        loss, rewards = sequence_preference(leaf, ref_logps.to(dtype), num_tokens, config)
        results.append((loss, rewards, torch.autograd.grad(loss, leaf)[0]))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu("6 GiB of memory")
def test_rows_beyond_two_to_the_31_elements():
    logits = torch.zeros(70_000, 32_064, dtype=torch.float16, device="cuda")
    logits[-1] = torch.randn(32_064)
    targets = torch.full((70_000,), -100, device="cuda")
    targets[-1] = 32_063
    exact = eager_token_logps(logits[-1:].double(), targets[-1:])
    torch.testing.assert_close(token_logps(logits, targets)[-1:].double(), exact, rtol=1e-6, atol=1e-5)
