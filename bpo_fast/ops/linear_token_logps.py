"""Log-probabilities of target tokens straight from hidden states, without the logits of more than one chunk of tokens.

Unit-gradient rows: log p_t = log softmax(W h_t)[y_t] has d log p_t / d h_t = W[y_t] - p_t W, whatever the loss. So
while a chunk's logits are live in the forward pass they are turned in place into (onehot - p) and multiplied by W
once; the backward pass only scales row t of the [N, H] result. Work for N tokens: 4 N H V operations forward and
backward, 2 N H V when no gradient is wanted. A head that is trained takes a second sweep, in the backward pass.
"""

import torch
from torch import Tensor

from bpo_fast.ops.checks import IGNORE_INDEX, check_indices, check_same, check_target_range, check_tensor
from bpo_fast.ops.token_logps import accumulation_dtype, exponentiate_, row_blocks, runs_in_triton

# A chunk of tokens is what this many bytes of float32 logits hold: 512 tokens for a vocabulary of 128k, enough for the
# matrix products to run near their full speed.
SCRATCH_BYTES = 256 << 20
# On the CPU a 16-bit head is widened in slices of this many rows.
WIDENED_ROWS = 8192


def _token_chunks(num_tokens, vocab_size, element_size):
    """Slices of tokens, all but the last equally long, whose logits fit SCRATCH_BYTES."""
    most = max(1, SCRATCH_BYTES // (element_size * vocab_size))
    count = -(-num_tokens // most)
    step = -(-num_tokens // max(1, count))
    return [slice(start, min(start + step, num_tokens)) for start in range(0, num_tokens, step or 1)]


def _vocabulary_slices(weight):
    """The head whole; a 16-bit head on the CPU in slices, so that never more than a slice is held in float32."""
    widened = weight.element_size() < 4 and not weight.is_cuda
    step = WIDENED_ROWS if widened else len(weight)
    return [slice(start, min(start + step, len(weight))) for start in range(0, len(weight), step)]


def _product(a, b):
    """a @ b in the accumulation dtype: 16-bit operands multiply exactly and are summed, and kept, in float32."""
    dtype = accumulation_dtype(a.dtype)
    if a.dtype == b.dtype == dtype:
        return a @ b
    if a.is_cuda and a.dtype == b.dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def _fill_logits(logits, hidden, weight):
    """logits [n, V] <- hidden [n, H] @ weight [V, H]^T."""
    if hidden.dtype == logits.dtype:
        torch.mm(hidden, weight.t(), out=logits)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.t(), out_dtype=logits.dtype, out=logits)
    else:
        for vocabulary in _vocabulary_slices(weight):
            logits[:, vocabulary] = _product(hidden, weight[vocabulary].t())


def _times_head(gradient, weight):
    """gradient [n, V] @ weight [V, H], in the accumulation dtype."""
    slices = _vocabulary_slices(weight)
    rows = _product(gradient[:, slices[0]], weight[slices[0]])
    for vocabulary in slices[1:]:
        rows += _product(gradient[:, vocabulary], weight[vocabulary])
    return rows


def _unit_gradient_(logits, targets, bias, softcap, scale, dtype):
    """Log-probs [n] of a chunk of logits [n, V], whose memory is used up.

    With `dtype` (else None) also scale * (onehot - p) * slope of the cap, [n, V]: on CUDA in that dtype, on the CPU in
    the accumulation dtype.
    """
    if runs_in_triton(logits):
        from bpo_fast.kernels.unit_gradient import launch_unit_gradient

        logps = torch.empty_like(targets, dtype=logits.dtype)
        gradient = None if dtype is None else logits.view(dtype)[:, : logits.shape[1]]
        launch_unit_gradient(logits, gradient, targets, bias, scale, logps, softcap)
        return logps, gradient
    logps = torch.empty_like(targets, dtype=logits.dtype)
    for block in row_blocks(*logits.shape):
        rows, row_targets = logits[block], targets[block, None]
        slope = None
        if bias is not None:
            rows += bias
        if softcap is not None:
            rows.div_(softcap).tanh_()
            slope = None if dtype is None else rows.square().neg_().add_(1)
            rows.mul_(softcap)
        logps[block], _, row_sum = exponentiate_(rows, targets[block])
        if dtype is not None:
            rows.div_(-row_sum).scatter_add_(1, row_targets, torch.ones_like(row_sum))
            if slope is not None:
                rows.mul_(slope)
            if scale is not None:
                rows.mul_(scale[block, None])
    return logps, logits


def _kept(targets):
    """Indices of the tokens that meet the head."""
    return (targets != IGNORE_INDEX).nonzero().squeeze(1)


def _logits_buffer(hidden, weight, num_tokens):
    """Chunks of tokens and the float32 memory, [longest chunk, V], that the logits of each go through."""
    dtype = accumulation_dtype(hidden.dtype)
    chunks = _token_chunks(num_tokens, len(weight), dtype.itemsize)
    longest = chunks[0].stop if chunks else 0
    return chunks, torch.empty(longest, len(weight), dtype=dtype, device=hidden.device)


@torch.library.custom_op("bpo_fast::linear_token_logps", mutates_args=())
def _linear_token_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, with_rows: bool
) -> tuple[Tensor, Tensor]:
    """logps [N] and, if asked for, the unit-gradient rows [N, H], both in the accumulation dtype.

    Rows in hidden's 16-bit dtype would be rounded twice, here and after the loss has scaled them.
    """
    check_target_range(targets, len(weight))
    logps, rows = _linear_token_logps_fake(hidden, weight, targets, bias, softcap, with_rows)
    logps.zero_()
    kept = _kept(targets)
    if len(kept) < len(targets):
        rows.zero_()
        hidden, targets = hidden[kept], targets[kept]
    chunks, buffer = _logits_buffer(hidden, weight, len(kept))
    for chunk in chunks:
        logits = buffer[: chunk.stop - chunk.start]
        _fill_logits(logits, hidden[chunk], weight)
        dtype = hidden.dtype if with_rows else None
        logps[kept[chunk]], gradient = _unit_gradient_(logits, targets[chunk], bias, softcap, None, dtype)
        if with_rows:
            rows[kept[chunk]] = _times_head(gradient, weight).to(rows.dtype)
    return logps, rows


@_linear_token_logps.register_fake
def _linear_token_logps_fake(hidden, weight, targets, bias, softcap, with_rows):
    logps = hidden.new_empty(targets.shape, dtype=accumulation_dtype(hidden.dtype))
    return logps, torch.empty(hidden.shape if with_rows else (0,), dtype=logps.dtype, device=hidden.device)


@torch.library.custom_op("bpo_fast::linear_token_logps_head_grad", mutates_args=())
def _head_gradient(
    grad: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """grad [N] of the log-probs -> gradients of weight [V, H] and bias ([V], empty without one).

    The second sweep: the chunk's logits once more, (onehot - p) scaled by grad, and its product with the hidden states
    added up in float32, in the order of the chunks.
    """
    grad_weight = torch.zeros(weight.shape, dtype=accumulation_dtype(weight.dtype), device=weight.device)
    grad_bias = grad_weight.new_zeros(0 if bias is None else len(weight))
    kept = _kept(targets)
    hidden, targets, grad = hidden[kept], targets[kept], grad[kept]
    chunks, buffer = _logits_buffer(hidden, weight, len(kept))
    for chunk in chunks:
        logits = buffer[: chunk.stop - chunk.start]
        _fill_logits(logits, hidden[chunk], weight)
        _, gradient = _unit_gradient_(logits, targets[chunk], bias, softcap, grad[chunk], hidden.dtype)
        for vocabulary in _vocabulary_slices(weight):
            if gradient.dtype == hidden.dtype == grad_weight.dtype:
                grad_weight[vocabulary].addmm_(gradient[:, vocabulary].t(), hidden[chunk])
            else:
                grad_weight[vocabulary] += _product(gradient[:, vocabulary].t(), hidden[chunk])
        if bias is not None:
            grad_bias += gradient.sum(0, dtype=grad_bias.dtype)
    return grad_weight.to(weight.dtype), grad_bias.to(weight.dtype if bias is None else bias.dtype)


@_head_gradient.register_fake
def _head_gradient_fake(grad, hidden, weight, targets, bias, softcap):
    grad_bias = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device), grad_bias


def _setup_context(ctx, inputs, output):
    hidden, weight, targets, bias, ctx.softcap, _ = inputs
    ctx.hidden_dtype = hidden.dtype
    ctx.set_materialize_grads(False)
    head_is_trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
    # Hidden states are kept for the second sweep alone; otherwise the unit-gradient rows are all that stays.
    ctx.head_is_trained = head_is_trained
    ctx.save_for_backward(output[1], *((hidden, weight, targets, bias) if head_is_trained else ()))


def _backward(ctx, grad, _):
    if grad is None:
        return None, None, None, None, None, None
    rows, *head = ctx.saved_tensors
    grad_hidden = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_hidden = (grad[:, None] * rows).to(ctx.hidden_dtype)
    if ctx.head_is_trained:
        grad_weight, grad_bias = _head_gradient(grad.contiguous(), *head, ctx.softcap)
    return (
        grad_hidden,
        grad_weight if ctx.needs_input_grad[1] else None,
        None,
        grad_bias if ctx.needs_input_grad[3] else None,
        None,
        None,
    )


_linear_token_logps.register_autograd(_backward, setup_context=_setup_context)


def check_head(hidden_name, hidden, weight_name, weight, bias_name, bias, logit_softcap):
    """The checks that `linear_token_logps` and `linear_dpo_loss` share, under the names of the caller's arguments."""
    check_tensor(weight_name, weight, ("V", hidden.shape[-1]))
    check_same(weight_name, weight, hidden_name, hidden)
    if not len(weight):
        raise ValueError(f"{weight_name} must have at least one row, got V = 0.")
    if bias is not None:
        check_tensor(bias_name, bias, (len(weight),))
        check_same(bias_name, bias, hidden_name, hidden)
    if logit_softcap is not None and not logit_softcap > 0:
        raise ValueError(f"logit_softcap must be positive or None, got {logit_softcap}.")


def linear_token_logps(hidden, weight, targets, *, bias=None, logit_softcap=None):
    """Log-probability of each target token, log softmax(hidden @ weight.T + bias)[target], from hidden states.

    Never holds more logits than one chunk of tokens (256 MiB in float32). Tokens whose target is -100 do not meet the
    head at all. The logits are float32 for 16-bit inputs too: never rounded before the softmax.

    Args:
        hidden: float16, bfloat16, float32 or float64, [..., H].
        weight: the head, [V, H], of the same dtype and device.
        targets: int64 or int32, [...], the token that each row predicts (nothing is shifted here), in [0, V) or -100:
            such a row gives 0 and gets a gradient of 0.
        bias: [V] of the same dtype, or None.
        logit_softcap: cap c of logits c * tanh(logits / c) (Gemma 2), or None.

    Returns:
        float32 [...] (float64 for float64 inputs), in nats, differentiable in hidden, weight and bias. A weight or
        bias that asks for a gradient costs a second sweep in the backward pass; its gradient is summed in float32.

    Raises:
        TypeError: arguments that are no floating-point tensors, or of different dtypes; targets of no integer dtype.
        ValueError: shapes or devices that do not fit, a target outside the vocabulary, a cap that is not positive.

    >>> import torch
    >>> linear_token_logps(torch.ones(2, 3), torch.zeros(5, 3), torch.tensor([4, -100]))
    tensor([-1.6094,  0.0000])
    """
    if not isinstance(hidden, Tensor) or hidden.ndim < 1:
        raise ValueError("hidden must be a tensor of shape [..., H] with at least one dimension.")
    check_tensor("hidden", hidden, (*hidden.shape[:-1], "H"))
    check_indices("targets", targets, hidden.shape[:-1])
    check_same("targets", targets, "hidden", hidden)
    check_head("hidden", hidden, "weight", weight, "bias", bias, logit_softcap)
    return flat_linear_token_logps(hidden, weight, targets, bias, logit_softcap)


def flat_linear_token_logps(hidden, weight, targets, bias, logit_softcap):
    """`linear_token_logps` without its checks."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    row_targets = targets.reshape(-1).to(torch.int64).contiguous()
    with_rows = torch.is_grad_enabled() and hidden.requires_grad
    softcap = None if logit_softcap is None else float(logit_softcap)
    logps, _ = _linear_token_logps(rows, weight, row_targets, bias, softcap, with_rows)
    return logps.reshape(targets.shape)
