"""The op under `linear_token_logps`: chunks of logits to log-probs and unit-gradient rows, and the head's gradient.

Unit-gradient rows: log p_t = log softmax(W h_t)[y_t] has d log p_t / d h_t = W[y_t] - p_t W, whatever the loss. So
while a chunk's logits are live in the forward pass they are turned in place into (onehot - p) and multiplied by W
once; the backward pass only scales row t of the [N, H] result. Work for N tokens: 4 N H V operations forward and
backward, 2 N H V when no gradient is wanted. A head that is trained takes a second sweep, in the backward pass.

A LoRA adapter on the head is a second pair of operands, W h + B z with z = scaling * A h: z gets unit-gradient rows of
its own, (onehot - p) B, and PyTorch takes its gradient on to A and h. The head is never merged with the adapter, and z
and B are in the accumulation dtype.
"""

import torch
from torch import Tensor

from bpo_fast.ops.checks import IGNORE_INDEX, check_target_range
from bpo_fast.ops.head_products import add_head_gradient_, fill_logits_, times_head
from bpo_fast.ops.rows import accumulation_dtype, block_rows, exponentiate, final_logits_, runs_in_triton

# Float32 logits of a chunk of tokens: on the CPU this many bytes, on a GPU this share of its memory, but at least as
# many bytes as below. 1/128 is 384 MiB of a 48 GB card, 640 MiB of an 80 GB one.
CPU_SCRATCH_BYTES = 128 << 20
GPU_SCRATCH_BYTES = 256 << 20
GPU_SCRATCH_SHARE = 128
# A chunk is whole tiles of the matrix product, and enough of them that the product does not wait for the head's bytes.
TILE_ROWS = 128
LEAST_ROWS = 256


