"""csrc/noise_cuda.cu as it is, built by the host's compiler and run thread by thread: the bits of the CPU op."""

import ctypes
import itertools
import math
import mmap
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from bpo_fast import _C

ROOT = Path(__file__).resolve().parents[2]
SHIM = Path(__file__).with_name("cuda_on_host")
COMPILER = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PAIRS = list(itertools.product(CODES, CODES))
# (multiprocessors, blocks that each holds): one block for everything, strides in every dimension, a block a pack.
GPUS = [(1, 1), (7, 1), (1000, 8)]
SCALES = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.1, 0.99], [3e-8, 1e-5]])
SEED = 0x243F6A8885A308D3
IDS = (0, -1, 2**40 + 7, 5, 2**63 - 1)
POINTERS, SIZES = ("scales", "steps", "ids", "source", "out_rows"), ("samples", "n", "x_stride", "out_stride", "width")


class Arguments(ctypes.Structure):
    """NoiseArguments of csrc/philox_normal.h, field by field."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "out")]
    _fields_ += [(name, ctypes.c_int64) for name in (*SIZES, "levels", "level_stride")]
    _fields_ += [(name, ctypes.c_void_p) for name in POINTERS]
    _fields_ += [("seed", ctypes.c_int64), ("ladder", ctypes.c_bool)]


class HostGpu(ctypes.Structure):
    """HostGpu of cuda_on_host/cuda_runtime.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("devices", "has_kernel", "processors")]
    _fields_ += [(name, ctypes.c_int64) for name in ("blocks_per_processor", "every")]
    _fields_ += [(name, ctypes.c_int64) for name in ("current_device", "stream")]
    _fields_ += [("blocks", ctypes.c_int64 * 3), ("threads", ctypes.c_int64), ("misaligned", ctypes.c_int64)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    output = tmp_path_factory.mktemp("cuda_on_host") / "noise_on_host.so"
    command = [COMPILER, "-shared", "-fPIC", "-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno"]
    command += ["-fno-strict-aliasing", "-DBPO_CUDA", f"-I{SHIM}", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, SHIM / "noise_on_host.cpp", "-o", output], check=True)
    library = ctypes.CDLL(str(output))
    library.gpu.restype = ctypes.POINTER(HostGpu)
    library.size_of_arguments.restype = library.pairs_changed.restype = ctypes.c_size_t
    library.pairs_changed.argtypes = [ctypes.c_uint32] * 4 + [ctypes.c_size_t]
    library.roots_missed.restype, library.refined_root.restype = ctypes.c_size_t, ctypes.c_float
    library.roots_missed.argtypes = [ctypes.c_double, ctypes.c_uint32]
    library.refined_root.argtypes = [ctypes.c_float, ctypes.c_float]
    library.first_normals.argtypes = [
        ctypes.c_uint64,
        ctypes.c_size_t,
        ctypes.c_uint64,
        ctypes.c_uint64,
        ctypes.c_void_p,
    ]
    assert library.size_of_arguments() == ctypes.sizeof(Arguments)
    return library


@pytest.fixture
def gpu(library):
    """The GPU that the host plays; as it was after the test."""
    gpu = library.gpu().contents
    before = bytes(gpu)
    yield gpu
    ctypes.memmove(ctypes.addressof(gpu), before, len(before))


def fields_of(**arguments):
    """Arguments as the extension takes them; a tensor stands for its address."""
    pointed = {name: value.data_ptr() if torch.is_tensor(value) else value for name, value in arguments.items()}
    return {"levels": 1, "level_stride": 0, "seed": SEED, "ladder": False} | pointed


def noise_cuda(library, dtypes, fields, device=0, stream=0):
    """Run the CUDA half; the sentence of its error, or "" where there is none."""
    seed = ctypes.c_int64(fields["seed"]).value
    message = ctypes.create_string_buffer(500)
    arguments = Arguments(**fields | {"seed": seed})
    codes = [CODES[dtype] for dtype in dtypes]
    library.noise_cuda(ctypes.byref(arguments), *codes, device, ctypes.c_size_t(stream), message, len(message))
    return message.value.decode()


def noise_cpu(dtypes, fields):
    arguments = _C.NoiseArguments(**fields | {"seed": ctypes.c_int64(fields["seed"]).value})
    _C.noise_cpu(arguments, *(CODES[dtype] for dtype in dtypes))


