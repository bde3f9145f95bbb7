"""Theoretical occupancy: how many warps of a kernel a multiprocessor holds at once, of how many it could.

The limits stand in `architectures.py`. How registers and shared memory are rounded up is not in the programming
guide's table but in NVIDIA's `cuda_occupancy.h` (in the CUDA toolkit and in the triton package), against which the
tests compare this file.
"""

from typing import NamedTuple

from bpo_fast.kernels.architectures import ARCHITECTURES

WARP_SIZE = 32
MAX_WARPS_PER_BLOCK = 1024 // WARP_SIZE
MAX_REGISTERS_PER_THREAD = 255
REGISTERS_PER_BLOCK = 64 * 1024
# The same on every architecture: registers are given to a warp, from the quarter of the register file that the warp
# lives on, in units of 256; shared memory in units of 128 bytes, 1 KB of a block's for the system.
PARTITIONS = 4
REGISTER_UNIT = 256
SHARED_UNIT = 128
SYSTEM_SHARED = 1024


class Occupancy(NamedTuple):
    """Blocks and warps that a multiprocessor holds, the share of the warps it could, and what limits them.

    `limited_by` is one of "warps", "blocks", "registers", "shared memory": of several equal limits, the first.
    """

    blocks: int
    warps: int
    share: float
    limited_by: str


def _round_up(value, unit):
    return -(-value // unit) * unit


def occupancy(architecture: int, registers: int, shared: int, num_warps: int) -> Occupancy:
    """Occupancy of a kernel on sm_`architecture`.

    Args:
        architecture: compute capability as a number, such as 86.
        registers: registers a thread.
        shared: bytes of shared memory a block, static and dynamic, without the system's kilobyte.
        num_warps: warps a block.

    Returns:
        `Occupancy`; one of 0 blocks if not even one block fits.

    Raises:
        ValueError: an architecture that is not in `ARCHITECTURES`, a number out of its range.

    >>> occupancy(86, registers=40, shared=0, num_warps=8)
    Occupancy(blocks=6, warps=48, share=1.0, limited_by='warps')
    >>> occupancy(86, registers=64, shared=0, num_warps=8).limited_by
    'registers'
    """
    if architecture not in ARCHITECTURES:
        known = ", ".join(map(str, ARCHITECTURES))
        raise ValueError(f"architecture: found {architecture!r}, expected one of {known}.")
    if not 1 <= registers <= MAX_REGISTERS_PER_THREAD:
        raise ValueError(f"registers: found {registers!r}, expected 1 to {MAX_REGISTERS_PER_THREAD} a thread.")
    if not 1 <= num_warps <= MAX_WARPS_PER_BLOCK:
        raise ValueError(f"num_warps: found {num_warps!r}, expected 1 to {MAX_WARPS_PER_BLOCK} a block.")
    if shared < 0:
        raise ValueError(f"shared: found {shared!r}, expected a number of bytes that is not negative.")
    limits = ARCHITECTURES[architecture]
    registers_per_warp = _round_up(registers * WARP_SIZE, REGISTER_UNIT)
    warps_by_registers = limits.registers // PARTITIONS // registers_per_warp * PARTITIONS
    by_registers = warps_by_registers // num_warps
    # A block whose warps cannot be spread evenly is launched only if it would fit with the gaps filled.
    if registers_per_warp * _round_up(num_warps, PARTITIONS) > REGISTERS_PER_BLOCK:
        by_registers = 0
    by_shared = limits.shared // _round_up(shared + SYSTEM_SHARED, SHARED_UNIT)
    if shared > limits.shared_per_block:
        by_shared = 0
    blocks_by = {"warps": limits.warps // num_warps, "blocks": limits.blocks}
    blocks_by |= {"registers": by_registers, "shared memory": by_shared}
    limited_by = min(blocks_by, key=blocks_by.get)
    blocks = blocks_by[limited_by]
    return Occupancy(blocks, blocks * num_warps, blocks * num_warps / limits.warps, limited_by)
