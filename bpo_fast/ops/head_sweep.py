"""The op under `linear_token_logps`: chunks of logits to log-probs and unit-gradient rows, and the head's gradient.

Unit-gradient rows: log p_t = log softmax(W h_t)[y_t] has d log p_t / d h_t = W[y_t] - p_t W, whatever the loss. So
while a chunk's logits are live in the forward pass they are turned in place into (onehot - p) and multiplied by W
once; the backward pass only scales row t of the [N, H] result. Work for N tokens: 4 N H V operations forward and
backward, 2 N H V when no gradient is wanted. A head that is trained takes a second sweep, in the backward pass.

A LoRA adapter on the head is a second pair of operands, W h + B z with z = scaling * A h: z gets unit-gradient rows of
its own, (onehot - p) B, and PyTorch takes its gradient on to A and h. The head is never merged with the adapter, and z
and B are in the accumulation dtype.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bpo_fast.ops.checks import IGNORE_INDEX, check_target_range
from bpo_fast.ops.head_products import add_head_gradient_, fill_logits_, times_head
from bpo_fast.ops.precision import precise
from bpo_fast.ops.rows import accumulation_dtype, num_processors, runs_in_triton
from bpo_fast.ops.unit_gradient import Head, logps_, unit_gradient, unit_gradient_

# Float32 logits of a chunk of tokens: on the CPU this many bytes, on a GPU this share of its memory, but at least as
# many bytes as below. 1/128 is 384 MiB of a 48 GB card, 640 MiB of an 80 GB one.
CPU_SCRATCH_BYTES = 128 << 20
GPU_SCRATCH_BYTES = 256 << 20
GPU_SCRATCH_SHARE = 128
# A chunk is whole tiles of the matrix product, and enough of them that the product does not wait for the head's bytes.
TILE_ROWS = 128
LEAST_ROWS = 256
# Columns of a tile of the second product, unit gradients [n, V] times the head [V, H]: cuBLAS's for large products.
TILE_COLUMNS = 256


class Tokens(NamedTuple):
    """n tokens: `hidden` [n, H]; `targets` int64 [n] or None; `low_rank` z [n, r] or None."""

    hidden: Tensor
    targets: Tensor | None
    low_rank: Tensor | None

    def at(self, where):
        """Those at a slice or at indices; all for None."""
        return self if where is None else Tokens(*(None if x is None else x[where] for x in self))


class Swept(NamedTuple):
    """What a sweep makes: log-probs [n]; unit-gradient rows [n, H] and low-rank rows [n, r], or None."""

    logps: Tensor
    rows: Tensor | None
    low_rank_rows: Tensor | None


class Arguments(NamedTuple):
    """The op's arguments by name; in its backward pass, which of them want a gradient, and the gradients."""

    hidden: Tensor | None = None
    ref_hidden: Tensor | None = None
    weight: Tensor | None = None
    targets: Tensor | None = None
    bias: Tensor | None = None
    low_rank: Tensor | None = None
    low_rank_weight: Tensor | None = None
    softcap: float | None = None
    temperature: float | None = None
    with_rows: bool | None = None
    with_statistics: bool | None = None
    dense: bool | None = None


class Outputs(NamedTuple):
    """The op's outputs by name, all in the accumulation dtype; what is not asked for is empty."""

    logps: Tensor
    ref_logps: Tensor
    rows: Tensor
    low_rank_rows: Tensor
    statistics: Tensor


