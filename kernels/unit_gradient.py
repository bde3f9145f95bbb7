"""From a chunk of logits to log-probs and to d logp / d logits = onehot - p, in the chunk's own memory.

The gradient of a target's log-prob does not depend on the loss, so it is made here, while the chunk is live, and
multiplied by the head afterwards. Numerics contract: the chunk holds float32 logits; what is written back is rounded
once.
"""

import triton
import triton.language as tl

from bpo_fast.kernels.sequence_logps import COLUMNS, OPTIONS, accumulate_lanes, merge_lanes


@triton.jit
def final_logits(x, bias, columns, inside, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """The logits that the softmax sees, and t = tanh(x / softcap), whose 1 - t^2 is the slope of the cap."""
    t = tl.zeros_like(x)
    if HAS_BIAS:
        x += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        # tanh with the exponential of a negative number only: no overflow, and an error of 1e-7 of the cap.
        decay = tl.exp(-2.0 * tl.abs(x / softcap))
        t = tl.where(x < 0, -1.0, 1.0) * (1.0 - decay) / (1.0 + decay)
        # Columns past the vocabulary stay -inf; the cap would make them -softcap.
        x = tl.where(inside, softcap * t, float("-inf"))
    return x, t


@triton.jit
def unit_gradient_kernel(
    logits,
    gradient,
    targets,
    bias,
    scale,
    logps,
    vocab_size,
    logits_stride,
    gradient_stride,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (row): logps[row] = log p_target, and gradient[row] = scale[row] * (onehot - p) * slope of the cap.

    `gradient` is the memory of `logits`, seen as float32 or as a 16-bit type in the first half of each row; strides
    count elements of the pointer's own type. logits float32 [rows, vocabulary]; targets int64 [rows], all inside the
    vocabulary; scale and logps float32 [rows].
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    source = logits + row * logits_stride
    lane_max = tl.full([COLUMNS], float("-inf"), tl.float32)
    lane_sum = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, vocab_size, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < vocab_size
        x = tl.load(source + columns, mask=inside, other=float("-inf"))
        x, _ = final_logits(x, bias, columns, inside, softcap, HAS_BIAS, HAS_SOFTCAP)
        lane_max, lane_sum = accumulate_lanes(lane_max, lane_sum, x)
    row_max, log_sum = merge_lanes(lane_max, lane_sum)
    target_logit = tl.load(source + target)
    target_logit, _ = final_logits(target_logit, bias, target, target >= 0, softcap, HAS_BIAS, HAS_SOFTCAP)
    tl.store(logps + row, target_logit - row_max - log_sum)
    if WITH_GRADIENT:
        out = gradient + row * gradient_stride
        grad = 1.0
        if HAS_SCALE:
            grad = tl.load(scale + row)
        tl.debug_barrier()
        for start in range(0, vocab_size, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            inside = columns < vocab_size
            x = tl.load(source + columns, mask=inside, other=float("-inf"))
            # 16-bit results land on bytes that hold float32 logits of this block or of one already read: every thread
            # must have its logits before any thread writes.
            tl.debug_barrier()
            x, t = final_logits(x, bias, columns, inside, softcap, HAS_BIAS, HAS_SOFTCAP)
            p = tl.exp(x - row_max - log_sum)
            value = tl.where(columns == target, 1.0 - p, -p) * grad
            if HAS_SOFTCAP:
                value *= 1.0 - t * t
            tl.store(out + columns, value.to(gradient.dtype.element_ty), mask=inside)


def launch_unit_gradient(logits, gradient, targets, bias, scale, logps, softcap):
    """Launch over float32 logits [n, V], n not 0; `gradient` None asks for the log-probs alone."""
    unit_gradient_kernel[(logits.shape[0],)](
        logits,
        gradient,
        targets,
        bias,
        scale,
        logps,
        logits.shape[1],
        logits.stride(0),
        0 if gradient is None else gradient.stride(0),
        1.0 if softcap is None else softcap,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_SCALE=scale is not None,
        WITH_GRADIENT=gradient is not None,
        COLUMNS=COLUMNS,
        **OPTIONS,
    )