def raw(tensor):
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def memory(size, offset, dtype, filled):
    """Values, or the same word everywhere: `size` elements `offset` past a multiple of 256 bytes.

    Returns them with a margin before and behind, and from the first of them on.
    """
    buffer = torch.empty(size + offset + 384, dtype=dtype)
    start = -buffer.data_ptr() % 256 // buffer.element_size()
    whole = buffer[start : start + size + offset + 256]
    raw(whole).fill_(0x5A5A)
    values = whole[128 + offset :]
    if filled:
        values.copy_(torch.randn(len(values), generator=torch.Generator().manual_seed(0)) * 3)
        values[:6] = torch.tensor([0.0, -0.0, 1e-40, float("inf"), -float("inf"), float("nan")])
    return whole, values


def check_form(library, gpu, x_size, out_size, x_offset=0, out_offset=0, in_place=False, **arguments):
    """The same call on both, for every pair of dtypes and GPU: all of out's memory alike, none misaligned."""
    for dtypes in PAIRS:
        if in_place and dtypes[0] != dtypes[1]:
            continue
        (_, x), results = memory(x_size, x_offset, dtypes[0], filled=True), []
        for processors, blocks in (None, None), *GPUS:
            whole, out = memory(out_size, out_offset, dtypes[1], filled=in_place)
            fields = fields_of(x=out if in_place else x, out=out, scales=SCALES, **arguments)
            if processors is None:
                noise_cpu(dtypes, fields)
                expected = raw(whole)
                continue
            gpu.processors, gpu.blocks_per_processor = processors, blocks
            assert noise_cuda(library, dtypes, fields) == ""
            differ = (raw(whole) != expected).nonzero().flatten().tolist()
            assert not differ, (dtypes, processors, len(differ), differ[:5])
            results.append(tuple(gpu.blocks))
        assert results[0] == (1, 1, 1)


# n of 16, 8, 4 and 1 (bytes of the narrowest type) elements, from one element to several blocks of threads.
@pytest.mark.parametrize("n", [1, 3, 4, 8, 16, 17, 504, 1000, 1003, 1004, 4096, 12_352])
def test_samples(library, gpu, n):
    steps, ids = torch.tensor([0, 3, -1, 1, 2]), torch.tensor(IDS)
    check_form(library, gpu, 5 * n, 5 * n, samples=5, n=n, width=n, x_stride=n, out_stride=n, steps=steps, ids=ids)


@pytest.mark.parametrize(
    ("x_stride", "out_stride"), [(1024, 1536), (1008, 1016), (1001, 1000), (1000, 1003), (0, 1000)]
)
def test_strides(library, gpu, x_stride, out_stride):
    sizes = {"samples": 3, "n": 1000, "width": 1000, "x_stride": x_stride, "out_stride": out_stride}
    check_form(library, gpu, 2 * x_stride + 1000, 2 * out_stride + 1000, **sizes)


@pytest.mark.parametrize(("x_offset", "out_offset"), [(1, 0), (0, 1), (0, 2), (4, 4), (8, 8)])
def test_addresses(library, gpu, x_offset, out_offset):
    sizes = {"samples": 3, "n": 1000, "width": 1000, "x_stride": 1000, "out_stride": 1000}
    check_form(library, gpu, 3000, 3000, x_offset=x_offset, out_offset=out_offset, **sizes)


@pytest.mark.parametrize("n", [1000, 1001])
def test_in_place(library, gpu, n):
    sizes = {"samples": 3, "n": n, "width": n, "x_stride": n, "out_stride": n}
    check_form(library, gpu, 1, 3 * n, in_place=True, steps=torch.tensor([1, -1, 2]), **sizes)


@pytest.mark.parametrize(("n", "gap"), [(1000, 0), (1000, 8), (1000, 3), (1001, 0), (4096, 0)])
def test_ladder(library, gpu, n, gap):
    level = 2 * n + gap
    sizes = {"samples": 2, "n": n, "width": n, "x_stride": n, "out_stride": n, "levels": 4, "level_stride": level}
    check_form(library, gpu, 2 * n, 4 * level, steps=torch.tensor([3, 0, 2, 1]), ladder=True, **sizes)


@pytest.mark.parametrize(
    ("width", "gap"), [(64, 0), (64, 8), (64, 1), (24, 0), (20, 4), (7, 0), (1, 0), (1000, 0), (1152, 0), (4096, 0)]
)
def test_rows(library, gpu, width, gap):
    """Images in an order of their own, one of them twice and one clean, to rows of a packed sequence."""
    rows, step = torch.tensor([11, 3, 4, 0, 8, 1, 2, 9, 5, 7, 6, 12]), torch.tensor([2, -1, 1, 0])
    source, ids = torch.tensor([4, 0, 0, 2]), torch.tensor(IDS[:4])
    sizes = {"samples": 4, "n": 3 * width, "width": width, "x_stride": 3 * width, "out_stride": width + gap}
    names = {"steps": step, "source": source, "ids": ids, "out_rows": rows}
    check_form(library, gpu, 15 * width, 13 * (width + gap), **sizes, **names)


