"""Log-probabilities of target tokens from logits, and their gradient: one program a row of the vocabulary.

Numerics contract: everything between the load of a logit and the store of a result is float32. A row is described by
two numbers, its maximum m and log s with s = sum exp(x - m), never by their sum: log p_y = (x_y - m) - log s keeps its
digits when logits are 1e4, where m + log s has already lost three of them. The order of every sum is fixed by the
block sizes, so equal inputs give equal bits.
"""

import triton
import triton.language as tl

IGNORE_INDEX = tl.constexpr(-100)

# 2048 columns over 8 warps are 8 columns a thread: one 16-byte load of bfloat16. With 4096, float32 spills on sm_100.
COLUMNS = 2048
# Fused multiply-adds said aloud: Triton's default for them is not the same in every version.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
# Width of the final sum over a sequence: its order, and so its bits, depend on this number and the length alone.
TOKENS = 1024


@triton.jit
def accumulate_lanes(lane_max, lane_sum, x):
    """Take one logit a lane into the running (maximum, sum of exp).

    One exponential a logit is enough: of exp(max - new max) and exp(x - new max) one is always exp(0).
    """
    scale = tl.where(x == float("-inf"), 0.0, tl.exp(-tl.abs(x - lane_max)))
    lane_sum = tl.where(x > lane_max, lane_sum * scale + 1.0, lane_sum + scale)
    return tl.maximum(lane_max, x), lane_sum


@triton.jit
def merge_lanes(lane_max, lane_sum):
    """The lanes' (maximum, sum of exp) as those of the whole row: maximum and log of the sum."""
    row_max = tl.max(lane_max, axis=0)
    return row_max, tl.log(tl.sum(lane_sum * tl.exp(lane_max - row_max), axis=0))


