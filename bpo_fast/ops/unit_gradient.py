"""A chunk of logits turned, in its own memory, into log-probs and unit gradients; by device. What a head is.

`kernels/unit_gradient.py` does it on a GPU, `kernels/unit_exponentials.py` for bfloat16 heads; the steps here are the
same in PyTorch. All functions use up the logits, and give the same bits of a log-prob.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bpo_fast.ops.rows import block_rows, exponentiate, final_logits_, runs_in_triton


class Gradient(NamedTuple):
    """(onehot - p) * slope [n, V] as a matrix or, if there are scales, as row_scale * matrix + target_scale * onehot.

    Then the matrix is bfloat16 and 0 at the targets, and the scales [n] are float32.
    """

    matrix: Tensor
    row_scale: Tensor | None = None
    target_scale: Tensor | None = None


class Head(NamedTuple):
    """From hidden states h to final logits: x = softcap * tanh((W h + b + B z) / softcap) / temperature.

    `weight` W [V, H]; `bias` b [V] or None; `low_rank_weight` B [V, r], in the accumulation dtype, or None; `softcap`
    None for no cap.
    """

    weight: Tensor
    bias: Tensor | None
    low_rank_weight: Tensor | None
    softcap: float | None
    temperature: float


def logps_(logits: Tensor, targets: Tensor | None, head: Head, statistics: Tensor | None = None) -> Tensor:
    """Log-probs [n] of a chunk of logits [n, V] before bias and cap; fills `statistics` [4, n] where given.

    Without targets: minus the log-sum-exp.
    """
    logps = logits.new_empty(len(logits))
    if runs_in_triton(logits):
        _launch(logits, None, targets, head, None, logps, statistics)
    else:
        for _ in _blocks(logits, targets, head, logps, statistics, with_slope=False):
            pass
    return logps


def unit_gradient(
    logits: Tensor, targets: Tensor | None, head: Head, statistics: Tensor | None = None
) -> tuple[Tensor, Gradient]:
    """`logps_`, and their gradient by the logits as the faster kernel leaves it.

    Of a bfloat16 head on CUDA that is one pass over the logits into memory of its own, elsewhere `unit_gradient_`.
    """
    if not runs_in_triton(logits) or head.weight.dtype != torch.bfloat16:
        logps, matrix = unit_gradient_(logits, targets, head, statistics)
        return logps, Gradient(matrix)
    from bpo_fast.kernels.unit_exponentials import launch_unit_exponentials

    num_rows, vocab_size = logits.shape
    # Rows of whole 16 bytes, which the product that follows reads best.
    matrix = logits.new_empty(num_rows, -(-vocab_size // 8) * 8, dtype=torch.bfloat16)[:, :vocab_size]
    logps, row_scale, target_scale = logits.new_empty(3, num_rows)
    target_scale = None if targets is None else target_scale
    outputs = (logps, row_scale, target_scale, statistics)
    with torch.cuda.device_of(logits):
        launch_unit_exponentials(logits, matrix, targets, head.bias, *outputs, head.softcap, head.temperature)
    return logps, Gradient(matrix, row_scale, target_scale)


def unit_gradient_(
    logits: Tensor, targets: Tensor | None, head: Head, statistics: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`logps_`, and their gradient by the logits: scale [n] * (onehot - p) * slope of the final logits, [n, V].

    In the memory of the logits: on CUDA in the dtype of the head, on the CPU in that of the logits.
    """
    logps = logits.new_empty(len(logits))
    if runs_in_triton(logits):
        gradient = logits.view(head.weight.dtype)[:, : logits.shape[1]]
        _launch(logits, gradient, targets, head, scale, logps, statistics)
        return logps, gradient
    for block, rows, row_sum, slope in _blocks(logits, targets, head, logps, statistics, with_slope=True):
        rows.div_(-row_sum)
        if targets is not None:
            rows.scatter_add_(1, targets[block, None], torch.ones_like(row_sum))
        if slope is not None:
            rows.mul_(slope)
        if scale is not None:
            rows.mul_(scale[block, None])
    return logps, logits


def _launch(logits, gradient, targets, head, scale, logps, statistics):
    from bpo_fast.kernels.unit_gradient import launch_unit_gradient

    # Triton launches on the current device.
    with torch.cuda.device_of(logits):
        launch_unit_gradient(
            logits, gradient, targets, head.bias, scale, logps, statistics, head.softcap, head.temperature
        )


def _blocks(logits, targets, head, logps, statistics, with_slope):
    """Fill `logps` and `statistics` by blocks; give (block, its exp(x - max), their sum, slope) while in the cache."""
    step = block_rows(logits.shape[1])
    for start in range(0, len(logits), step):
        block = slice(start, start + step)
        rows = logits[block]
        if head.bias is not None:
            rows += head.bias
        slope = final_logits_(rows, head.softcap, head.temperature, with_slope=with_slope)
        row_targets = None if targets is None else targets[block]
        row_statistics = None if statistics is None else statistics[:, block]
        logps[block], _, row_sum = exponentiate(rows, row_targets, rows, row_statistics)
        yield block, rows, row_sum, slope