def chunk_rows(vocab_size, dtype, device):
    """Most rows of a chunk: whole tiles whose logits, of `dtype`, fit the budget; never fewer than LEAST_ROWS."""
    budget = CPU_SCRATCH_BYTES
    if device.type == "cuda":
        budget = max(GPU_SCRATCH_BYTES, torch.cuda.get_device_properties(device).total_memory // GPU_SCRATCH_SHARE)
    rows = budget // (dtype.itemsize * vocab_size)
    return max(LEAST_ROWS, rows // TILE_ROWS * TILE_ROWS)


def _whole_tiles(rows):
    """The next multiple of TILE_ROWS."""
    return -(-rows // TILE_ROWS) * TILE_ROWS


def token_chunks(num_tokens, most):
    """Slices of tokens, as few as `most` rows allow and about equally long, in whole tiles where `most` is."""
    count = -(-num_tokens // most)
    tile = min(TILE_ROWS, most)
    step = min(most, -(-num_tokens // max(1, count * tile)) * tile)
    return [slice(start, min(start + step, num_tokens)) for start in range(0, num_tokens, step or 1)]


class _Transform:
    """From logits to log-probs and unit gradients, with the options that every chunk of a call shares."""

    def __init__(self, bias, softcap, temperature):
        self.bias, self.softcap, self.temperature = bias, softcap, temperature

    def __call__(self, logits, targets, scale, dtype, statistics):
        """Log-probs [n] of a chunk of logits [n, V], whose memory is used up; fills `statistics` [4, n] where given.

        With `dtype` (else None) also scale * (onehot - p) * slope of the final logits, [n, V]: on CUDA in that dtype,
        on the CPU in the accumulation dtype. Without targets: minus the log-sum-exp, and its gradient.
        """
        logps = logits.new_empty(len(logits))
        if runs_in_triton(logits):
            from bpo_fast.kernels.unit_gradient import launch_unit_gradient

            gradient = None if dtype is None else logits.view(dtype)[:, : logits.shape[1]]
            launch_unit_gradient(
                logits, gradient, targets, self.bias, scale, logps, statistics, self.softcap, self.temperature
            )
            return logps, gradient
        step = block_rows(logits.shape[1])
        for start in range(0, len(logits), step):
            block = slice(start, start + step)
            rows, row_targets = logits[block], None if targets is None else targets[block]
            row_statistics = None if statistics is None else statistics[:, block]
            if self.bias is not None:
                rows += self.bias
            slope = final_logits_(rows, self.softcap, self.temperature, with_slope=dtype is not None)
            logps[block], _, row_sum = exponentiate(rows, row_targets, rows, row_statistics)
            if dtype is None:
                continue
            rows.div_(-row_sum)
            if targets is not None:
                rows.scatter_add_(1, row_targets[:, None], torch.ones_like(row_sum))
            if slope is not None:
                rows.mul_(slope)
            if scale is not None:
                rows.mul_(scale[block, None])
        return logps, logits


def _kept(targets, dense):
    """Indices of the tokens that meet the head, None if all of them do: no targets, or `dense` promises so."""
    if targets is None or dense:
        return None
    kept = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    return None if len(kept) == len(targets) else kept


def _take(tensor, kept):
    return tensor if tensor is None or kept is None else tensor[kept]


def _spread(values, kept, num_tokens):
    """values [..., n] at the places `kept` of zeros [..., num_tokens]."""
    if kept is None:
        return values
    return values.new_zeros(*values.shape[:-1], num_tokens).index_copy_(-1, kept, values)


def _spread_rows(rows, kept, num_tokens):
    return rows if kept is None else rows.new_zeros(num_tokens, rows.shape[1]).index_copy_(0, kept, rows)


def _logits_of_chunks(hidden, weight, low_rank, low_rank_weight):
    """(slice of tokens, their logits) of each chunk; the next chunk's logits take the same memory."""
    dtype = accumulation_dtype(hidden.dtype)
    chunks = token_chunks(len(hidden), chunk_rows(len(weight), dtype, hidden.device))
    buffer = hidden.new_empty(chunks[0].stop if chunks else 0, len(weight), dtype=dtype)
    for chunk in chunks:
        logits = buffer[: chunk.stop - chunk.start]
        fill_logits_(logits, hidden[chunk], weight)
        if low_rank is not None:
            fill_logits_(logits, low_rank[chunk], low_rank_weight, add=True)
        yield chunk, logits


def _sweep(hidden, weight, targets, low_rank, low_rank_weight, transform, with_rows, statistics):
    """logps [n], rows [n, H] and low-rank rows [n, r] (or None) of tokens that all meet the head, chunk by chunk."""
    dtype = accumulation_dtype(hidden.dtype)
    logps = hidden.new_empty(len(hidden), dtype=dtype)
    rows = low_rank_rows = None
    if with_rows:
        rows = torch.empty_like(hidden, dtype=dtype)
        low_rank_rows = None if low_rank is None else torch.empty_like(low_rank)
    for chunk, logits in _logits_of_chunks(hidden, weight, low_rank, low_rank_weight):
        logps[chunk], gradient = transform(
            logits,
            None if targets is None else targets[chunk],
            None,
            hidden.dtype if with_rows else None,
            None if statistics is None else statistics[:, chunk],
        )
        if with_rows:
            rows[chunk] = times_head(gradient, weight)
            if low_rank is not None:
                low_rank_rows[chunk] = times_head(gradient, low_rank_weight)
    return logps, rows, low_rank_rows


def _stacked_sweep(hidden, ref_hidden, weight, targets, low_rank, low_rank_weight, transform, with_rows, statistics):
    """`_sweep` of policy and reference rows in one product, which reads the head once: for few rows.

    Both halves begin at a whole tile and run through the same steps, so equal hidden states give equal log-probs.
    """
    dtype, count = accumulation_dtype(hidden.dtype), len(hidden)
    half = _whole_tiles(count)
    both = hidden.new_zeros(2 * half, hidden.shape[1])
    both[:count], both[half : half + count] = hidden, ref_hidden
    logits = hidden.new_empty(2 * half, len(weight), dtype=dtype)
    fill_logits_(logits, both, weight)
    policy, reference = logits[:count], logits[half : half + count]
    ref_logps, _ = transform(reference, targets, None, None, None)
    if low_rank is not None:
        fill_logits_(policy, low_rank, low_rank_weight, add=True)
    logps, gradient = transform(policy, targets, None, hidden.dtype if with_rows else None, statistics)
    rows = times_head(gradient, weight) if with_rows else None
    low_rank_rows = times_head(gradient, low_rank_weight) if with_rows and low_rank is not None else None
    return logps, ref_logps, rows, low_rank_rows


@torch.library.custom_op("bpo_fast::linear_token_logps", mutates_args=())
def linear_token_logps_op(
    hidden: Tensor,
    ref_hidden: Tensor | None,
    weight: Tensor,
    targets: Tensor | None,
    bias: Tensor | None,
    low_rank: Tensor | None,
    low_rank_weight: Tensor | None,
    softcap: float | None,
    temperature: float,
    with_rows: bool,
    with_statistics: bool,
    dense: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logps [N], ref_logps [N], unit-gradient rows [N, H], low-rank rows [N, r], statistics [4, N].

    All in the accumulation dtype: rows in hidden's 16-bit dtype would be rounded twice, here and after the loss has
    scaled them. What is not asked for is empty. Without targets: minus the log-sum-exp.
    """
    num_tokens = len(hidden)
    if targets is not None:
        check_target_range(targets, len(weight))
    kept = _kept(targets, dense)
    hidden, ref_hidden, targets, low_rank = (_take(tensor, kept) for tensor in (hidden, ref_hidden, targets, low_rank))
    transform = _Transform(bias, softcap, temperature)
    dtype = accumulation_dtype(hidden.dtype)
    statistics = hidden.new_empty(4, len(hidden), dtype=dtype) if with_statistics else None
    arguments = (weight, targets, low_rank, low_rank_weight, transform, with_rows, statistics)
    if ref_hidden is not None and 2 * _whole_tiles(len(hidden)) <= chunk_rows(len(weight), dtype, hidden.device):
        logps, ref_logps, rows, low_rank_rows = _stacked_sweep(hidden, ref_hidden, *arguments)
    else:
        logps, rows, low_rank_rows = _sweep(hidden, *arguments)
        ref_logps = None
        if ref_hidden is not None:
            ref_logps, _, _ = _sweep(ref_hidden, weight, targets, None, None, transform, False, None)
    return (
        _spread(logps, kept, num_tokens),
        _spread(ref_logps, kept, num_tokens) if ref_hidden is not None else hidden.new_empty(0, dtype=dtype),
        _spread_rows(rows, kept, num_tokens) if with_rows else hidden.new_empty(0, dtype=dtype),
        hidden.new_empty(0, dtype=dtype) if low_rank_rows is None else _spread_rows(low_rank_rows, kept, num_tokens),
        _spread(statistics, kept, num_tokens) if with_statistics else hidden.new_empty(4, 0, dtype=dtype),
    )


@linear_token_logps_op.register_fake
def _(
    hidden,
    ref_hidden,
    weight,
    targets,
    bias,
    low_rank,
    low_rank_weight,
    softcap,
    temperature,
    with_rows,
    with_statistics,
    dense,
):
    num_tokens, dtype = len(hidden), accumulation_dtype(hidden.dtype)

    def empty(*shape):
        return hidden.new_empty(shape, dtype=dtype)

    return (
        empty(num_tokens),
        empty(0 if ref_hidden is None else num_tokens),
        empty(*hidden.shape) if with_rows else empty(0),
        empty(*low_rank.shape) if with_rows and low_rank is not None else empty(0),
        empty(4, num_tokens if with_statistics else 0),
    )


@torch.library.custom_op("bpo_fast::linear_token_logps_head_grad", mutates_args=())
def head_gradient_op(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    bias: Tensor | None,
    low_rank: Tensor | None,
    low_rank_weight: Tensor | None,
    softcap: float | None,
    temperature: float,
    with_weight: bool,
    dense: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad [N] of the log-probs -> gradients of weight [V, H], bias [V] and low_rank_weight [V, r].

    Empty are those of a weight that is frozen (not `with_weight`) and of what is None. The second sweep: the chunk's
    logits once more, (onehot - p) scaled by grad, and its product with the hidden states added up in float32, in the
    order of the chunks.
    """
    kept = _kept(targets, dense)
    hidden, targets, grad, low_rank = (_take(tensor, kept) for tensor in (hidden, targets, grad, low_rank))
    transform = _Transform(bias, softcap, temperature)
    dtype = accumulation_dtype(weight.dtype)
    grad_weight = torch.zeros(weight.shape if with_weight else (0,), dtype=dtype, device=weight.device)
    grad_bias = grad_weight.new_zeros(0 if bias is None else len(weight))
    grad_low_rank = grad_weight.new_zeros((0,) if low_rank is None else low_rank_weight.shape)
    for chunk, logits in _logits_of_chunks(hidden, weight, low_rank, low_rank_weight):
        chunk_targets = None if targets is None else targets[chunk]
        _, gradient = transform(logits, chunk_targets, grad[chunk], hidden.dtype, None)
        if with_weight:
            add_head_gradient_(grad_weight, gradient, hidden[chunk])
        if bias is not None:
            grad_bias += gradient.sum(0, dtype=dtype)
        if low_rank is not None:
            add_head_gradient_(grad_low_rank, gradient, low_rank[chunk])
    return grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), grad_low_rank


@head_gradient_op.register_fake
def _(
    grad,
    hidden,
    weight,
    targets,
    bias,
    low_rank,
    low_rank_weight,
    softcap,
    temperature,
    with_weight,
    dense,
):
    return (
        torch.empty(weight.shape if with_weight else (0,), dtype=weight.dtype, device=weight.device),
        weight.new_empty(0 if bias is None else len(weight)),
        weight.new_empty((0,) if low_rank is None else low_rank_weight.shape, dtype=accumulation_dtype(weight.dtype)),
    )


def _setup_context(ctx, inputs, output):
    hidden, _, weight, targets, bias, low_rank, low_rank_weight, ctx.softcap, ctx.temperature, _, _, ctx.dense = inputs
    ctx.hidden_dtype = hidden.dtype
    ctx.set_materialize_grads(False)
    ctx.head_is_trained = any(ctx.needs_input_grad[position] for position in (2, 4, 6))
    # Hidden states are kept for the second sweep alone; otherwise the unit-gradient rows are all that stays.
    head = (hidden, weight, targets, bias, low_rank, low_rank_weight) if ctx.head_is_trained else ()
    ctx.save_for_backward(output[2], output[3], *head)


def _backward(ctx, grad, *_):
    grads = [None] * 12
    if grad is None:
        return tuple(grads)
    rows, low_rank_rows, *head = ctx.saved_tensors
    if ctx.needs_input_grad[0]:
        grads[0] = (grad[:, None] * rows).to(ctx.hidden_dtype)
    if ctx.needs_input_grad[5]:
        grads[5] = grad[:, None] * low_rank_rows
    if ctx.head_is_trained:
        options = (ctx.softcap, ctx.temperature, ctx.needs_input_grad[2], ctx.dense)
        found = head_gradient_op(grad.contiguous(), *head, *options)
        for position, gradient in zip((2, 4, 6), found, strict=True):
            grads[position] = gradient if ctx.needs_input_grad[position] else None
    return tuple(grads)


linear_token_logps_op.register_autograd(_backward, setup_context=_setup_context)
