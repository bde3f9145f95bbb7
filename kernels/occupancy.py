"""Theoretical occupancy: how many warps of a kernel a multiprocessor holds at once, of how many it could.

The limits are those of the CUDA C++ Programming Guide, appendix "Compute Capabilities", table "Technical
Specifications per Compute Capability" (blocks, warps, registers and shared memory a multiprocessor; registers a
thread; shared memory a block) and of its sections on shared memory, which say that 1 KB a block is the system's. How
registers and shared memory are rounded up is not in that table but in NVIDIA's `cuda_occupancy.h` (in the CUDA toolkit
and in the triton package), against which the tests compare this file.
"""

from typing import NamedTuple

WARP_SIZE = 32
MAX_THREADS_PER_BLOCK = 1024
MAX_REGISTERS_PER_THREAD = 255
REGISTERS_PER_BLOCK = 64 * 1024
# The same on all architectures below: registers are dealt out to a warp, from the quarter of the register file that
# the warp lives on, in units of 256; shared memory in units of 128 bytes, 1 KB of a block's for the system.
PARTITIONS = 4
REGISTER_UNIT = 256
SHARED_UNIT = 128
SYSTEM_SHARED = 1024


class Limits(NamedTuple):
    """What a multiprocessor holds: blocks, warps, 32-bit registers, bytes of shared memory, and how many a block."""

    blocks: int
    warps: int
    registers: int
    shared: int
    shared_per_block: int


LIMITS = {
    80: Limits(blocks=32, warps=64, registers=64 * 1024, shared=164 * 1024, shared_per_block=163 * 1024),
    86: Limits(blocks=16, warps=48, registers=64 * 1024, shared=100 * 1024, shared_per_block=99 * 1024),
    89: Limits(blocks=24, warps=48, registers=64 * 1024, shared=100 * 1024, shared_per_block=99 * 1024),
    90: Limits(blocks=32, warps=64, registers=64 * 1024, shared=228 * 1024, shared_per_block=227 * 1024),
    100: Limits(blocks=32, warps=64, registers=64 * 1024, shared=228 * 1024, shared_per_block=227 * 1024),
    120: Limits(blocks=24, warps=48, registers=64 * 1024, shared=100 * 1024, shared_per_block=99 * 1024),
}


class Occupancy(NamedTuple):
    """Blocks and warps that a multiprocessor holds, the share of the warps it could, and what does not allow more.

    `limited_by` is one of "warps", "blocks", "registers", "shared memory": of several equally tight ones, the first.
    """

    blocks: int
    warps: int
    share: float
    limited_by: str


def _round_up(value, unit):
    return -(-value // unit) * unit


def occupancy(architecture, registers, shared, num_warps):
    """Occupancy of a kernel on sm_`architecture`.

    Args:
        architecture: compute capability as a number, such as 86.
        registers: registers a thread.
        shared: bytes of shared memory a block, static and dynamic, without the system's kilobyte.
        num_warps: warps a block.

    Returns:
        `Occupancy`; one of 0 blocks if not even one block fits.

    Raises:
        ValueError: an architecture that is not in `LIMITS`, a number out of its range.

    >>> occupancy(86, registers=40, shared=0, num_warps=8)
    Occupancy(blocks=6, warps=48, share=1.0, limited_by='warps')
    >>> occupancy(86, registers=64, shared=0, num_warps=8).limited_by
    'registers'
    """
    if architecture not in LIMITS:
        raise ValueError(f"architecture must be one of {', '.join(map(str, LIMITS))}, got {architecture!r}.")
    if not 1 <= registers <= MAX_REGISTERS_PER_THREAD:
        raise ValueError(f"registers must be from 1 to {MAX_REGISTERS_PER_THREAD} a thread, got {registers!r}.")
    if not 1 <= num_warps <= MAX_THREADS_PER_BLOCK // WARP_SIZE:
        raise ValueError(
            f"num_warps must be from 1 to {MAX_THREADS_PER_BLOCK // WARP_SIZE} a block, got {num_warps!r}."
        )
    if shared < 0:
        raise ValueError(f"shared must be a number of bytes that is not negative, got {shared!r}.")
    limits = LIMITS[architecture]
    registers_per_warp = _round_up(registers * WARP_SIZE, REGISTER_UNIT)
    warps_by_registers = limits.registers // PARTITIONS // registers_per_warp * PARTITIONS
    by_registers = warps_by_registers // num_warps
    # A block whose warps cannot be dealt out evenly is launched only if it would fit with the gaps filled.
    if registers_per_warp * _round_up(num_warps, PARTITIONS) > REGISTERS_PER_BLOCK:
        by_registers = 0
    by_shared = limits.shared // _round_up(shared + SYSTEM_SHARED, SHARED_UNIT)
    if shared > limits.shared_per_block:
        by_shared = 0
    blocks_by = {
        "warps": limits.warps // num_warps,
        "blocks": limits.blocks,
        "registers": by_registers,
        "shared memory": by_shared,
    }
    limited_by = min(blocks_by, key=blocks_by.get)
    blocks = blocks_by[limited_by]
    return Occupancy(blocks, blocks * num_warps, blocks * num_warps / limits.warps, limited_by)
