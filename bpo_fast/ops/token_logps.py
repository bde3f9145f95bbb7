"""Log-probabilities of target tokens from logits that exist: `token_logps`, and `sequence_logps` for a pair of models.

log p_y = (x_y - m) - log sum exp(x - m) with m = max x; d log p_y / d x = onehot(y) - p.
float16, bfloat16 and float32 logits are computed in float32, float64 in float64.
"""

import torch
from torch import Tensor

from bpo_fast.ops.checks import IGNORE_INDEX, check_indices, check_same, check_target_range, check_tensor

# On the CPU rows are taken in blocks of this many bytes of float32, small enough for the last-level cache to serve the
# passes over one. Not smaller: every pass ends in a barrier of all threads, and on a machine with other work to do a
# barrier costs a time slice; blocks of 2 MiB then took several times as long.
BLOCK_BYTES = 32 << 20


def accumulation_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def runs_in_triton(tensor):
    """Whether the Triton kernels take `tensor`; float64 and CPU tensors go through PyTorch."""
    return tensor.is_cuda and tensor.dtype != torch.float64


def row_blocks(num_rows, vocab_size):
    """Slices of rows, each about BLOCK_BYTES of float32."""
    step = max(1, BLOCK_BYTES // (4 * vocab_size))
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def exponentiate_(rows, targets):
    """Turn rows [n, V] into exp(x - max) in place. Returns logps [n], and max and the sum of each row, [n, 1]."""
    target_logits = rows.gather(1, targets[:, None])
    row_max = rows.amax(1, keepdim=True)
    row_sum = rows.sub_(row_max).exp_().sum(1, keepdim=True)
    return (target_logits - row_max - row_sum.log()).squeeze(1), row_max, row_sum


def _forward_torch(logits, targets, token_logps, statistics):
    """Fill token_logps [S, T] and, if given, statistics [2, S, T] at the targets that count, from logits [S, T, V]."""
    sequences, tokens = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
    for block in row_blocks(len(sequences), logits.shape[-1]):
        where = (sequences[block], tokens[block])
        # Indexing makes the block's own copy, whatever the strides; the cast is free of a second one in float32.
        logps, row_max, row_sum = exponentiate_(logits[where].to(token_logps.dtype), targets[where])
        token_logps[where] = logps
        if statistics is not None:
            statistics[0][where] = row_max.squeeze(1)
            statistics[1][where] = row_sum.log().squeeze(1)


@torch.library.custom_op("bpo_fast::sequence_logps", mutates_args=())
def _sequence_logps(
    logits: Tensor, ref_logits: Tensor | None, targets: Tensor, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_target_range(targets, logits.shape[-1])
    token_logps, sums, statistics = _sequence_logps_fake(logits, ref_logits, targets, with_sums)
    if runs_in_triton(logits) and targets.numel():
        from bpo_fast.kernels.sequence_logps import launch_sequence_logps

        arrivals = torch.zeros(sums.shape, dtype=torch.int32, device=logits.device) if with_sums else None
        launch_sequence_logps(
            _unit_stride(logits),
            None if ref_logits is None else _unit_stride(ref_logits),
            targets,
            token_logps,
            sums if with_sums else None,
            statistics,
            arrivals,
        )
        return token_logps, sums, statistics
    token_logps.zero_()
    statistics.zero_()
    _forward_torch(logits, targets, token_logps[0], statistics)
    if ref_logits is not None:
        _forward_torch(ref_logits, targets, token_logps[1], None)
    if with_sums:
        torch.sum(token_logps, dim=2, out=sums)
    return token_logps, sums, statistics


@_sequence_logps.register_fake
def _sequence_logps_fake(logits, ref_logits, targets, with_sums):
    planes = 1 if ref_logits is None else 2
    dtype = accumulation_dtype(logits.dtype)
    num_sequences, num_tokens = targets.shape
    token_logps = logits.new_empty(planes, num_sequences, num_tokens, dtype=dtype)
    sums = logits.new_empty((planes, num_sequences) if with_sums else (0,), dtype=dtype)
    return token_logps, sums, logits.new_empty(2, num_sequences, num_tokens, dtype=dtype)


def _unit_stride(logits):
    return logits if logits.stride(-1) == 1 else logits.contiguous()


@torch.library.custom_op("bpo_fast::sequence_logps_backward", mutates_args=())
def _sequence_logps_backward(grad: Tensor, logits: Tensor, targets: Tensor, statistics: Tensor) -> Tensor:
    """grad [S, T] of the policy's token log-probs -> grad of logits [S, T, V], in the one buffer that is returned."""
    if runs_in_triton(logits) and targets.numel():
        from bpo_fast.kernels.sequence_logps import launch_sequence_logps_backward

        grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        launch_sequence_logps_backward(grad, _unit_stride(logits), targets, statistics, grad_logits)
        return grad_logits
    grad_logits = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    sequences, tokens = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
    for block in row_blocks(len(sequences), logits.shape[-1]):
        where = (sequences[block], tokens[block])
        scale = grad[where][:, None]
        rows = logits[where].to(grad.dtype).sub_(statistics[0][where][:, None]).sub_(statistics[1][where][:, None])
        rows.exp_().mul_(-scale).scatter_add_(1, targets[where][:, None], scale)
        grad_logits[where] = rows.to(logits.dtype)
    return grad_logits


@_sequence_logps_backward.register_fake
def _sequence_logps_backward_fake(grad, logits, targets, statistics):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx, inputs, output):
    logits, _, targets, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, output[2])