def chunk_rows(vocab_size, dtype, device):
    """Most rows of a chunk: whole tiles whose logits, of `dtype`, fit the budget; never fewer than LEAST_ROWS."""
    budget = CPU_SCRATCH_BYTES
    if device.type == "cuda":
        budget = max(GPU_SCRATCH_BYTES, torch.cuda.get_device_properties(device).total_memory // GPU_SCRATCH_SHARE)
    rows = budget // (dtype.itemsize * vocab_size)
    return max(LEAST_ROWS, rows // TILE_ROWS * TILE_ROWS)


def _whole_tiles(rows):
    return -(-rows // TILE_ROWS) * TILE_ROWS


def waves(num_rows, width, num_processors):
    """How often all multiprocessors take a tile each until [num_rows, width] is done.

    >>> [waves(rows, 4096, 132) for rows in (128, 1024, 1152, 1280)]
    [1, 1, 2, 2]
    """
    return -(-(-(-num_rows // TILE_ROWS) * -(-width // TILE_COLUMNS)) // num_processors)


def token_chunks(num_tokens, most, width=0, num_processors=0):
    """Slices of tokens, at most `most` each, in whole tiles where `most` is.

    On a GPU of `num_processors` of such a length that the second product, `width` wide, takes the fewest waves in all;
    then, and elsewhere, as few as `most` allows and about equally long.

    >>> [chunk.stop - chunk.start for chunk in token_chunks(4000, 1280, 4096, 132)]
    [1024, 1024, 1024, 928]
    """
    count = -(-num_tokens // most)
    tile = min(TILE_ROWS, most)
    step = min(most, -(-num_tokens // max(1, count * tile)) * tile)
    if num_processors and count > 1:

        def cost(rows):
            whole, rest = divmod(num_tokens, rows)
            return whole * waves(rows, width, num_processors) + waves(rest, width, num_processors)

        # Of equal cost the longest, but no longer than evenly long chunks are.
        step = min([step, *range(most - most % tile, tile, -tile)], key=cost)
    return [slice(start, min(start + step, num_tokens)) for start in range(0, num_tokens, step or 1)]


def _kept(targets, dense):
    """Indices of the tokens that meet the head, None if all of them do: no targets, or `dense` promises so."""
    if targets is None or dense:
        return None
    kept = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    return None if len(kept) == len(targets) else kept


def _logits_of_chunks(tokens, head):
    """(slice of tokens, their logits) of each chunk; the next chunk's logits take the same memory."""
    dtype = accumulation_dtype(tokens.hidden.dtype)
    most = chunk_rows(len(head.weight), dtype, tokens.hidden.device)
    chunks = token_chunks(len(tokens.hidden), most, tokens.hidden.shape[1], num_processors(tokens.hidden))
    buffer = tokens.hidden.new_empty(chunks[0].stop if chunks else 0, len(head.weight), dtype=dtype)
    for chunk in chunks:
        logits = buffer[: chunk.stop - chunk.start]
        fill_logits_(logits, tokens.hidden[chunk], head.weight)
        if tokens.low_rank is not None:
            fill_logits_(logits, tokens.low_rank[chunk], head.low_rank_weight, add=True)
        yield chunk, logits


def _unit_rows(logits, targets, head, statistics):
    """`Swept` of a chunk's logits."""
    logps, gradient = unit_gradient(logits, targets, head, statistics)

    def times(weight):
        rows = times_head(gradient.matrix, weight)
        if gradient.row_scale is not None:
            rows *= gradient.row_scale[:, None]
        if gradient.target_scale is not None:
            # Of a target outside the vocabulary the scale is NaN, whatever row is read.
            rows.addcmul_(gradient.target_scale[:, None], weight[targets.clamp(0, len(weight) - 1)])
        return rows

    return Swept(logps, times(head.weight), None if head.low_rank_weight is None else times(head.low_rank_weight))


def _sweep(tokens, head, with_rows, statistics=None):
    """`Swept` of tokens that all meet the head, chunk by chunk; fills `statistics` [4, n] where given."""
    dtype = accumulation_dtype(tokens.hidden.dtype)
    logps = tokens.hidden.new_empty(len(tokens.hidden), dtype=dtype)
    rows = torch.empty_like(tokens.hidden, dtype=dtype) if with_rows else None
    low_rank_rows = torch.empty_like(tokens.low_rank) if with_rows and tokens.low_rank is not None else None
    for chunk, logits in _logits_of_chunks(tokens, head):
        targets = None if tokens.targets is None else tokens.targets[chunk]
        chunk_statistics = None if statistics is None else statistics[:, chunk]
        if not with_rows:
            logps[chunk] = logps_(logits, targets, head, chunk_statistics)
            continue
        found = _unit_rows(logits, targets, head, chunk_statistics)
        logps[chunk], rows[chunk] = found.logps, found.rows
        if low_rank_rows is not None:
            low_rank_rows[chunk] = found.low_rank_rows
    return Swept(logps, rows, low_rank_rows)


def _stacked_sweep(tokens, ref_hidden, head, with_rows, statistics):
    """`Swept` of the policy, and log-probs of the reference, by one product, which reads the head once: for few rows.

    Both halves begin at a whole tile and run through the same steps, so equal hidden states give equal log-probs.
    """
    hidden, targets, low_rank = tokens
    dtype, count = accumulation_dtype(hidden.dtype), len(hidden)
    half = _whole_tiles(count)
    both = hidden.new_zeros(2 * half, hidden.shape[1])
    both[:count], both[half : half + count] = hidden, ref_hidden
    logits = hidden.new_empty(2 * half, len(head.weight), dtype=dtype)
    fill_logits_(logits, both, head.weight)
    policy, reference = logits[:count], logits[half : half + count]
    ref_logps = logps_(reference, targets, head)
    if low_rank is not None:
        fill_logits_(policy, low_rank, head.low_rank_weight, add=True)
    if not with_rows:
        return Swept(logps_(policy, targets, head, statistics), None, None), ref_logps
    return _unit_rows(policy, targets, head, statistics), ref_logps


@torch.library.custom_op("bpo_fast::linear_token_logps", mutates_args=())
@precise
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
    """`Outputs`: logps [N], ref_logps [N], unit-gradient rows [N, H], low-rank rows [N, r], statistics [4, N].

    Rows in hidden's 16-bit dtype would be rounded twice, here and after the loss has scaled them. Without targets:
    minus the log-sum-exp.
    """
    if targets is not None and not runs_in_triton(hidden):
        check_target_range(targets, len(weight))
    kept = _kept(targets, dense)
    tokens = Tokens(hidden, targets, low_rank).at(kept)
    count, dtype = len(tokens.hidden), accumulation_dtype(hidden.dtype)
    head = Head(weight, bias, low_rank_weight, softcap, temperature)
    statistics = hidden.new_empty(4, count, dtype=dtype) if with_statistics else None
    ref_tokens = None if ref_hidden is None else Tokens(ref_hidden, targets, None).at(kept)
    if ref_tokens is not None and 2 * _whole_tiles(count) <= chunk_rows(len(weight), dtype, hidden.device):
        swept, ref_logps = _stacked_sweep(tokens, ref_tokens.hidden, head, with_rows, statistics)
    else:
        swept = _sweep(tokens, head, with_rows, statistics)
        ref_logps = None if ref_tokens is None else _sweep(ref_tokens, head, with_rows=False).logps

    def spread(made, dim=0, empty=(0,)):
        """`made` of the tokens kept, which lie along `dim`, at their places among zeros; `empty` where not made."""
        if made is None:
            return hidden.new_empty(empty, dtype=dtype)
        if kept is None:
            return made
        shape = (*made.shape[:dim], len(hidden), *made.shape[dim + 1 :])
        return made.new_zeros(shape).index_copy_(dim, kept, made)

    return Outputs(
        *map(spread, (swept.logps, ref_logps, swept.rows, swept.low_rank_rows)), spread(statistics, 1, (4, 0))
    )


@linear_token_logps_op.register_fake
def _linear_token_logps_fake(*arguments):
    given = Arguments(*arguments)
    num_tokens = len(given.hidden)

    def empty(*shape):
        return given.hidden.new_empty(shape, dtype=accumulation_dtype(given.hidden.dtype))

    return Outputs(
        logps=empty(num_tokens),
        ref_logps=empty(0 if given.ref_hidden is None else num_tokens),
        rows=empty(*given.hidden.shape) if given.with_rows else empty(0),
        low_rank_rows=empty(*given.low_rank.shape) if given.with_rows and given.low_rank is not None else empty(0),
        statistics=empty(4, num_tokens if given.with_statistics else 0),
    )


@torch.library.custom_op("bpo_fast::linear_token_logps_head_grad", mutates_args=())
@precise
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
    tokens = Tokens(hidden, targets, low_rank).at(kept)
    grad = grad if kept is None else grad[kept]
    head = Head(weight, bias, low_rank_weight, softcap, temperature)
    grad_weight, grad_bias, grad_low_rank = _empty_head_gradients(weight, bias, low_rank_weight, with_weight)
    for chunk, logits in _logits_of_chunks(tokens, head):
        here = tokens.at(chunk)
        _, gradient = unit_gradient_(logits, here.targets, head, scale=grad[chunk])
        if with_weight:
            add_head_gradient_(grad_weight, gradient, here.hidden)
        if bias is not None:
            grad_bias += gradient.sum(0, dtype=grad_bias.dtype)
        if low_rank is not None:
            add_head_gradient_(grad_low_rank, gradient, here.low_rank)
    return grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), grad_low_rank


def _empty_head_gradients(weight, bias, low_rank_weight, with_weight):
    """Zeros in the accumulation dtype for what is wanted, empty tensors for the rest."""

    def zeros(like):
        return weight.new_zeros((0,) if like is None else like.shape, dtype=accumulation_dtype(weight.dtype))

    return zeros(weight if with_weight else None), zeros(bias), zeros(low_rank_weight)


@head_gradient_op.register_fake
def _head_gradient_fake(
    grad, hidden, weight, targets, bias, low_rank, low_rank_weight, softcap, temperature, with_weight, dense
):
    grad_weight, grad_bias, grad_low_rank = _empty_head_gradients(weight, bias, low_rank_weight, with_weight)
    return grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), grad_low_rank


def _wanted(ctx):
    """Which arguments want a gradient; behind the op's own, torch.library puts one of its own."""
    return Arguments(*ctx.needs_input_grad[: len(Arguments._fields)])


def _setup_context(ctx, inputs, output):
    given, wanted, made = Arguments(*inputs), _wanted(ctx), Outputs(*output)
    ctx.hidden_dtype, ctx.transform, ctx.dense = given.hidden.dtype, (given.softcap, given.temperature), given.dense
    ctx.set_materialize_grads(False)
    ctx.head_is_trained = wanted.weight or wanted.bias or wanted.low_rank_weight
    # Hidden states are kept for the second sweep alone; otherwise the unit-gradient rows are all that stays.
    head = (given.hidden, given.weight, given.targets, given.bias, given.low_rank, given.low_rank_weight)
    ctx.save_for_backward(made.rows, made.low_rank_rows, *(head if ctx.head_is_trained else ()))


def _backward(ctx, grad, *_):
    if grad is None:
        return Arguments()
    wanted = _wanted(ctx)
    rows, low_rank_rows, *head = ctx.saved_tensors
    grads = {}
    if wanted.hidden:
        grads["hidden"] = (grad[:, None] * rows).to(ctx.hidden_dtype)
    if wanted.low_rank:
        grads["low_rank"] = grad[:, None] * low_rank_rows
    if ctx.head_is_trained:
        found = head_gradient_op(grad.contiguous(), *head, *ctx.transform, wanted.weight, ctx.dense)
        for name, gradient in zip(("weight", "bias", "low_rank_weight"), found, strict=True):
            grads[name] = gradient if getattr(wanted, name) else None
    return Arguments(**grads)


linear_token_logps_op.register_autograd(_backward, setup_context=_setup_context)
