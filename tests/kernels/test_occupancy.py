import doctest
import itertools
import subprocess
from pathlib import Path

import pytest
import triton

from bpo_fast.kernels import aot, occupancy
from bpo_fast.kernels.architectures import ARCHITECTURES
from bpo_fast.kernels.occupancy import Occupancy

# Worked by hand from the programming guide's table; the comment is the working.
BY_HAND = [
    # sm_86: 48 warps / 8 = 6 blocks; 40 * 32 = 1280 registers, 16384 // 1280 = 12 a quarter, 48 in all: 6 blocks.
    ((86, 40, 0, 8), Occupancy(6, 48, 1.0, "warps")),
    # 41 * 32 = 1312 -> 1536; 16384 // 1536 = 10 a quarter, 40 in all: 5 blocks of 8 = 40 of 48 warps.
    ((86, 41, 0, 8), Occupancy(5, 40, 40 / 48, "registers")),
    # 255 * 32 = 8160 -> 8192; 2 a quarter, 8 in all: one block of 8 = 8 of 64 warps.
    ((80, 255, 0, 8), Occupancy(1, 8, 8 / 64, "registers")),
    # 168 * 32 = 5376; 3 a quarter, 12 in all: 6 blocks of 2. (65536 // 5376 = 12 as well.)
    ((89, 168, 0, 2), Occupancy(6, 12, 12 / 48, "registers")),
    # 200 * 32 = 6400; 2 a quarter, 8 in all, though 65536 // 6400 = 10: 4 blocks of 2.
    ((89, 200, 0, 2), Occupancy(4, 8, 8 / 48, "registers")),
    # One warp a block: 16 blocks a multiprocessor on sm_86, 24 on 89 and 120, 32 on 80, 90 and 100.
    ((86, 32, 0, 1), Occupancy(16, 16, 16 / 48, "blocks")),
    ((89, 32, 0, 1), Occupancy(24, 24, 24 / 48, "blocks")),
    ((120, 32, 0, 1), Occupancy(24, 24, 24 / 48, "blocks")),
    ((90, 32, 0, 1), Occupancy(32, 32, 32 / 64, "blocks")),
    # 32 KiB + 1 KiB = 33 KiB: 100 // 33 = 3 blocks on sm_86, 164 // 33 = 4 on sm_80, 228 // 33 = 6 on sm_90.
    ((86, 32, 32 * 1024, 4), Occupancy(3, 12, 12 / 48, "shared memory")),
    ((80, 32, 32 * 1024, 4), Occupancy(4, 16, 16 / 64, "shared memory")),
    ((90, 32, 32 * 1024, 4), Occupancy(6, 24, 24 / 64, "shared memory")),
    # 24 KiB + 1 KiB = 25 KiB: 4 blocks exactly; one byte more is 128 more, and 3 blocks.
    ((86, 32, 24 * 1024, 4), Occupancy(4, 16, 16 / 48, "shared memory")),
    ((86, 32, 24 * 1024 + 1, 4), Occupancy(3, 12, 12 / 48, "shared memory")),
    # 64 / 8 = 8 blocks of 8 warps; 32 registers are 1024 a warp, 16 a quarter, 64 in all.
    ((100, 32, 1024, 8), Occupancy(8, 64, 1.0, "warps")),
    # The largest block that shared memory allows, and one byte more.
    ((86, 32, 99 * 1024, 4), Occupancy(1, 4, 4 / 48, "shared memory")),
    ((86, 32, 99 * 1024 + 1, 4), Occupancy(0, 0, 0.0, "shared memory")),
    # 32 warps of 72 * 32 = 2304 registers are 73,728: more than the 65,536 of a block.
    ((90, 72, 0, 32), Occupancy(0, 0, 0.0, "registers")),
]


@pytest.mark.parametrize(("arguments", "expected"), BY_HAND)
def test_by_hand(arguments, expected):
    assert occupancy.occupancy(*arguments) == expected