@triton.jit
def sequence_logps_kernel(
    policy,
    reference,
    targets,
    token_logps,
    sums,
    statistics,
    arrivals,
    num_rows,
    num_sequences,
    num_tokens,
    vocab_size,
    policy_sequence_stride,
    policy_token_stride,
    reference_sequence_stride,
    reference_token_stride,
    WITH_SUMS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Program (row, plane): log-prob of one target under the policy (plane 0) or the reference (plane 1).

    Both planes run this same code on their own pointer, so equal logits give equal bits and a margin of exactly 0.
    targets [sequences, tokens] int64, contiguous; token_logps [planes, sequences, tokens], sums [planes, sequences]
    and statistics [2, sequences, tokens] (maximum, log s; of plane 0) float32; arrivals [planes, sequences] int32, all
    zero. A target outside the vocabulary reads nothing and gives NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    plane = tl.program_id(1)
    logp = 0.0
    row_max = 0.0
    log_sum = 0.0
    sequence = row // num_tokens
    token = row % num_tokens
    target = tl.load(targets + row)
    if target != IGNORE_INDEX:
        if plane == 0:
            logits = policy + sequence * policy_sequence_stride + token * policy_token_stride
        else:
            logits = reference + sequence * reference_sequence_stride + token * reference_token_stride
        lane_max = tl.full([COLUMNS], float("-inf"), tl.float32)
        lane_sum = tl.zeros([COLUMNS], tl.float32)
        for start in range(0, vocab_size, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            # Columns past the vocabulary are -inf, not 0: they must not add exp(0).
            x = tl.load(logits + columns, mask=columns < vocab_size, other=float("-inf")).to(tl.float32)
            lane_max, lane_sum = accumulate_lanes(lane_max, lane_sum, x)
        row_max, log_sum = merge_lanes(lane_max, lane_sum)
        in_vocabulary = (target >= 0) & (target < vocab_size)
        target_logit = tl.load(logits + target, mask=in_vocabulary, other=float("nan")).to(tl.float32)
        logp = target_logit - row_max - log_sum
    tl.store(token_logps + plane * num_rows + row, logp)
    if plane == 0:
        tl.store(statistics + row, row_max)
        tl.store(statistics + num_rows + row, log_sum)
    if WITH_SUMS:
        # The counter only decides which program does the sum, the last of its sequence to arrive; what it adds, and in
        # which order, does not depend on it. Release/acquire makes the other programs' stores visible, and .cg reads
        # past this multiprocessor's own L1.
        tl.debug_barrier()
        counter = arrivals + plane * num_sequences + sequence
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == num_tokens - 1:
            lanes = tl.zeros([TOKENS], tl.float32)
            first = token_logps + plane * num_rows + sequence * num_tokens
            for start in range(0, num_tokens, TOKENS):
                tokens = start + tl.arange(0, TOKENS)
                lanes += tl.load(first + tokens, mask=tokens < num_tokens, other=0.0, cache_modifier=".cg")
            tl.store(sums + plane * num_sequences + sequence, tl.sum(lanes, axis=0))


@triton.jit
def sequence_logps_backward_kernel(
    grad_token_logps,
    logits,
    targets,
    statistics,
    grad_logits,
    num_rows,
    num_tokens,
    vocab_size,
    sequence_stride,
    token_stride,
    COLUMNS: tl.constexpr,
):
    """Program (row, block of columns): grad_logits = grad * (onehot - p), rounded once, at the store.

    grad_token_logps [rows] float32; grad_logits [rows, vocabulary] contiguous, in the dtype of the logits; rows that
    are ignored are written as zeros and their logits are not read.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < vocab_size
    target = tl.load(targets + row)
    out = grad_logits + row * vocab_size + columns
    if target != IGNORE_INDEX:
        grad = tl.load(grad_token_logps + row)
        row_max = tl.load(statistics + row)
        log_sum = tl.load(statistics + num_rows + row)
        source = logits + (row // num_tokens) * sequence_stride + (row % num_tokens) * token_stride
        x = tl.load(source + columns, mask=inside, other=float("-inf")).to(tl.float32)
        p = tl.exp(x - row_max - log_sum)
        tl.store(out, (tl.where(columns == target, 1.0 - p, -p) * grad).to(grad_logits.dtype.element_ty), mask=inside)
    else:
        tl.store(out, tl.zeros([COLUMNS], grad_logits.dtype.element_ty), mask=inside)


def launch_sequence_logps(policy, reference, targets, token_logps, sums, statistics, arrivals):
    """Launch over policy [S, T, V] and reference (the same shape or None); vocabulary contiguous, T and S not 0.

    `sums` None leaves the sums out; `arrivals` is then not read.
    """
    num_sequences, num_tokens, vocab_size = policy.shape
    reference = policy if reference is None else reference
    sequence_logps_kernel[num_sequences * num_tokens, token_logps.shape[0]](
        policy,
        reference,
        targets,
        token_logps,
        sums,
        statistics,
        arrivals,
        num_sequences * num_tokens,
        num_sequences,
        num_tokens,
        vocab_size,
        policy.stride(0),
        policy.stride(1),
        reference.stride(0),
        reference.stride(1),
        WITH_SUMS=sums is not None,
        COLUMNS=COLUMNS,
        TOKENS=TOKENS,
        **OPTIONS,
    )


def launch_sequence_logps_backward(grad_token_logps, logits, targets, statistics, grad_logits):
    """Launch over logits [S, T, V], vocabulary contiguous, S and T not 0; grad_token_logps [S, T] float32."""
    num_sequences, num_tokens, vocab_size = logits.shape
    num_rows = num_sequences * num_tokens
    sequence_logps_backward_kernel[num_rows, triton.cdiv(vocab_size, COLUMNS)](
        grad_token_logps,
        logits,
        targets,
        statistics,
        grad_logits,
        num_rows,
        num_tokens,
        vocab_size,
        logits.stride(0),
        logits.stride(1),
        COLUMNS=COLUMNS,
        **OPTIONS,
    )