def sparse(elements, dtype):
    """Zeros that take memory where they are written only."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.from_numpy(np.frombuffer(mmap.mmap(-1, elements * 4, flags=flags), dtype=np.int32)).view(dtype)


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "n"),
    [
        (torch.float32, 2**31 + 1003),
        (torch.float32, 2**32 + 4096),
        (torch.bfloat16, 2**32 + 1003),
        (torch.bfloat16, 2**34 + 4096),
        (torch.bfloat16, 2**34 + 1003),
        (torch.float16, 2**34 + 4096),
    ],
)
def test_counters_past_32_bits(library, gpu, dtype, n, turns):
    """The ends of a sample of up to 2^34 elements, where the number of a block passes 32 bits.

    Most of what is between them is not run. A thread takes `turns` shares.
    """
    x, out, sample_id = sparse(n, dtype), sparse(n, dtype), 2**63 - 2**40
    scales, ids = torch.tensor([[1.0, 1.0]]), torch.tensor([sample_id])
    sizes = {"samples": 1, "n": n, "width": n, "x_stride": n, "out_stride": n}
    fields = fields_of(x=x, out=out, scales=scales, ids=ids, **sizes)
    gpu.processors, gpu.every = 2**27, -1
    assert noise_cuda(library, (dtype, dtype), fields) == ""  # nothing is run; it shows the grid
    gpu.processors = -(-gpu.blocks[0] // turns)
    gpu.every = 2**20
    assert noise_cuda(library, (dtype, dtype), fields) == ""
    assert gpu.blocks[0] == gpu.processors
    for begin in [0, n - n % 4 - 1024, *([2**34 - 512] if n > 2**34 else [])]:
        count, eps = min(1028, n - begin), torch.empty(1028)
        library.first_normals(begin, 1028, sample_id, SEED, eps.data_ptr())
        assert torch.equal(out[begin : begin + count], eps[:count].to(dtype)), begin


def test_normals_are_those_of_the_first_release(library):
    """Pairs of words over the whole of both ranges, and those at their ends, where u is 1 or nearly 0."""
    for word0, word1, step0, step1, count in [
        (0, 0, 2_654_435_761, 1_640_531_527, 2**19),
        (0, 0x7FFFFF00, 1, 1, 2**10),
        (0xFFFFFC00, 0xFFFFFC00, 1, 1, 2**11),
        (0xFFFFFFFF, 0, 0, 1 << 14, 2**18),
        (0, 0xC0000000, 1 << 14, 0, 2**18),
    ]:
        assert library.pairs_changed(word0, word1, step0, step1, count) == 0


def test_the_root_is_correctly_rounded(library):
    """From any approximation that the reciprocal root of a GPU can be, and of -0, the one zero that there is."""
    assert library.roots_missed(-23.3, 7) == 0
    assert library.roots_missed(-20.0, 7) > 0  # the count sees a miss
    root = library.refined_root(-0.0, 2.0**50)
    assert (root, math.copysign(1, root)) == (0, -1)


@pytest.mark.parametrize("form", ["samples", "n", "levels"])
def test_nothing_to_do_is_not_launched(library, gpu, form):
    fields = fields_of(x=0, out=0, scales=SCALES, samples=1, n=8, width=8, x_stride=8, out_stride=8) | {form: 0}
    assert noise_cuda(library, (torch.float32, torch.float32), fields) == ""
    assert gpu.threads == 0


def test_device_and_stream(library, gpu):
    """The launch is on the device and the stream that it is given, and says what went wrong on which."""
    gpu.devices = 3
    x = torch.zeros(8)
    fields = fields_of(x=x, out=x, scales=SCALES, samples=1, n=8, width=8, x_stride=8, out_stride=8)
    dtypes = (torch.float32, torch.float32)
    assert noise_cuda(library, dtypes, fields, device=2, stream=0x1230) == ""
    assert (gpu.current_device, gpu.stream) == (2, 0x1230)
    sentence = "cudaSetDevice of GPU 3: found CUDA error 101 (invalid device ordinal), expected success; run `bpo-fast"
    assert noise_cuda(library, dtypes, fields, device=3).startswith(sentence)
    assert gpu.current_device == 2
    assert noise_cuda(library, dtypes, fields, device=1) == ""  # the error of the call before is not this one's


def test_a_gpu_without_code_for_it_is_said(library, gpu):
    gpu.has_kernel = 0
    x = torch.zeros(8)
    fields = fields_of(x=x, out=x, scales=SCALES, samples=1, n=8, width=8, x_stride=8, out_stride=8)
    found = noise_cuda(library, (torch.float32, torch.float32), fields)
    assert found.startswith("launch of noise_kernel: found CUDA error 209 (no kernel image is available for execution")