NVIDIA = """
#include "cuda_occupancy.h"
#include <stdio.h>

int main(void) {
    long arch, warps, shared_block, registers_, shared, threads;
    while (scanf("%ld %ld %ld %ld %ld %ld", &arch, &warps, &shared_block, &registers_, &shared, &threads) == 6) {
        cudaOccDeviceProp device = {};
        device.computeMajor = arch / 10;
        device.computeMinor = arch % 10;
        device.maxThreadsPerBlock = 1024;
        device.maxThreadsPerMultiprocessor = warps * 32;
        device.regsPerBlock = device.regsPerMultiprocessor = 65536;
        device.warpSize = 32;
        device.sharedMemPerBlock = 48 * 1024;
        device.sharedMemPerMultiprocessor = shared_block + 1024;
        device.numSms = 1;
        device.sharedMemPerBlockOptin = shared_block;
        device.reservedSharedMemPerBlock = 1024;
        cudaOccFuncAttributes kernel = {};
        kernel.maxThreadsPerBlock = 1024;
        kernel.numRegs = registers_;
        kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
        kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
        kernel.maxDynamicSharedSizeBytes = shared_block;
        cudaOccDeviceState state = {};
        state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
        cudaOccResult result;
        cudaOccError error = cudaOccMaxActiveBlocksPerMultiprocessor(
            &result, &device, &kernel, &state, threads, shared);
        printf("%d\\n", error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1);
    }
    return 0;
}
"""


def test_against_nvidias_own_header(tmp_path):
    header = Path(triton.__path__[0]) / "backends" / "nvidia" / "include"
    (tmp_path / "nvidia.cpp").write_text(NVIDIA)
    command = ["c++", "-O0", "-w", "-I", str(header), "-o", str(tmp_path / "nvidia"), str(tmp_path / "nvidia.cpp")]
    subprocess.run(command, check=True)
    registers = (16, 24, 32, 33, 40, 41, 48, 64, 65, 72, 80, 96, 97, 128, 129, 168, 200, 255)
    shared = (0, 1, 32, 1024, 4096, 8064, 16384, 24576, 24577, 33000, 49152, 101376)
    cases = list(itertools.product(ARCHITECTURES, registers, shared, (1, 2, 3, 4, 6, 8, 16, 32)))
    lines = []
    for arch, register_count, size, num_warps in cases:
        limits = ARCHITECTURES[arch]
        numbers = (arch, limits.warps, limits.shared_per_block, register_count, size, num_warps * 32)
        lines.append(" ".join(map(str, numbers)))
    done = subprocess.run(
        [str(tmp_path / "nvidia")], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    expected = [int(line) for line in done.stdout.split()]
    assert -1 not in expected
    found = [occupancy.occupancy(*case).blocks for case in cases]
    wrong = [(case, ours, theirs) for case, ours, theirs in zip(cases, found, expected, strict=True) if ours != theirs]
    assert not wrong, wrong[:5]


def test_a_kernel_of_the_limit_fits_every_architecture():
    assert all(occupancy.occupancy(arch, 32, aot.SHARED_LIMIT, 4).blocks for arch in ARCHITECTURES)
    assert not all(occupancy.occupancy(arch, 32, aot.SHARED_LIMIT + 1, 4).blocks for arch in ARCHITECTURES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((75, 32, 0, 4), f"architecture: found 75, expected one of {', '.join(map(str, ARCHITECTURES))}."),
        ((86, 0, 0, 4), "registers: found 0, expected 1 to 255 a thread."),
        ((86, 32, -1, 4), "shared: found -1, expected a number of bytes that is not negative."),
        ((86, 32, 0, 33), "num_warps: found 33, expected 1 to 32 a block."),
    ],
)
def test_numbers_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match="^" + message.replace(".", r"\.") + "$"):
        occupancy.occupancy(*arguments)


def test_doctests():
    assert doctest.testmod(occupancy).failed == 0
