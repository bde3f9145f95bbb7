"""Log-probabilities of target tokens from logits, and their gradient.

The numerics are those of `rows.py`. Policy and reference are two planes of one launch that run the same code, so equal
logits give equal bits and a margin of exactly 0. Offsets of rows are 64 bits wide.
"""

import torch
import triton
import triton.language as tl

from bpo_fast.kernels import heuristics
from bpo_fast.kernels.rows import (
    accumulate,
    empty_state,
    exponential,
    final_logits,
    merge,
    store_statistics,
    tile_columns,
)

IGNORE_INDEX = tl.constexpr(-100)

# Fused multiply-adds said aloud: Triton's default for them is not the same in every version.
OPTIONS = {"enable_fp_fusion": True}
# Width of the final sum over a sequence: its order, and so its bits, depend on this number and the length alone.
TOKENS = 1024


@triton.jit
def sequence_logps_kernel(
    policy,
    reference,
    targets,
    token_logps,
    policy_sums,
    reference_sums,
    num_targets,
    row_numbers,
    statistics,
    parts,
    arrivals,
    num_rows,
    num_sequences,
    num_tokens,
    vocab_size,
    split_columns,
    policy_sequence_stride,
    policy_token_stride,
    reference_sequence_stride,
    reference_token_stride,
    softcap,
    inverse_temperature,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    WITH_SUMS: tl.constexpr,
    WITH_STATISTICS: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    UNROLL: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Program (row, plane, split): a part of one target's log-prob under the policy (plane 0) or the reference (1).

    targets [sequences, tokens] int64, contiguous. token_logps [planes, sequences, tokens]; policy_sums and
    reference_sums [sequences]; num_targets [sequences] int64; row_numbers [2, sequences, tokens] (maximum and log s of
    plane 0); statistics [4, sequences, tokens] (of plane 0); parts [planes, rows, SPLITS, 6]; float32. arrivals int32,
    all zero: [planes, sequences] for the sums, then [planes, rows] if a row is split. A target outside the vocabulary
    reads nothing and gives NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    plane = tl.program_id(1)
    split = tl.program_id(2)
    num_planes = tl.num_programs(1)
    sequence = row // num_tokens
    token = row % num_tokens
    target = tl.load(targets + row)
    if plane == 0:
        logits = policy + sequence * policy_sequence_stride + token * policy_token_stride
    else:
        logits = reference + sequence * reference_sequence_stride + token * reference_token_stride
    row_state = merge(empty_state(1), WITH_STATISTICS)
    if target != IGNORE_INDEX:
        state = empty_state(COLUMNS // VECTOR)
        first = split * split_columns
        for start in tl.range(first, min(first + split_columns, vocab_size), COLUMNS, loop_unroll_factor=UNROLL):
            columns = start + tile_columns(COLUMNS, VECTOR, INTERLEAVED)
            inside = columns < vocab_size
            # Columns past the vocabulary are -inf, not 0: they must not add exp(0).
            x = tl.load(logits + columns, mask=inside, other=float("-inf")).to(tl.float32)
            x, _slope = final_logits(
                x, policy, columns, inside, softcap, inverse_temperature, False, HAS_SOFTCAP, HAS_TEMPERATURE
            )
            state = accumulate(state, x, columns, inside, start, target.to(tl.int32), WITH_STATISTICS)
        row_state = merge(state, WITH_STATISTICS)
    is_last = True
    if SPLITS > 1:
        part = parts + ((plane * num_rows + row) * SPLITS + split) * 6
        for number in tl.static_range(6):
            tl.store(part + number, row_state[number])
        # A counter decides which program merges the parts, the last of its row to arrive; what it merges, and in which
        # order, does not depend on it. Release/acquire makes the other programs' stores visible, and .cg reads past
        # this multiprocessor's own L1.
        tl.debug_barrier()
        counter = arrivals + num_planes * num_sequences + plane * num_rows + row
        is_last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if is_last:
        logp = 0.0
        row_max = 0.0
        log_sum = 0.0
        if target != IGNORE_INDEX:
            if SPLITS > 1:
                places = parts + ((plane * num_rows + row) * SPLITS + tl.arange(0, SPLITS)) * 6
                row_state = merge(
                    (
                        tl.load(places, cache_modifier=".cg"),
                        tl.load(places + 1, cache_modifier=".cg"),
                        tl.load(places + 2, cache_modifier=".cg"),
                        tl.load(places + 3, cache_modifier=".cg"),
                        tl.load(places + 4, cache_modifier=".cg"),
                        tl.load(places + 5, cache_modifier=".cg"),
                    ),
                    WITH_STATISTICS,
                )
            in_vocabulary = (target >= 0) & (target < vocab_size)
            target_logit = tl.load(logits + target, mask=in_vocabulary, other=float("nan")).to(tl.float32)
            target_logit, _target_slope = final_logits(
                target_logit, policy, target, True, softcap, inverse_temperature, False, HAS_SOFTCAP, HAS_TEMPERATURE
            )
            row_max = row_state[0]
            log_sum = tl.log(row_state[1])
            logp = target_logit - row_max - log_sum
            if WITH_STATISTICS:  # noqa: SIM102 - a constant and a value do not share an `and` in Triton
                if plane == 0:
                    store_statistics(statistics, row, num_rows, row_state, target_logit, vocab_size)
        elif WITH_STATISTICS:  # noqa: SIM102
            if plane == 0:
                for number in tl.static_range(4):
                    tl.store(statistics + number * num_rows + row, 0.0)
        tl.store(token_logps + plane * num_rows + row, logp)
        if plane == 0:
            tl.store(row_numbers + row, row_max)
            tl.store(row_numbers + num_rows + row, log_sum)
        if WITH_SUMS:
            # As above: the last row of its sequence to arrive adds up all of them, in the order of the tokens.
            tl.debug_barrier()
            counter = arrivals + plane * num_sequences + sequence
            if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == num_tokens - 1:
                lanes = tl.zeros([TOKENS], tl.float32)
                kept = tl.zeros([TOKENS], tl.int64)
                for start in range(0, num_tokens, TOKENS):
                    tokens = start + tl.arange(0, TOKENS)
                    places = sequence * num_tokens + tokens
                    inside = tokens < num_tokens
                    lanes += tl.load(
                        token_logps + plane * num_rows + places, mask=inside, other=0.0, cache_modifier=".cg"
                    )
                    kept += (tl.load(targets + places, mask=inside, other=IGNORE_INDEX) != IGNORE_INDEX).to(tl.int64)
                if plane == 0:
                    tl.store(policy_sums + sequence, tl.sum(lanes, axis=0))
                    tl.store(num_targets + sequence, tl.sum(kept, axis=0))
                else:
                    tl.store(reference_sums + sequence, tl.sum(lanes, axis=0))


@triton.jit
def sequence_logps_backward_kernel(
    grad_token_logps,
    grad_sums,
    logits,
    targets,
    row_numbers,
    grad_logits,
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
    HAS_GRAD_TOKENS: tl.constexpr,
    HAS_GRAD_SUMS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Program (row, strip of columns): grad_logits = grad * (onehot - p) * slope, rounded once, at the store.

    grad of a row is the sum of grad_token_logps [rows] and of its sequence's grad_sums [sequences], float32, where
    given. grad_logits has the dtype of the logits and may be their memory: a program reads what it writes, and nobody
    else does. Rows that are ignored are written as zeros and their logits are not read.
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
        if HAS_GRAD_TOKENS:
            grad += tl.load(grad_token_logps + row)
        if HAS_GRAD_SUMS:
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
            x, slope = final_logits(
                x, logits, columns, inside, softcap, inverse_temperature, False, HAS_SOFTCAP, HAS_TEMPERATURE
            )
            p = exponential(x - row_max - log_sum)
            value = tl.where(columns == target.to(tl.int32), 1.0 - p, -p) * grad * slope
        tl.store(out + columns, value.to(grad_logits.dtype.element_ty), mask=inside)


def launch_sequence_logps(
    policy,
    reference,
    targets,
    token_logps,
    policy_sums,
    reference_sums,
    num_targets,
    row_numbers,
    statistics,
    softcap,
    temperature,
    num_processors,
):
    """Launch over policy [S, T, V] and reference (the same shape or None); vocabulary contiguous, S and T not 0.

    `policy_sums` None leaves sums and counts out, `statistics` None the statistics.
    """
    num_sequences, num_tokens, vocab_size = policy.shape
    num_rows, num_planes = num_sequences * num_tokens, token_logps.shape[0]
    reference = policy if reference is None else reference
    launch = heuristics.row_launch(
        num_rows * num_planes,
        vocab_size,
        policy.element_size(),
        num_processors,
        heavy=statistics is not None,
        aligned=heuristics.is_aligned(policy) and heuristics.is_aligned(reference),
    )
    split_columns = -(-vocab_size // (launch.splits * launch.columns)) * launch.columns
    with_sums, splits = policy_sums is not None, launch.splits
    counters = num_planes * (num_sequences + (num_rows if splits > 1 else 0))
    arrivals = targets.new_zeros(counters, dtype=torch.int32) if with_sums or splits > 1 else None
    parts = token_logps.new_empty(num_planes * num_rows * splits * 6) if splits > 1 else None
    sequence_logps_kernel[num_rows, num_planes, splits](
        policy,
        reference,
        targets,
        token_logps,
        policy_sums,
        reference_sums,
        num_targets,
        row_numbers,
        statistics,
        parts,
        arrivals,
        num_rows,
        num_sequences,
        num_tokens,
        vocab_size,
        split_columns,
        policy.stride(0),
        policy.stride(1),
        reference.stride(0),
        reference.stride(1),
        1.0 if softcap is None else softcap,
        1.0 / temperature,
        HAS_SOFTCAP=softcap is not None,
        HAS_TEMPERATURE=temperature != 1.0,
        WITH_SUMS=with_sums,
        WITH_STATISTICS=statistics is not None,
        SPLITS=splits,
        COLUMNS=launch.columns,
        VECTOR=launch.vector,
        INTERLEAVED=launch.interleaved,
        UNROLL=launch.unroll,
        TOKENS=TOKENS,
        num_warps=launch.num_warps,
        **OPTIONS,
    )


def launch_sequence_logps_backward(
    grad_token_logps, grad_sums, logits, targets, row_numbers, grad_logits, softcap, temperature, num_processors
):
    """Launch over logits and grad_logits [S, T, V], vocabulary contiguous, S and T not 0.

    grad_token_logps [S, T] and grad_sums [S], float32 and contiguous, or None. grad_logits may be logits.
    """
    num_sequences, num_tokens, vocab_size = logits.shape
    num_rows = num_sequences * num_tokens
    aligned = heuristics.is_aligned(logits) and heuristics.is_aligned(grad_logits)
    heavy = softcap is not None or not aligned
    launch = heuristics.row_launch(
        num_rows, vocab_size, logits.element_size(), num_processors, heavy=heavy, aligned=aligned
    )
    strip = heuristics.BACKWARD_TILES * launch.columns
    sequence_logps_backward_kernel[num_rows, triton.cdiv(vocab_size, strip)](
        grad_token_logps,
        grad_sums,
        logits,
        targets,
        row_numbers,
        grad_logits,
        num_rows,
        num_tokens,
        vocab_size,
        strip,
        logits.stride(0),
        logits.stride(1),
        grad_logits.stride(0),
        grad_logits.stride(1),
        1.0 if softcap is None else softcap,
        1.0 / temperature,
        HAS_GRAD_TOKENS=grad_token_logps is not None,
        HAS_GRAD_SUMS=grad_sums is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_TEMPERATURE=temperature != 1.0,
        COLUMNS=launch.columns,
        VECTOR=launch.vector,
        INTERLEAVED=launch.interleaved,
        UNROLL=launch.unroll,
        num_warps=launch.num_warps,
        **OPTIONS,
    )
