"""From a chunk of logits to log-probs and to d logp / d logits = onehot - p, in the chunk's own memory.

The gradient of a target's log-prob does not depend on the loss, so it is made here, while the chunk is live, and
multiplied by the head afterwards. Numerics contract: the chunk holds float32 logits, the arithmetic is that of
`rows.py`, and what is written back is rounded once.
"""

import triton
import triton.language as tl
from torch import Tensor

from bpo_fast.kernels import heuristics
from bpo_fast.kernels.heuristics import RowLaunch
from bpo_fast.kernels.rows import (
    Tile,
    Transform,
    exponential,
    final_logits,
    final_target_logit,
    log_of_sum,
    read_columns,
    store_statistics,
    tile_columns,
)


@triton.jit
def unit_gradient_kernel(
    logits,
    gradient,
    targets,
    bias,
    scale,
    logps,
    statistics,
    statistics_stride,
    vocab_size,
    logits_stride,
    gradient_stride,
    softcap,
    inverse_temperature,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Program (row): logps[row] = log p_target, and gradient[row] = scale[row] * (onehot - p) * slope of the logits.

    What is None is left out. `gradient` is the memory of `logits`, seen as float32 or as a 16-bit type in the first
    half of each row; strides count elements of the pointer's own type. logits float32 [rows, vocabulary]; targets
    int64 [rows], one outside the vocabulary reads nothing and gives a row of NaN; scale and logps float32 [rows];
    statistics float32 [4, rows]. Without targets a row's target logit and its onehot are 0: logps is then minus the
    log-sum-exp, and gradient its gradient.
    """
    row = tl.program_id(0).to(tl.int64)
    source = logits + row * logits_stride
    transform = Transform(bias, softcap, inverse_temperature)
    target = tl.full([], -1, tl.int64)
    target_logit = 0.0
    if targets is not None:
        target = tl.load(targets + row)
        target_logit, _slope = final_target_logit(source, target, vocab_size, transform)
    row_state = read_columns(
        source,
        0,
        vocab_size,
        vocab_size,
        target,
        transform,
        Tile(COLUMNS, VECTOR, INTERLEAVED, UNROLL),
        statistics is not None,
    )
    row_max = row_state[0]
    log_sum = tl.log(row_state[1]) if targets is None else log_of_sum(row_state[1], target, vocab_size)
    tl.store(logps + row, target_logit - row_max - log_sum)
    if statistics is not None:
        store_statistics(statistics, row, statistics_stride, row_state, target_logit, vocab_size)
    if gradient is not None:
        out = gradient + row * gradient_stride
        grad = 1.0
        if scale is not None:
            grad = tl.load(scale + row)
        tl.debug_barrier()
        # 16-bit results of columns a .. b - 1 land on the float32 logits a / 2 .. b / 2 - 1, which all threads
        # must have read. So far all have read `read` columns: a barrier a doubling, not one a tile. float32 results
        # land on logits that their own thread has just read.
        read = 0
        for start in tl.range(0, vocab_size, COLUMNS, loop_unroll_factor=UNROLL):
            columns = start + tile_columns(COLUMNS, VECTOR, INTERLEAVED)
            inside = columns < vocab_size
            x = tl.load(source + columns, mask=inside, other=float("-inf"))
            if gradient.dtype.element_ty.primitive_bitwidth < 32:  # noqa: SIM102
                if start + COLUMNS > 2 * read:
                    tl.debug_barrier()
                    read = start + COLUMNS
            x, slope = final_logits(x, columns, inside, transform)
            p = exponential(x - row_max - log_sum)
            value = tl.where(columns == target.to(tl.int32), 1.0 - p, -p) * grad * slope
            tl.store(out + columns, value.to(gradient.dtype.element_ty), mask=inside)


def launch_unit_gradient(
    logits: Tensor,
    gradient: Tensor | None,
    targets: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    logps: Tensor,
    statistics: Tensor | None,
    softcap: float | None,
    temperature: float,
    *,
    launch: RowLaunch | None = None,
) -> RowLaunch:
    """Launch over float32 logits [n, V], n not 0; what is None is left out. Returns the launch that was taken.

    `launch` None is the rule's of `heuristics`; a row is not split, whatever it says.
    """
    num_rows, vocab_size = logits.shape
    heavy, sizes = statistics is not None or softcap is not None, (num_rows, vocab_size, logits.element_size(), 0)
    launch = launch or heuristics.row_launch(*sizes, heavy=heavy, aligned=heuristics.is_aligned(logits))
    unit_gradient_kernel[(num_rows,)](
        *(logits, gradient, targets, bias, scale, logps, statistics),
        None if statistics is None else statistics.stride(0),
        vocab_size,
        logits.stride(0),
        None if gradient is None else gradient.stride(0),
        softcap,
        None if temperature == 1.0 else 1.0 / temperature,
        **launch.options(),
    )
    return launch
