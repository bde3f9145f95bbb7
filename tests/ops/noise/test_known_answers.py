"""Stored bits of every noise op, which the CPU and the GPU must both give, and the two side by side on larger inputs.

`python tests/ops/noise/test_known_answers.py` writes the file anew from the CPU; a changed bit in it changes every
data set that was bootstrapped before.
"""

import json
from pathlib import Path

import pytest
import torch

from bpo_fast import NoiseSchedule, add_noise
from bpo_fast.ops.noise import native
from bpo_fast.ops.noise.ladder import add_noise_ladder
from bpo_fast.ops.noise.rows import CLEAN, add_noise_rows

ANSWERS = Path(__file__).with_name("known_answers.json")
SIGMOID = NoiseSchedule.sigmoid()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WIDTHS = (8, 5)  # 16-byte rows, and rows that no vector access fits
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(
                not (torch.cuda.is_available() and native.extension().cuda_built),
                reason="needs an NVIDIA GPU, a CUDA build of torch and bpo_fast._C with its CUDA half",
            ),
        ],
    ),
]
on_gpu = pytest.mark.parametrize("device", DEVICES[1:])
SEED, IDS = 0x243F6A8885A308D3, (0, -1, 2**40 + 7)


def raw(tensor):
    """The words of a tensor, as integers."""
    return tensor.cpu().contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def exact(*shape, dtype):
    """Multiples of 1/16 that every dtype holds, the same on every machine, with infinities and a NaN among them."""
    count = torch.Size(shape).numel()
    values = (((torch.arange(count) * 37) % 101 - 50) / 16).to(dtype)
    values[1], values[count // 2], values[count - 2] = float("inf"), -float("inf"), float("nan")
    return values.view(shape)


def run_add_noise(dtype, out_dtype, width, device):
    steps = torch.tensor([0, 999, 500], device=device)
    x, ids = exact(3, 3, width, dtype=dtype).to(device), torch.tensor(IDS, device=device)
    return add_noise(x, steps, schedule=SIGMOID, seed=SEED, sample_ids=ids)


def run_ladder(dtype, out_dtype, width, device):
    x, ids = exact(3, 2, width, dtype=dtype).to(device), torch.tensor(IDS, device=device)
    return add_noise_ladder(x, [0, 700, 999], schedule=SIGMOID, seed=SEED, sample_ids=ids)


def run_rows(dtype, out_dtype, width, device):
    out = torch.zeros(7, width, dtype=out_dtype, device=device)
    return add_noise_rows(
        exact(4, 2, width, dtype=dtype).to(device),
        torch.tensor([300, CLEAN, 900]),
        out=out,
        rows=torch.tensor([5, 6, 0, 3, 2, 1]),
        source=torch.tensor([3, 0, 2]),
        schedule=SIGMOID,
        seed=SEED,
    )


RUNS = {"add_noise": run_add_noise, "add_noise_ladder": run_ladder, "add_noise_rows": run_rows}


def cases():
    for op in RUNS:
        for dtype in DTYPES:
            for out_dtype in DTYPES if op == "add_noise_rows" else (dtype,):
                for width in WIDTHS:
                    yield op, dtype, out_dtype, width


def words(case, device):
    """The result of a case as hexadecimal words in a line."""
    op, dtype, out_dtype, width = case
    result = RUNS[op](DTYPES[dtype], DTYPES[out_dtype], width, device)
    digits = 8 if out_dtype == "float32" else 4
    return " ".join(f"{word & (16**digits - 1):0{digits}x}" for word in raw(result).flatten().tolist())


def name_of(case):
    op, dtype, out_dtype, width = case
    return f"{op} {dtype} to {out_dtype} width {width}"


def test_every_case_is_stored():
    assert list(json.loads(ANSWERS.read_text())) == [name_of(case) for case in cases()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", list(cases()), ids=name_of)
def test_known_answers(case, device):
    assert words(case, device) == json.loads(ANSWERS.read_text())[name_of(case)]


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("n", [1, 1000, 1023, 100_000])
def test_ladder_is_the_same_on_both(device, dtype, n):
    x = torch.randn(5, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    options = {"schedule": SIGMOID, "seed": -5, "sample_ids": torch.tensor([0, -1, 2**40, 7, 3])}
    for steps in ([900], torch.tensor([0, 500, 999, 500])):
        on_cpu = add_noise_ladder(x, steps, **options)
        assert torch.equal(raw(add_noise_ladder(x.to(device), steps, **options)), raw(on_cpu))


@on_gpu
@pytest.mark.parametrize("out_dtype", DTYPES.values())
@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize(("width", "columns"), [(4096, slice(None)), (1001, slice(None)), (64, slice(1, 65))])
def test_rows_are_the_same_on_both(device, dtype, out_dtype, width, columns):
    """Aligned rows, rows of odd width, and rows that start off the 16 bytes; index tensors on either device."""
    x = torch.randn(6, 17, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    step, source = torch.tensor([CLEAN, 0, 500, 999]), torch.tensor([5, 0, 0, 3])
    rows = torch.randperm(90, generator=torch.Generator().manual_seed(1))[: 4 * 17]

    def write(place, index_place):
        out = torch.zeros(90, width + 8, dtype=out_dtype, device=place)
        target = out[:, columns] if columns.start else out[:, :width]
        options = {"rows": rows.to(index_place), "source": source.to(index_place), "schedule": SIGMOID, "seed": 11}
        add_noise_rows(x.to(place), step.to(index_place), out=target, **options)
        return raw(out)

    expected = write("cpu", "cpu")
    assert torch.equal(write(device, "cpu"), expected)
    assert torch.equal(write(device, device), expected)


@on_gpu
def test_gpu_indices_are_checked(device):
    x, out = torch.zeros(2, 2, 8, device=device), torch.zeros(5, 8, device=device)
    for rows, sentence in (
        [[0, 1, 2, 5], "^rows: found 5, expected 0 to 4"],
        [[0, 1, 2, 2], "^rows: found row 2 of out more than once"],
    ):
        with pytest.raises(ValueError, match=sentence):
            add_noise_rows(x, out=out, rows=torch.tensor(rows, device=device))


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_every_16_bit_word_is_cast_alike(device, dtype):
    """The GPU's conversion instructions against the CPU's integer arithmetic, on every word and rounding boundary."""
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    if dtype == torch.float32:
        x = torch.cat([(high + low).view(torch.float32) for low in (-1, 0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000)])
    else:
        x = (high >> 16).to(torch.int16).view(dtype)
    x = x.view(1, -1, 64)
    for out_dtype in DTYPES.values():
        made = [
            add_noise_rows(
                x.to(place),
                out=torch.empty(x.shape[1], 64, dtype=out_dtype, device=place),
                rows=torch.arange(x.shape[1]),
            )
            for place in ("cpu", device)
        ]
        assert torch.equal(raw(made[0]), raw(made[1]))


@pytest.mark.gpu("12 GiB of memory")
@on_gpu
def test_past_2_to_the_31_elements(device):
    """64-bit offsets: the last rows of an output that 32 bits cannot address."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    width = 4096
    out = torch.zeros(2**31 // width + 8, width, dtype=torch.bfloat16, device=device)
    x = torch.randn(2, 2, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows, options = torch.tensor([1, len(out) - 1, len(out) - 4, 3]), {"schedule": SIGMOID, "seed": 2}
    add_noise_rows(x.to(device), 700, out=out, rows=rows, **options)
    expected = add_noise(x, 700, **options).view(4, width)
    assert torch.equal(raw(out[rows.to(device)]), raw(expected))
    assert int(out[-8:].count_nonzero()) == int(expected[1:3].count_nonzero())


if __name__ == "__main__":
    answers = {name_of(case): words(case, "cpu") for case in cases()}
    ANSWERS.write_text(json.dumps(answers, indent=1) + "\n")
