"""The numerics contract that every op is held to."""

import torch


def assert_within_contract(ours, plain, exact, relative=0.0):
    """The error of `ours` against float64 `exact` is at most twice that of plain PyTorch in the same dtype, plus 1e-4.

    Infinities must be the same ones, and ours must be NaN where the exact result is, nowhere else. `relative` allows
    that share of the largest exact value on top.
    """
    ours, plain = ours.detach().double(), plain.detach().double()
    assert ours.shape == exact.shape
    finite = exact.isfinite()
    torch.testing.assert_close(ours[~finite], exact[~finite], rtol=0, atol=0, equal_nan=True)
    assert ours[finite].isfinite().all()
    if finite.any():
        error = (ours - exact)[finite].abs().max()
        allowed = 2 * (plain - exact)[finite].nan_to_num(nan=0.0).abs().max() + 1e-4
        allowed += relative * exact[finite].abs().max()
        assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def final_logits(logits, logit_softcap=None, temperature=1.0):
    """What the softmax sees, in the dtype of `logits`."""
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return logits / temperature


def eager_token_logps(logits, targets, logit_softcap=None, temperature=1.0):
    """Plain PyTorch in the dtype of `logits`, in the order a reader would write it; ignored targets give 0."""
    logits = final_logits(logits, logit_softcap, temperature)
    ignored = targets == -100
    logps = torch.log_softmax(logits, -1).gather(-1, targets.masked_fill(ignored, 0)[..., None]).squeeze(-1)
    return torch.where(ignored, torch.zeros_like(logps), logps)


def eager_statistics(logits, targets, logit_softcap=None, temperature=1.0):
    """The four of `TokenStatistics`, stacked, from their definitions; ignored targets give 0."""
    logits = final_logits(logits, logit_softcap, temperature)
    logps = torch.log_softmax(logits, -1)
    p = logps.exp()
    values = torch.stack(
        [
            -torch.where(p > 0, p * logps, 0).sum(-1),
            (logits.argmax(-1) == targets).to(logits.dtype),
            p.square().sum(-1).log(),
            logits.mean(-1),
        ]
    )
    return torch.where(targets == -100, 0, values)


def eager_linear_token_logps(hidden, weight, targets, bias=None, logit_softcap=None, temperature=1.0, lora=None):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if lora is not None:
        lora_A, lora_B, scaling = lora
        logits = logits + scaling * (hidden @ lora_A.t()) @ lora_B.t()
    return eager_token_logps(logits, targets, logit_softcap, temperature)


def gradients(function, tensors, upstream):
    """Output of `function(*tensors)` and the gradients of sum(output * upstream), all on fresh leaves."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    return output, torch.autograd.grad((output * upstream.to(output.dtype)).sum(), leaves)


def draw_targets(shape, vocab_size, generator, ignored=0.3):
    targets = torch.randint(0, vocab_size, shape, generator=generator)
    return targets.masked_fill(torch.rand(shape, generator=generator) < ignored, -100)
