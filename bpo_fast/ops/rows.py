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
    log_sum = row_sum.log()
    if statistics is not None:
        # Batched products of one row each: no matrix of the products is made.
        dot, square = (torch.bmm(out[:, None], other[:, :, None]).flatten() for other in (shifted, out))
        statistics.entropy.copy_(log_sum.squeeze(1) - dot / row_sum.squeeze(1))
        statistics.log_sum_sq_probs.copy_(square.log() - 2 * log_sum.squeeze(1))
    return (target_logits - row_max - log_sum).squeeze(1), row_max, row_sum
