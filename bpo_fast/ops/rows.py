"""Rows of logits in PyTorch, for the CPU and for float64; `kernels/rows.py` is the same in Triton.

log p_y = (x_y - m) - log s with m = max x and s = sum exp(x - m); d log p_y / d x = onehot(y) - p. The softmax sees
x = softcap * tanh(logit / softcap) / temperature.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# On the CPU rows are taken in blocks of this many bytes of float32, small enough for the last-level cache to serve the
# passes over one. Not smaller: every pass ends in a barrier of all threads, and on a machine with other work to do a
# barrier costs a time slice; blocks of 2 MiB then took several times as long.
BLOCK_BYTES = 32 << 20
# exp underflows far above this; p log p is 0 at a probability of 0, also where the logit is -inf.
LOWEST_SHIFTED = -200.0


class TokenStatistics(NamedTuple):
    """Logged statistics of each token's distribution: float32 (float64 for float64 inputs), 0 where ignored.

    `entropy` in nats; `is_top1`, 1 where the target is the argmax, the first of equal logits; `log_sum_sq_probs`, the
    log of sum p^2; `mean_logits` over the vocabulary. Detached, and named as TRL 1.16 names them.
    """

    entropy: Tensor
    is_top1: Tensor
    log_sum_sq_probs: Tensor
    mean_logits: Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def runs_in_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernels take `tensor`; float64 and CPU tensors go through PyTorch."""
    return tensor.is_cuda and tensor.dtype != torch.float64


def records_gradient(tensor: Tensor) -> bool:
    """Whether what is computed from `tensor` gets a gradient."""
    return tensor.requires_grad and torch.is_grad_enabled()


def runs_directly(*tensors: Tensor | None) -> bool:
    """Whether an op that records no gradient may skip the dispatcher, which takes longer than few rows do.

    Not while something traces, fakes or counts, and not for subclasses of Tensor.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return all(tensor is None or type(tensor) is Tensor for tensor in tensors)


def num_processors(tensor: Tensor) -> int:
    """Multiprocessors of a CUDA tensor's device, 0 elsewhere."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 0


def block_rows(vocab_size: int) -> int:
    """Number of rows of a block."""
    return max(1, BLOCK_BYTES // (4 * vocab_size))


def final_logits(logits: Tensor, softcap: float | None, temperature: float) -> Tensor:
    """What the softmax sees of logits of any shape; differentiable."""
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def final_logits_(rows: Tensor, softcap: float | None, temperature: float, with_slope: bool) -> Tensor | float | None:
    """`final_logits` of rows [n, V] in place, without autograd.

    Returns its derivative by the logits, a number or [n, V]; None where that is 1, or without `with_slope`.
    """
    slope = None
    if softcap is not None:
        rows.div_(softcap).tanh_()
        slope = rows.square().neg_().add_(1) if with_slope else None
        rows.mul_(softcap)
    if temperature != 1.0:
        rows.div_(temperature)
        slope = (1.0 if slope is None else slope) / temperature if with_slope else None
    return slope


def log_probs_(
    rows: Tensor, targets: Tensor, out: Tensor, numbers: Tensor | None = None, statistics: Tensor | None = None
) -> Tensor:
    """log p of final logits [n, V] into `out`, which may be their memory, and is used up; returns the targets' [n].

    PyTorch's log-softmax: a row by one thread in one go, so few rows wait for no barrier, and the bits of a row depend
    on nothing but its logits. Fills `numbers` [2, n] (maximum and log s) and `statistics` [4, n], if given.
    """
    if statistics is not None:
        statistics = TokenStatistics(*statistics)
        statistics.is_top1.copy_(rows.argmax(1) == targets)
        statistics.mean_logits.copy_(rows.mean(1))
    if numbers is not None:
        numbers[0] = rows.amax(1)
    torch.log_softmax(rows, 1, out=out)
    logps = out.gather(1, targets[:, None]).squeeze(1)
    if numbers is None and statistics is None:
        return logps
    # Of the largest logit it is (m - m) - log s.
    highest = out.amax(1, keepdim=True)
    if numbers is not None:
        numbers[1] = -highest.squeeze(1)
    if statistics is not None:
        # Sums over x - m, not over log p: the log of s, which is 10, would take digits of each.
        shifted = out.sub_(highest).clamp(min=LOWEST_SHIFTED)
        _fill_sums(statistics, out.exp_(), shifted, out.sum(1))
    return logps


def _fill_sums(statistics, e, shifted, row_sum):
    """Entropy and log sum p^2 of rows from e = exp(shifted) and its sum [n]."""
    # Batched products of one row each: no matrix of the products is made.
    dot, square = (torch.bmm(e[:, None], other[:, :, None]).flatten() for other in (shifted, e))
    log_sum = row_sum.log()
    statistics.entropy.copy_(log_sum - dot / row_sum)
    statistics.log_sum_sq_probs.copy_(square.log() - 2 * log_sum)


def exponentiate(
    rows: Tensor, targets: Tensor | None, out: Tensor, statistics: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """exp(x - m) of final logits [n, V] into `out`, which may be their memory.

    Fills `statistics` [4, n], if given, in the order of `TokenStatistics`. Returns logps [n], and m and s, [n, 1]; the
    target logit is 0 for `targets` None.
    """
    row_max = rows.amax(1, keepdim=True)
    target_logits = torch.zeros_like(row_max) if targets is None else rows.gather(1, targets[:, None])
    if statistics is not None:
        statistics = TokenStatistics(*statistics)
        statistics.is_top1.copy_(rows.argmax(1) == targets)
        statistics.mean_logits.copy_(rows.mean(1))
    torch.sub(rows, row_max, out=out)
    shifted = out.clamp(min=LOWEST_SHIFTED) if statistics is not None else None
    row_sum = out.exp_().sum(1, keepdim=True)
    if statistics is not None:
        _fill_sums(statistics, out, shifted, row_sum.squeeze(1))
    return (target_logits - row_max - row_sum.log()).squeeze(1), row_max, row_sum
