"""Under autocast the ops compute as without it: the contract's precision is theirs to choose."""

import pytest
import torch

from bpo_fast import linear_token_logps, token_logps
from bpo_fast.ops.precision import autocast_dtype, without_autocast


def operands(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).to(dtype) for n in (9, 500))
    return hidden.requires_grad_(), weight, torch.randint(0, 500, (9,), generator=generator)


def float64_logps(hidden, weight, targets, delta=0):
    logits = hidden.double() @ weight.double().t() + delta
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("trained", [False, True])
def test_logits_from_hidden_states_are_not_rounded(trained):
    hidden, weight, targets = operands()
    weight.requires_grad_(trained)
    wanted = [hidden, weight] if trained else [hidden]
    with torch.autocast("cpu", torch.bfloat16):
        logps = linear_token_logps(hidden, weight, targets)
        grads = torch.autograd.grad(logps.sum(), wanted)
    expected = float64_logps(hidden, weight, targets)
    # Logits of about 8 rounded to bfloat16 are off by 0.03.
    torch.testing.assert_close(logps.double(), expected, rtol=0, atol=1e-5)
    for grad, exact in zip(grads, torch.autograd.grad(expected.sum(), wanted), strict=True):
        torch.testing.assert_close(grad.double(), exact.double(), rtol=2**-7, atol=1e-4)


def test_an_adapter_on_the_head_is_neither_rounded_nor_refused():
    hidden, weight, targets = operands()
    generator = torch.Generator().manual_seed(1)
    lora_A, lora_B = (torch.randn(*shape, generator=generator).requires_grad_() for shape in ((4, 64), (500, 4)))
    with torch.autocast("cpu", torch.bfloat16):
        logps = linear_token_logps(hidden, weight, targets, lora=(lora_A, lora_B, 0.5))
    expected = float64_logps(
        hidden, weight, targets, 0.5 * hidden.double() @ lora_A.double().t() @ lora_B.double().t()
    )
    torch.testing.assert_close(logps.double(), expected, rtol=0, atol=3e-5)
    for x in (lora_A, lora_B):
        (grad,), (exact,) = (torch.autograd.grad(y.sum(), x, retain_graph=True) for y in (logps, expected))
        torch.testing.assert_close(grad.double(), exact.double(), rtol=1e-4, atol=1e-4)


def test_statistics_of_logits_have_the_same_bits():
    logits = torch.randn(7, 300, generator=torch.Generator().manual_seed(2)) * 5
    targets = torch.arange(7)
    plain = token_logps(logits, targets, with_statistics=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = token_logps(logits, targets, with_statistics=True)
    torch.testing.assert_close(inside[0], plain[0], rtol=0, atol=0)
    for mine, theirs in zip(inside[1], plain[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_the_dtype_of_autocast():
    floats = {dtype: torch.zeros(1, dtype=dtype) for dtype in (torch.float32, torch.float16, torch.float64)}
    assert [autocast_dtype(x) for x in floats.values()] == list(floats)
    with torch.autocast("cpu", torch.bfloat16):
        assert [autocast_dtype(x) for x in floats.values()] == [torch.bfloat16, torch.bfloat16, torch.float64]
        assert autocast_dtype(torch.zeros(1, dtype=torch.int64)) == torch.int64
        assert autocast_dtype(torch.zeros(1, device="meta")) == torch.float32
        with without_autocast(floats[torch.float32]):
            assert autocast_dtype(floats[torch.float32]) == torch.float32
    with without_autocast(torch.zeros(1, device="meta")):
        pass