def _backward(ctx, grad_token_logps, grad_sums, _):
    logits, targets, statistics = ctx.saved_tensors
    grad = torch.zeros_like(statistics[0])
    if grad_token_logps is not None:
        grad = grad + grad_token_logps[0]
    if grad_sums is not None and grad_sums.numel():
        grad = grad + grad_sums[0][:, None]
    return _sequence_logps_backward(grad, logits, targets, statistics), None, None, None


_sequence_logps.register_autograd(_backward, setup_context=_setup_context)


def sequence_logps(logits, ref_logits, targets):
    """Token and sequence log-probs under a policy and, in the same launch, under a reference.

    `logits` and `ref_logits` (or None) are [S, T, V], `targets` int64 [S, T] with -100 where nothing is predicted; no
    shift. Returns (token_logps [P, S, T], sums [P, S]) in float32 (float64 for float64 logits), plane 0 the policy,
    plane 1 the reference if there is one. The reference is a constant: no gradient goes to it.
    """
    ref_logits = None if ref_logits is None else ref_logits.detach()
    token_logps, sums, _ = _sequence_logps(logits, ref_logits, targets.contiguous(), True)
    return token_logps, sums


def token_logps(logits, targets):
    """Log-probability of each target token, log softmax(logits)[target], without a copy of the logits.

    Args:
        logits: float16, bfloat16, float32 or float64, [..., V], on any device; any strides.
        targets: int64 or int32, [...], the token that each row of logits predicts (nothing is shifted here), in [0, V)
            or -100: such a row gives 0, has no gradient, and its logits are not read.

    Returns:
        float32 [...] (float64 for float64 logits), in nats, differentiable in `logits`. The backward pass writes the
        gradient (onehot - p) in one pass into one buffer of the logits' dtype.

    Raises:
        TypeError: logits that are not floating point, targets that are not int32 or int64.
        ValueError: shapes or devices that do not fit, a target outside the vocabulary.

    >>> import torch
    >>> token_logps(torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.tensor([0, -100]))
    tensor([-0.6931,  0.0000])
    """
    if not isinstance(logits, Tensor) or logits.ndim < 1:
        raise ValueError("logits must be a tensor of shape [..., V] with at least one dimension.")
    check_tensor("logits", logits, (*logits.shape[:-1], "V"))
    check_indices("targets", targets, logits.shape[:-1])
    check_same("targets", targets, "logits", logits)
    if not logits.shape[-1]:
        raise ValueError("logits must have a vocabulary of at least one column, got V = 0.")
    rows = logits.reshape(1, -1, logits.shape[-1]) if logits.ndim != 3 else logits
    row_targets = targets.reshape(rows.shape[:2]).to(torch.int64)
    logps, _, _ = _sequence_logps(rows, None, row_targets.contiguous(), False)
    return logps[0].reshape(targets.shape)
