"""Log-probabilities of target tokens from logits, and their sums over sequences.

The numerics are those of `rows.py`. Policy and reference are two planes of one launch that run the same code, so equal
logits give equal bits and a margin of exactly 0. Offsets of rows are 64 bits wide.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bpo_fast.kernels import heuristics
from bpo_fast.kernels.heuristics import RowLaunch
from bpo_fast.kernels.rows import (
    IGNORE_INDEX,
    NUM_STATISTICS,
    STATE_SIZE,
    Tile,
    Transform,
    empty_state,
    final_target_logit,
    load_states,
    log_of_sum,
    merge,
    read_columns,
    store_state,
    store_statistics,
)

# Width of the final sum over a sequence: its order, and so its bits, depend on this number and the length alone.
TOKENS = 1024


@triton.jit
def last_to_arrive(counter, number):
    """Whether this program is the last of `number` to count itself, and then sees what the others have stored.

    What it adds, and in which order, does not depend on it. Release/acquire makes the others' stores visible to loads
    with .cg, which read past this multiprocessor's own L1.
    """
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == number - 1


@triton.jit
def sum_sequence(token_logps, targets, num_tokens, TOKENS: tl.constexpr):
    """The sum of a sequence's token log-probs, in the order of the tokens, and how many of its targets count."""
    lanes = tl.zeros([TOKENS], tl.float32)
    kept = tl.zeros([TOKENS], tl.int32)
    for start in range(0, num_tokens, TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        inside = tokens < num_tokens
        lanes += tl.load(token_logps + tokens, mask=inside, other=0.0, cache_modifier=".cg")
        kept += (tl.load(targets + tokens, mask=inside, other=IGNORE_INDEX) != IGNORE_INDEX).to(tl.int32)
    return tl.sum(lanes, axis=0), tl.sum(kept, axis=0)


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
    plane 0); statistics [4, sequences, tokens] (of plane 0); parts [planes, rows, SPLITS, STATE_SIZE]; float32.
    arrivals int32, all zero: [planes, sequences] for the sums, then [planes, rows] if a row is split. A target outside
    the vocabulary reads nothing and gives NaN, as log-prob and as log s. What is None is left out: sums, row_numbers,
    statistics, softcap, temperature.
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
    transform = Transform(None, softcap, inverse_temperature)
    row_state = merge(empty_state(1), statistics is not None)
    if target != IGNORE_INDEX:
        first = split * split_columns
        last = min(first + split_columns, vocab_size)
        row_state = read_columns(
            logits,
            first,
            last,
            vocab_size,
            target,
            transform,
            Tile(COLUMNS, VECTOR, INTERLEAVED, UNROLL),
            statistics is not None,
        )
    is_last = True
    if SPLITS > 1:
        place = plane * num_rows + row
        store_state(parts + (place * SPLITS + split) * STATE_SIZE, row_state)
        is_last = last_to_arrive(arrivals + num_planes * num_sequences + place, SPLITS)
    if is_last:
        logp = 0.0
        row_max = 0.0
        log_sum = 0.0
        if target != IGNORE_INDEX:
            if SPLITS > 1:
                row_state = merge(load_states(parts + place * SPLITS * STATE_SIZE, SPLITS), statistics is not None)
            target_logit, _slope = final_target_logit(logits, target, vocab_size, transform)
            row_max = row_state[0]
            log_sum = log_of_sum(row_state[1], target, vocab_size)
            logp = target_logit - row_max - log_sum
            if statistics is not None:  # noqa: SIM102 - a constant and a value do not share an `and` in Triton
                if plane == 0:
                    store_statistics(statistics, row, num_rows, row_state, target_logit, vocab_size)
        elif statistics is not None:  # noqa: SIM102
            if plane == 0:
                for number in tl.static_range(NUM_STATISTICS):
                    tl.store(statistics + number * num_rows + row, 0.0)
        tl.store(token_logps + plane * num_rows + row, logp)
        if row_numbers is not None:  # noqa: SIM102
            if plane == 0:
                tl.store(row_numbers + row, row_max)
                tl.store(row_numbers + num_rows + row, log_sum)
        if policy_sums is not None:  # noqa: SIM102
            if last_to_arrive(arrivals + plane * num_sequences + sequence, num_tokens):
                begin = sequence * num_tokens
                total, kept = sum_sequence(token_logps + plane * num_rows + begin, targets + begin, num_tokens, TOKENS)
                if plane == 0:
                    tl.store(policy_sums + sequence, total)
                    tl.store(num_targets + sequence, kept)
                else:
                    tl.store(reference_sums + sequence, total)


def launch_sequence_logps(
    policy: Tensor,
    reference: Tensor | None,
    targets: Tensor,
    *,
    token_logps: Tensor,
    row_numbers: Tensor | None,
    policy_sums: Tensor | None,
    reference_sums: Tensor | None,
    num_targets: Tensor | None,
    statistics: Tensor | None,
    softcap: float | None,
    temperature: float,
    num_processors: int,
    launch: RowLaunch | None = None,
) -> RowLaunch:
    """Launch over policy [S, T, V] and reference (the same shape or None); vocabulary contiguous, S and T not 0.

    `policy_sums` None leaves sums and counts out, `row_numbers` and `statistics` None what they hold. `launch` None is
    the rule's of `heuristics`. Returns the launch that was taken.
    """
    num_sequences, num_tokens, vocab_size = policy.shape
    num_rows, num_planes = num_sequences * num_tokens, token_logps.shape[0]
    if reference is None:  # there is no plane 1 to read it
        reference, reference_sums = policy, policy_sums
    aligned = heuristics.is_aligned(policy) and heuristics.is_aligned(reference)
    read = (num_rows * num_planes, vocab_size, policy.element_size(), num_processors)
    launch = launch or heuristics.row_launch(*read, heavy=statistics is not None, aligned=aligned)
    is_split, is_summed = launch.splits > 1, policy_sums is not None
    split_columns = triton.cdiv(vocab_size, launch.splits * launch.columns) * launch.columns
    counters = num_planes * (num_sequences + (num_rows if is_split else 0))
    parts = (num_planes, num_rows, launch.splits, STATE_SIZE.value)
    results = (token_logps, policy_sums, reference_sums, num_targets, row_numbers, statistics)
    sizes = (num_rows, num_sequences, num_tokens, vocab_size, split_columns)
    sequence_logps_kernel[num_rows, num_planes, launch.splits](
        *(policy, reference, targets, *results),
        token_logps.new_empty(parts) if is_split else None,
        targets.new_zeros(counters, dtype=torch.int32) if is_split or is_summed else None,
        *sizes,
        *policy.stride()[:2],
        *reference.stride()[:2],
        softcap,
        None if temperature == 1.0 else 1.0 / temperature,
        SPLITS=launch.splits,
        TOKENS=TOKENS,
        **launch.options(),
    )
    return launch
