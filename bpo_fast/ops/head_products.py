"""The matrix products of a language-model head, with results in float32 (float64 for float64) whatever the operands.

16-bit operands multiply exactly; on a GPU the product is asked for in float32, on the CPU the operands are widened,
the head a slice at a time. Nothing is rounded to 16 bits on the way.
"""

import torch

from bpo_fast.ops.rows import accumulation_dtype

# On the CPU a 16-bit head is widened in slices of this many rows.
WIDENED_ROWS = 8192


def _vocabulary_slices(weight):
    """The head whole; a 16-bit head on the CPU in slices, so that never more than a slice is held in float32."""
    widened = weight.element_size() < 4 and not weight.is_cuda
    step = WIDENED_ROWS if widened else len(weight)
    return [slice(start, min(start + step, len(weight))) for start in range(0, len(weight), step)]


def _multiply(a, b, out, add):
    """out <- a @ b, or out + a @ b."""
    if a.is_cuda and a.dtype != out.dtype:
        if add:
            return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    a, b = a.to(out.dtype), b.to(out.dtype)
    return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)


def fill_logits_(logits, hidden, weight, add=False):
    """logits [n, V] <- hidden [n, H] @ weight [V, H]^T, or that added to them."""
    for vocabulary in _vocabulary_slices(weight):
        _multiply(hidden, weight[vocabulary].t(), logits[:, vocabulary], add)


def times_head(gradient, weight):
    """gradient [n, V] @ weight [V, H]; the gradient is in the accumulation dtype or in that of the weight."""
    rows = gradient.new_empty(len(gradient), weight.shape[1], dtype=accumulation_dtype(weight.dtype))
    for number, vocabulary in enumerate(_vocabulary_slices(weight)):
        part, head = gradient[:, vocabulary], weight[vocabulary]
        # The CPU keeps gradients of 16-bit heads in float32.
        _multiply(part, head.to(part.dtype), rows, add=number > 0)
    return rows


def add_head_gradient_(grad_weight, gradient, hidden):
    """grad_weight [V, H] += gradient [n, V]^T @ hidden [n, H]."""
    _multiply(gradient.t(), hidden.to(gradient.dtype), grad_weight, add=True)


def target_logits(hidden, weight, targets, bias):
    """hidden [n, H] . weight[targets] + bias[targets], [n], differentiable in all three.

    Products of 16-bit numbers are exact in float32, and summed there.
    """
    dtype = accumulation_dtype(hidden.dtype)
    logits = (hidden.to(dtype) * torch.nn.functional.embedding(targets, weight).to(dtype)).sum(1)
    return logits if bias is None else logits + bias[targets].to(dtype)
