"""The NVIDIA architectures that everything is compiled for: the one place that names them.

Another one is another line, and docs/kernels-aot.md made anew. `csrc/build_backend.py` runs this file by its path,
where nothing is installed yet: it imports the standard library alone.

The limits are those of the CUDA C++ Programming Guide, appendix "Compute Capabilities", table "Technical
Specifications per Compute Capability", and of its sections on shared memory.
"""

from typing import NamedTuple


class Architecture(NamedTuple):
    """The first CUDA release that compiles for it, and what a multiprocessor holds.

    That is: blocks, warps, 32-bit registers, bytes of shared memory, and how many of these one block may use.
    """

    cuda: tuple[int, int]
    blocks: int
    warps: int
    registers: int
    shared: int
    shared_per_block: int


# By compute capability, in ascending order: the extension also holds PTX of the last, for what comes after it.
ARCHITECTURES = {
    80: Architecture((11, 0), blocks=32, warps=64, registers=65536, shared=164 * 1024, shared_per_block=163 * 1024),
    86: Architecture((11, 1), blocks=16, warps=48, registers=65536, shared=100 * 1024, shared_per_block=99 * 1024),
    89: Architecture((11, 8), blocks=24, warps=48, registers=65536, shared=100 * 1024, shared_per_block=99 * 1024),
    90: Architecture((11, 8), blocks=32, warps=64, registers=65536, shared=228 * 1024, shared_per_block=227 * 1024),
    100: Architecture((12, 8), blocks=32, warps=64, registers=65536, shared=228 * 1024, shared_per_block=227 * 1024),
    120: Architecture((12, 8), blocks=24, warps=48, registers=65536, shared=100 * 1024, shared_per_block=99 * 1024),
}
