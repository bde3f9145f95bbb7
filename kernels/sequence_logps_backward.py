"""The gradient of `sequence_logps.py` over the logits, written once, in their own memory where that is allowed."""

import triton
import triton.language as tl
from torch import Tensor

from bpo_fast.kernels import heuristics
from bpo_fast.kernels.heuristics import RowLaunch
from bpo_fast.kernels.rows import IGNORE_INDEX, Transform, exponential, final_logits, tile_columns


@triton.jit
def sequence_logps_backward_kernel(
    logits,
    targets,
    row_numbers,
    grad_logits,
    grad_token_logps,
    grad_sums,
    num_rows,
    num_tokens,
    vocab_size,
    strip,
    sequence_stride,
    token_stride,
    grad_sequence_stride,
    grad_token_stride,
    softcap,
    inverse_temperature,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Program (row, strip of columns): grad_logits = grad * (onehot - p) * slope, rounded once, at the store.

    grad of a row is the sum of grad_token_logps [rows] and of its sequence's grad_sums [sequences], float32, None
    where not given. grad_logits has the dtype of the logits and may be their memory: a program reads what it writes,
    and nobody else does. Rows that are ignored are written as zeros and their logits are not read.
    """
    row = tl.program_id(0).to(tl.int64)
    sequence = row // num_tokens
    token = row % num_tokens
    target = tl.load(targets + row)
    source = logits + sequence * sequence_stride + token * token_stride
    out = grad_logits + sequence * grad_sequence_stride + token * grad_token_stride
    grad = 0.0
    row_max = 0.0
    log_sum = 0.0
    if target != IGNORE_INDEX:
        if grad_token_logps is not None:
            grad += tl.load(grad_token_logps + row)
        if grad_sums is not None:
            grad += tl.load(grad_sums + sequence)
        row_max = tl.load(row_numbers + row)
        log_sum = tl.load(row_numbers + num_rows + row)
    first = tl.program_id(1) * strip
    for start in tl.range(first, min(first + strip, vocab_size), COLUMNS, loop_unroll_factor=UNROLL):
        columns = start + tile_columns(COLUMNS, VECTOR, INTERLEAVED)
        inside = columns < vocab_size
        value = tl.zeros([COLUMNS // VECTOR, VECTOR], tl.float32)
        if target != IGNORE_INDEX:
            x = tl.load(source + columns, mask=inside, other=float("-inf")).to(tl.float32)
            x, slope = final_logits(x, columns, inside, Transform(None, softcap, inverse_temperature))
            p = exponential(x - row_max - log_sum)
            value = tl.where(columns == target.to(tl.int32), 1.0 - p, -p) * grad * slope
        tl.store(out + columns, value.to(grad_logits.dtype.element_ty), mask=inside)


def launch_sequence_logps_backward(
    logits: Tensor,
    targets: Tensor,
    row_numbers: Tensor,
    grad_logits: Tensor,
    *,
    grad_token_logps: Tensor | None,
    grad_sums: Tensor | None,
    softcap: float | None,
    temperature: float,
    launch: RowLaunch | None = None,
) -> RowLaunch:
    """Launch over logits and grad_logits [S, T, V], vocabulary contiguous, S and T not 0.

    `targets` and `row_numbers` are those of `launch_sequence_logps`; grad_token_logps [S, T] and grad_sums [S] are
    float32 and contiguous, or None. grad_logits may be logits. `launch` None is the rule's of `heuristics`; a row is
    not split, whatever it says. Returns the launch that was taken.
    """
    num_sequences, num_tokens, vocab_size = logits.shape
    num_rows = num_sequences * num_tokens
    aligned = heuristics.is_aligned(logits) and heuristics.is_aligned(grad_logits)
    heavy = softcap is not None or not aligned
    sizes = (num_rows, vocab_size, logits.element_size(), 0)
    launch = launch or heuristics.row_launch(*sizes, heavy=heavy, aligned=aligned)
    strip = heuristics.BACKWARD_TILES * launch.columns
    tensors = (logits, targets, row_numbers, grad_logits, grad_token_logps, grad_sums)
    sequence_logps_backward_kernel[num_rows, triton.cdiv(vocab_size, strip)](
        *tensors,
        *(num_rows, num_tokens, vocab_size, strip),
        *logits.stride()[:2],
        *grad_logits.stride()[:2],
        softcap,
        None if temperature == 1.0 else 1.0 / temperature,
        **launch.options(),
    )
    return launch
