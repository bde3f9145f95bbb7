"""The sigmoid DPO loss of a batch of pairs, its rewards, and its gradient by each sequence log-prob, in one launch.

The formula is that of `sigmoid` in `bpo_fast/losses/table.py`, which it is tested against. In PyTorch its dozen
steps over a handful of numbers would take as long as the kernels that read the logits.
"""

import triton
import triton.language as tl
from torch import Tensor

from bpo_fast.kernels.heuristics import COMPILER_OPTIONS

# Pairs taken at once by the one program; the order of the mean depends on this number and on how many there are.
PAIRS = 256


@triton.jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid_preference_kernel(
    logps, ref_logps, num_tokens, loss, rewards, coefficients, num_pairs, beta, label_smoothing, PAIRS: tl.constexpr
):
    """One program. loss [] = mean of the pairs' losses; rewards [2B] = beta (logps - ref_logps); coefficients [2B] =
    d loss / d logps.

    logps and ref_logps float32 [2B], chosen first; ref_logps None is a reference of 0. num_tokens int64 [2B], or None:
    where given, the loss is that of log-ratios a token.
    """
    total = tl.zeros([PAIRS], tl.float32)
    for start in range(0, num_pairs, PAIRS):
        chosen = start + tl.arange(0, PAIRS)
        inside = chosen < num_pairs
        rejected = num_pairs + chosen
        chosen_ratio = tl.load(logps + chosen, mask=inside, other=0.0)
        rejected_ratio = tl.load(logps + rejected, mask=inside, other=0.0)
        if ref_logps is not None:
            chosen_ratio -= tl.load(ref_logps + chosen, mask=inside, other=0.0)
            rejected_ratio -= tl.load(ref_logps + rejected, mask=inside, other=0.0)
        tl.store(rewards + chosen, beta * chosen_ratio, mask=inside)
        tl.store(rewards + rejected, beta * rejected_ratio, mask=inside)
        chosen_share = 1.0 / num_pairs
        rejected_share = 1.0 / num_pairs
        if num_tokens is not None:
            chosen_tokens = tl.maximum(tl.load(num_tokens + chosen, mask=inside, other=1), 1).to(tl.float32)
            rejected_tokens = tl.maximum(tl.load(num_tokens + rejected, mask=inside, other=1), 1).to(tl.float32)
            chosen_ratio /= chosen_tokens
            rejected_ratio /= rejected_tokens
            chosen_share /= chosen_tokens
            rejected_share /= rejected_tokens
        margin = beta * (chosen_ratio - rejected_ratio)
        losses = -(1.0 - label_smoothing) * log_sigmoid(margin) - label_smoothing * log_sigmoid(-margin)
        # The sigmoid of -margin as exp(log sigmoid): no overflow at either end.
        slope = beta * (label_smoothing * tl.exp(log_sigmoid(margin)))
        slope -= beta * ((1.0 - label_smoothing) * tl.exp(log_sigmoid(-margin)))
        tl.store(coefficients + chosen, slope * chosen_share, mask=inside)
        tl.store(coefficients + rejected, -slope * rejected_share, mask=inside)
        total += tl.where(inside, losses, 0.0)
    tl.store(loss, tl.sum(total, axis=0) / num_pairs)


def launch_sigmoid_preference(
    logps: Tensor,
    ref_logps: Tensor | None,
    num_tokens: Tensor | None,
    loss: Tensor,
    rewards: Tensor,
    coefficients: Tensor,
    *,
    beta: float,
    label_smoothing: float,
) -> None:
    """Launch over logps [2B], B not 0; `ref_logps` None for a reference-free loss, `num_tokens` None for sums."""
    tensors = (logps, ref_logps, num_tokens, loss, rewards, coefficients)
    numbers = (len(logps) // 2, beta, label_smoothing)
    sigmoid_preference_kernel[(1,)](*tensors, *numbers, PAIRS=PAIRS, num_warps=4, **COMPILER_OPTIONS)
