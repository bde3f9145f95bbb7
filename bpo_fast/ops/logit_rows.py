"""Log-probs from logits and their gradient in PyTorch, block by block: for the CPU and for float64."""

import torch

from bpo_fast.ops.checks import IGNORE_INDEX
from bpo_fast.ops.rows import BLOCK_BYTES, accumulation_dtype, block_rows, final_logits_, log_probs_


def _row_blocks(targets, vocab_size):
    """(sequence, slice of tokens) of each run of targets [S, T] that are not ignored, cut to blocks."""
    most = block_rows(vocab_size)
    blocks = []
    for sequence, kept in enumerate(targets != IGNORE_INDEX):
        places = kept.nonzero().squeeze(1)
        ends = (places.diff() != 1).nonzero().squeeze(1) + 1
        for run in places.tensor_split(ends):
            if len(run):
                first, stop = int(run[0]), int(run[-1]) + 1
                blocks += [(sequence, slice(start, min(start + most, stop))) for start in range(first, stop, most)]
    return blocks


def _scratch(blocks, logits):
    """One buffer for the blocks of a call: fresh memory for each would cost more than the arithmetic."""
    longest = max((tokens.stop - tokens.start for _, tokens in blocks), default=0)
    return logits.new_empty(longest, logits.shape[-1], dtype=accumulation_dtype(logits.dtype))


def forward_rows(logits, targets, softcap, temperature, token_logps, row_numbers=None, statistics=None):
    """Fill token_logps [S, T] and, where given, row_numbers [2, S, T] and statistics [4, S, T].

    Only at targets that are not ignored: no other row is read.
    """
    blocks = _row_blocks(targets, logits.shape[-1])
    scratch = _scratch(blocks, logits)
    as_they_are = softcap is None and temperature == 1.0 and logits.dtype == token_logps.dtype
    for where in blocks:
        rows = logits[where]
        out = scratch[: len(rows)]
        if not as_they_are:
            rows = out.copy_(rows)
            final_logits_(rows, softcap, temperature, with_slope=False)
        numbers, found = (None if x is None else x[:, *where] for x in (row_numbers, statistics))
        token_logps[where] = log_probs_(rows, targets[where], out, numbers, found)


def backward_rows(grad, logits, targets, row_numbers, softcap, temperature, grad_logits):
    """Fill grad_logits [S, T, V] at the targets that are not ignored; it may be the logits' memory. grad is [S, T]."""
    blocks = _row_blocks(targets, logits.shape[-1])
    # Without rounding, the gradient is worked out where it will stay.
    scratch = None if grad_logits.dtype == grad.dtype else _scratch(blocks, logits)
    for where in blocks:
        scale = grad[where][:, None]
        row_max, log_sum = (numbers[where][:, None] for numbers in row_numbers)
        rows = grad_logits[where] if scratch is None else scratch[: len(scale)]
        if scratch is None and softcap is None and temperature == 1.0:
            torch.sub(logits[where], row_max, out=rows)
            slope = None
        else:
            slope = final_logits_(rows.copy_(logits[where]), softcap, temperature, with_slope=True)
            rows.sub_(row_max)
        rows.exp_().mul_(-scale / log_sum.exp()).scatter_add_(1, targets[where][:, None], scale)
        if slope is not None:
            rows.mul_(slope)
        if scratch is not None:
            grad_logits[where] = rows


def few_rows(logits, targets):
    """`token_logps` of few rows [n, V] whose targets [n] are all in the vocabulary, on the CPU; None of anything else.

    The bits are those of `log_probs_`, which this is as PyTorch's own function: for the few rows of a token being
    scored, every step around the arithmetic counts.
    """
    if not (logits.is_cpu and targets.is_cpu and logits.is_floating_point() and targets.dtype == torch.int64):
        return None
    shape = logits.shape
    if len(shape) != 2 or targets.shape != shape[:1] or not 0 < 4 * logits.numel() <= BLOCK_BYTES:
        return None
    for target in targets.tolist():
        if not 0 <= target < shape[1]:
            return None
    if logits.element_size() < 4:
        logits = logits.float()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none").neg_()
