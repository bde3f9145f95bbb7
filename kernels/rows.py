"""One row of logits read once: its log-sum-exp and, where asked for, its entropy and the other statistics.

`bpo_fast/ops/rows.py` is the same in PyTorch, for the CPU. Numerics contract: everything is float32. A row is
described by its maximum m and the log of s = sum exp(x - m), never by their sum: log p_y = (x_y - m) - log s keeps its
digits when logits are 1e4, where m + log s has already lost three of them. The order of every sum is fixed by the
sizes of the launch, so equal inputs give equal bits.

A tile of columns is [lanes, VECTOR]. A lane lies in one thread and keeps a state of its own, so within the loop over a
row no thread waits for another, and the running sum is rescaled once a lane, not once a logit. Where rows begin at
multiples of 16 bytes a lane is one access of 16 bytes; elsewhere it is single columns (INTERLEAVED), each access of a
warp being a run of columns.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# A target that is not predicted.
IGNORE_INDEX = tl.constexpr(-100)
# Numbers in a state: see `empty_state`; and what `store_statistics` gives of a row.
STATE_SIZE = tl.constexpr(6)
NUM_STATISTICS = tl.constexpr(4)
# exp underflows far above this; p log p is 0 at a probability of 0, also where the logit is -inf.
LOWEST_SHIFTED = tl.constexpr(-200.0)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exponential(x):
    """exp(x) by one multiplication and MUFU.EX2, the result flushed to 0 below 2^-126.

    tl.exp keeps such results, at the price of a comparison and two multiplications more for each.
    """
    return tl.exp2(x * LOG2_E)


class Tile(NamedTuple):
    """The columns that a program reads at once; see `heuristics.RowLaunch`.

    Four constants. An assignment in a kernel turns constants into values, so a Tile is made in the call that takes it.
    """

    columns: Any
    vector: Any
    interleaved: Any
    unroll: Any


class Transform(NamedTuple):
    """From the logits in memory to those that the softmax sees: a pointer and two numbers; None is left out."""

    bias: Any
    softcap: Any
    inverse_temperature: Any


@triton.jit
def tile_columns(COLUMNS: tl.constexpr, VECTOR: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Column numbers of a tile, [COLUMNS / VECTOR, VECTOR]."""
    lanes = tl.arange(0, COLUMNS // VECTOR)[:, None]
    places = tl.arange(0, VECTOR)[None, :]
    if INTERLEAVED:
        return places * (COLUMNS // VECTOR) + lanes
    return lanes * VECTOR + places


@triton.jit
def final_logits(x, columns, inside, transform):
    """The logits that the softmax sees, softcap * tanh((x + bias) / softcap) / temperature, and their slope in x.

    Columns that are not `inside` stay -inf.
    """
    slope = tl.full(x.shape, 1.0, tl.float32)
    if transform.bias is not None:
        x += tl.load(transform.bias + columns, mask=inside, other=0.0).to(tl.float32)
    if transform.softcap is not None:
        # tanh with the exponential of a negative number only: no overflow, and an error of 1e-7 of the cap.
        decay = exponential(-2.0 * tl.abs(x / transform.softcap))
        t = tl.where(x < 0, -1.0, 1.0) * (1.0 - decay) / (1.0 + decay)
        slope = 1.0 - t * t
        x = tl.where(inside, transform.softcap * t, float("-inf"))
    if transform.inverse_temperature is not None:
        x *= transform.inverse_temperature
        slope *= transform.inverse_temperature
    return x, slope


@triton.jit
def final_target_logit(logits, target, vocab_size, transform):
    """The target's logit as the softmax sees it, and its slope; NaN for a target outside the vocabulary, unread."""
    in_vocabulary = (target >= 0) & (target < vocab_size)
    x = tl.load(logits + target, mask=in_vocabulary, other=float("nan")).to(tl.float32)
    # Inside whatever the target is: NaN has to stay NaN.
    return final_logits(x, tl.minimum(tl.maximum(target, 0), vocab_size - 1), True, transform)


@triton.jit
def log_of_sum(row_sum, target, vocab_size):
    """log s of a row; NaN for a target outside the vocabulary, so that its log-prob and its whole gradient are NaN."""
    return tl.where((target >= 0) & (target < vocab_size), tl.log(row_sum), float("nan"))


@triton.jit
def empty_state(SIZE: tl.constexpr):
    """The state of SIZE lanes that have seen nothing: STATE_SIZE tensors of [SIZE].

    (maximum m, sum e, sum e (x - m), sum e^2, sum x, maximum left of the target), with e = exp(x - m).
    """
    lowest = tl.full([SIZE], float("-inf"), tl.float32)
    zero = tl.zeros([SIZE], tl.float32)
    return lowest, zero, zero, zero, zero, lowest


@triton.jit
def accumulate(state, x, columns, inside, start, target, WITH_STATISTICS: tl.constexpr):
    """`state` with the tile x [lanes, VECTOR] of columns start, start + 1, ... taken in.

    Columns that are not `inside` the vocabulary hold -inf; target is an int32.
    """
    lane_max, lane_sum, lane_dot, lane_square, lane_total, lane_before = state
    tile_max = tl.max(x, axis=1)
    new_max = tl.maximum(lane_max, tile_max)
    # -inf - -inf is NaN: a lane that has seen nothing but -inf counts from 0.
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    shifted = x - base[:, None]
    e = exponential(shifted)
    scale = exponential(lane_max - base)
    if WITH_STATISTICS:
        drop = tl.where(lane_max == float("-inf"), 0.0, lane_max - base)
        lane_dot = (lane_dot + drop * lane_sum) * scale + tl.sum(e * tl.maximum(shifted, LOWEST_SHIFTED), axis=1)
        lane_square = lane_square * scale * scale + tl.sum(e * e, axis=1)
        lane_total += tl.sum(tl.where(inside, x, 0.0), axis=1)
        # Only the tile that holds the target has to look at single columns.
        if start + x.numel <= target:
            lane_before = tl.maximum(lane_before, tile_max)
        elif start < target:
            lane_before = tl.maximum(lane_before, tl.max(tl.where(columns < target, x, float("-inf")), axis=1))
    lane_sum = lane_sum * scale + tl.sum(e, axis=1)
    return new_max, lane_sum, lane_dot, lane_square, lane_total, lane_before


@triton.jit
def merge(state, WITH_STATISTICS: tl.constexpr):
    """The states of many lanes, or of many parts of a row, as one: STATE_SIZE scalars."""
    lane_max, lane_sum, lane_dot, lane_square, lane_total, lane_before = state
    row_max = tl.max(lane_max, axis=0)
    base = tl.where(row_max == float("-inf"), 0.0, row_max)
    scale = exponential(lane_max - base)
    row_sum = tl.sum(lane_sum * scale, axis=0)
    row_dot = 0.0
    row_square = 0.0
    row_total = 0.0
    row_before = float("-inf")
    if WITH_STATISTICS:
        drop = tl.where(lane_max == float("-inf"), 0.0, lane_max - base)
        row_dot = tl.sum((lane_dot + drop * lane_sum) * scale, axis=0)
        row_square = tl.sum(lane_square * scale * scale, axis=0)
        row_total = tl.sum(lane_total, axis=0)
        row_before = tl.max(lane_before, axis=0)
    return row_max, row_sum, row_dot, row_square, row_total, row_before


@triton.jit
def read_columns(logits, first, last, vocab_size, target, transform, tile, WITH_STATISTICS: tl.constexpr):
    """The state of columns first .. last - 1 of the row at `logits`."""
    state = empty_state(tile.columns // tile.vector)
    for start in tl.range(first, last, tile.columns, loop_unroll_factor=tile.unroll):
        columns = start + tile_columns(tile.columns, tile.vector, tile.interleaved)
        inside = columns < vocab_size
        # Columns past the vocabulary are -inf, not 0: they must not add exp(0).
        x = tl.load(logits + columns, mask=inside, other=float("-inf")).to(tl.float32)
        x, _slope = final_logits(x, columns, inside, transform)
        state = accumulate(state, x, columns, inside, start, target.to(tl.int32), WITH_STATISTICS)
    return merge(state, WITH_STATISTICS)


@triton.jit
def store_state(place, state):
    """Write a state of scalars to the STATE_SIZE floats at `place`."""
    for number in tl.static_range(STATE_SIZE):
        tl.store(place + number, state[number])


@triton.jit
def load_states(place, NUMBER: tl.constexpr):
    """The NUMBER states that other programs stored from `place` on: .cg reads past this multiprocessor's own L1."""
    places = place + tl.arange(0, NUMBER) * STATE_SIZE
    state = ()
    for number in tl.static_range(STATE_SIZE):
        state += (tl.load(places + number, cache_modifier=".cg"),)
    return state


@triton.jit
def store_statistics(out, row, stride, state, target_logit, vocab_size):
    """entropy, is_top1, log sum p^2 and mean logit of one row into out [4, rows], as `TokenStatistics` orders them.

    entropy = -sum p log p = log s - (sum e (x - m)) / s. As for argmax, of equal logits the first is the top one.
    """
    row_max, row_sum, row_dot, row_square, row_total, row_before = state
    log_sum = tl.log(row_sum)
    is_top1 = (target_logit >= row_max) & (target_logit > row_before)
    tl.store(out + row, log_sum - row_dot / row_sum)
    tl.store(out + stride + row, is_top1.to(tl.float32))
    tl.store(out + 2 * stride + row, tl.log(row_square) - 2.0 * log_sum)
    tl.store(out + 3 * stride + row, row_total / vocab_size)
