"""What operations of our own and of bitsandbytes compute, move and take inside themselves, which PyTorch cannot know.

`Cost` of a call: FLOPs of its products, bytes of their operands and results, bytes of everything else, and memory that
it takes and gives back before it ends.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from bpo_fast.ops.head_products import WIDENED_ROWS
from bpo_fast.ops.head_sweep import (
    CPU_SCRATCH_BYTES,
    GPU_SCRATCH_BYTES,
    GPU_SCRATCH_SHARE,
    LEAST_ROWS,
    TILE_ROWS,
    Arguments,
)
from bpo_fast.ops.rows import BLOCK_BYTES, accumulation_dtype


class Cost(NamedTuple):
    flops: int = 0
    product_bytes: int = 0
    other_bytes: int = 0
    inside: int = 0


class HeadMemory(NamedTuple):
    """What the head takes of a device's memory.

    Attributes:
        logits: bytes of them that it may hold at once, see `ops.head_sweep`.
        block: bytes of the copy of a block of them, from which the CPU has its statistics; a GPU needs none.
        one_pass: bfloat16 gradients are made in one pass over them, in memory of their own, as on a GPU.
        widens: 16-bit operands are widened for a product, the head by slices, as on a CPU.
    """

    logits: int
    block: int
    one_pass: bool
    widens: bool


ON_CPU = HeadMemory(CPU_SCRATCH_BYTES, BLOCK_BYTES, one_pass=False, widens=True)


def on_card(memory_bytes: int) -> HeadMemory:
    """Of a card with so much memory."""
    return HeadMemory(max(GPU_SCRATCH_BYTES, memory_bytes // GPU_SCRATCH_SHARE), 0, one_pass=True, widens=False)


def costs(head: HeadMemory) -> dict[object, Callable[..., Cost]]:
    """Operation -> function of its arguments that gives its cost.

    Args:
        head: what the head takes of the device's memory.
    """
    _load_operations()
    found = {
        torch.ops.bpo_fast.linear_token_logps: lambda *arguments: _head(Arguments(*arguments), head),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    if hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        found[torch.ops.bitsandbytes.gemm_4bit] = _gemm_4bit
    return found


def _load_operations():
    """bitsandbytes, where it is installed, and the head: what defines the operations."""
    from importlib.util import find_spec

    if find_spec("bitsandbytes"):
        import bitsandbytes  # noqa: F401


def _head(given: Arguments, memory: HeadMemory) -> Cost:
    """4 N H V for the policy, 2 N H V for a reference or without a gradient, in chunks of the scratch memory."""
    (count, width), vocab = given.hidden.shape, len(given.weight)
    wide, narrow = accumulation_dtype(given.hidden.dtype).itemsize, given.hidden.element_size()
    rows = max(LEAST_ROWS, memory.logits // (wide * vocab) // TILE_ROWS * TILE_ROWS)
    chunks = -(-count // rows)
    sweeps = 1 + (given.ref_hidden is not None)
    products = sweeps + given.with_rows
    logits = count * vocab
    moved = sweeps * (count * width * narrow + logits * wide)
    if given.with_rows:
        moved += logits * narrow + count * width * wide
    moved += products * chunks * vocab * width * narrow
    held = min(rows, count)
    one_pass = given.with_rows and memory.one_pass and given.hidden.dtype == torch.bfloat16
    # Beside the products logits are read once for a log-prob, and once more to be turned if that is another pass.
    transformed = sweeps * wide + given.with_rows * (narrow + (not one_pass) * wide)
    inside = held * (vocab + width * given.with_rows) * wide
    if one_pass:
        inside += held * vocab * narrow
    # What a product takes is gone when the statistics are made.
    widened = (min(WIDENED_ROWS, vocab) + held) * width * wide if memory.widens and narrow < wide else 0
    inside += max(widened, min(memory.block, held * vocab * wide) if given.with_statistics else 0)
    return Cost(products * 2 * count * width * vocab, moved, transformed * logits, inside)


def _gemm_4bit(hidden, packed, shape, *others, **options) -> Cost:
    """Many rows meet a dequantised copy of the weight, which is then gone."""
    count, (out, width) = hidden.numel() // hidden.shape[-1], shape
    weight = out * width * hidden.element_size()
    moved = (hidden.numel() + count * out) * hidden.element_size() + weight
    return Cost(2 * count * width * out, moved, packed.numel() * packed.element_size() + weight, weight)


def _attention(query, key, value, *others, **options) -> Cost:
    flops = sdpa_flop_count(query.shape, key.shape, value.shape)
    return Cost(flops, _bytes(query, key, value, query))


def _attention_backward(gradient, query, key, value, *others, **options) -> Cost:
    flops = sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)
    return Cost(flops, 2 * _bytes(query, key, value) + 2 * _bytes(gradient))


def _bytes(*tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
