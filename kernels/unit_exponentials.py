"""From a chunk of float32 logits to log-probs and, in the same pass, to all of onehot - p but its scale, in bfloat16.

With p = exp(x - c) / sum exp(x - c) for any c, a row of unit gradients times the head W [V, H] is

    (onehot - p) W = (1 - p_y) W[y] - exp(c - m) / s * sum_{j != y} exp(x_j - c) W[j],

so exp(x - c) can be written as x is read, before m and s are known: 4 bytes read and 2 written a logit, where two
passes (`unit_gradient.py`) move 10. c is the maximum of the row's first tile. Where the row rises too far above it, or
the first tile held nothing but -inf, the row is written again with its own maximum: lazily, since it hardly ever is.

Numerics contract: log-probs and statistics have the bits of `unit_gradient.py`, whose order of sums this is. 1 - p_y
is made in float32 and never rounded, since the target's place in the row is 0; the others are rounded once. float16
has no range for exponentials of that size.
"""

import triton
import triton.language as tl
from torch import Tensor

from bpo_fast.kernels import heuristics
from bpo_fast.kernels.heuristics import RowLaunch
from bpo_fast.kernels.rows import (
    Transform,
    accumulate,
    empty_state,
    exponential,
    final_logits,
    final_target_logit,
    log_of_sum,
    merge,
    store_statistics,
    tile_columns,
)

# How far a row may rise above its first tile's maximum: exp of it, 2e17, times any sum over a vocabulary is a float32.
LARGEST_RISE = tl.constexpr(40.0)


@triton.jit
def unit_exponentials_kernel(
    logits,
    exponentials,
    targets,
    bias,
    logps,
    row_scale,
    target_scale,
    statistics,
    statistics_stride,
    vocab_size,
    logits_stride,
    exponentials_stride,
    softcap,
    inverse_temperature,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Program (row): (onehot - p) * slope = row_scale * exponentials + target_scale * onehot, and logps[row].

    What is None is left out. logits float32 [rows, vocabulary]; exponentials bfloat16, memory of its own, 0 at the
    target; targets int64 [rows], one outside the vocabulary reads nothing and gives NaN as logp and target_scale;
    logps, row_scale, target_scale float32 [rows]; statistics float32 [4, rows]. Without targets logps is minus the
    log-sum-exp, and there is no target_scale.
    """
    row = tl.program_id(0).to(tl.int64)
    source = logits + row * logits_stride
    out = exponentials + row * exponentials_stride
    transform = Transform(bias, softcap, inverse_temperature)
    target = tl.full([], -1, tl.int64)
    target_logit = 0.0
    target_slope = 0.0
    if targets is not None:
        target = tl.load(targets + row)
        target_logit, target_slope = final_target_logit(source, target, vocab_size, transform)
    columns = tile_columns(COLUMNS, VECTOR, INTERLEAVED)
    inside = columns < vocab_size
    x = tl.load(source + columns, mask=inside, other=float("-inf"))
    x, _slope = final_logits(x, columns, inside, transform)
    first_max = tl.max(tl.max(x, axis=1), axis=0)
    base = tl.where(first_max == float("-inf"), 0.0, first_max)
    state = empty_state(COLUMNS // VECTOR)
    for start in tl.range(0, vocab_size, COLUMNS, loop_unroll_factor=UNROLL):
        columns = start + tile_columns(COLUMNS, VECTOR, INTERLEAVED)
        inside = columns < vocab_size
        x = tl.load(source + columns, mask=inside, other=float("-inf"))
        x, slope = final_logits(x, columns, inside, transform)
        state = accumulate(state, x, columns, inside, start, target.to(tl.int32), statistics is not None)
        tl.store(out + columns, (exponential(x - base) * slope).to(tl.bfloat16), mask=inside)
    row_state = merge(state, statistics is not None)
    row_max = row_state[0]
    if (row_max > base + LARGEST_RISE) | (first_max == float("-inf")):
        base = tl.where(row_max == float("-inf"), 0.0, row_max)
        # Each thread over what it has written itself.
        for start in tl.range(0, vocab_size, COLUMNS):
            columns = start + tile_columns(COLUMNS, VECTOR, INTERLEAVED)
            inside = columns < vocab_size
            x = tl.load(source + columns, mask=inside, other=float("-inf"))
            x, slope = final_logits(x, columns, inside, transform)
            tl.store(out + columns, (exponential(x - base) * slope).to(tl.bfloat16), mask=inside)
    tl.store(row_scale + row, -exponential(base - row_max) / row_state[1])
    log_sum = tl.log(row_state[1])
    if targets is not None:
        log_sum = log_of_sum(row_state[1], target, vocab_size)
        p = exponential(target_logit - row_max - log_sum)
        tl.store(target_scale + row, (1.0 - p) * target_slope)
        # Behind the thread that wrote its exponential there.
        tl.debug_barrier()
        tl.store(out + target, 0.0, mask=(target >= 0) & (target < vocab_size))
    tl.store(logps + row, target_logit - row_max - log_sum)
    if statistics is not None:
        store_statistics(statistics, row, statistics_stride, row_state, target_logit, vocab_size)


def launch_unit_exponentials(
    logits: Tensor,
    exponentials: Tensor,
    targets: Tensor | None,
    bias: Tensor | None,
    logps: Tensor,
    row_scale: Tensor,
    target_scale: Tensor | None,
    statistics: Tensor | None,
    softcap: float | None,
    temperature: float,
    *,
    launch: RowLaunch | None = None,
) -> RowLaunch:
    """Launch over float32 logits [n, V], n not 0, and bfloat16 exponentials [n, V]; what is None is left out.

    `launch` None is the rule's of `heuristics`, with the tiles of `unit_gradient.py`; a row is not split, whatever it
    says. Returns the launch that was taken.
    """
    num_rows, vocab_size = logits.shape
    aligned, sizes = heuristics.is_aligned(logits), (num_rows, vocab_size, logits.element_size(), 0)
    heavy = statistics is not None or softcap is not None or not aligned
    launch = launch or heuristics.row_launch(*sizes, heavy=heavy, aligned=aligned)
    unit_exponentials_kernel[(num_rows,)](
        *(logits, exponentials, targets, bias, logps, row_scale, target_scale, statistics),
        None if statistics is None else statistics.stride(0),
        vocab_size,
        logits.stride(0),
        exponentials.stride(0),
        softcap,
        None if temperature == 1.0 else 1.0 / temperature,
        **launch.options(),
    )
    return launch
