"""bpo_fast._C by itself: the generator, every instruction set, threads, storage types."""

import re

import numpy as np
import pytest
import torch

from bpo_fast import _C

KNOWN_PHILOX = [  # counter, key, words: Random123's own known answers
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
# The first eight normals of a stream. A change of one bit here changes every data set that was bootstrapped before.
KNOWN_NORMALS = [  # seed, sample id, float32 bits
    (0, 0, "bf6cb6b0 bf7dbb31 bf1e1b9f 3ef6d1b2 3e1d5354 3e392a67 3f54ec98 3e4a2da3"),
    (0x243F6A8885A308D3, 2**62 + 12345, "3fb4e64c bf754ca4 3f5d734c bf25d6e8 bf5c0a4c bdfa058b 3ef4edda 3f650aaf"),
    (-1, -1, "bf17be11 3fcac635 3fa05848 be93eb5e 3efcb0f2 3f6dd207 bf193655 be2d113e"),
]
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
UNCOMMON_N = 40_003  # several units of work, a last tile that is not whole, a last block that is not whole


def hex_words(text):
    return [int(word, 16) for word in text.split()]


def noise_cpu(x, scale, noise_scale, *, seed=0, ids=None, isa="", threads=1, out_dtype=None):
    """x [B, n] -> x * scale + eps * noise_scale, straight from the extension."""
    out = torch.empty_like(x, dtype=out_dtype)
    scales = torch.tensor([[scale, noise_scale]], dtype=torch.float32)
    samples, n = x.shape
    arguments = _C.NoiseArguments(
        x=x.data_ptr(),
        out=out.data_ptr(),
        samples=samples,
        n=n,
        width=n,
        x_stride=n,
        out_stride=n,
        scales=scales.data_ptr(),
        ids=0 if ids is None else ids.data_ptr(),
        seed=seed,
    )
    _C.noise_cpu(arguments, CODES[x.dtype], CODES[out.dtype], threads, isa)
    return out


def normals(n, *, seed=0, sample_id=0, **options):
    return noise_cpu(torch.zeros(1, n), 0.0, 1.0, seed=seed, ids=torch.tensor([sample_id]), **options)[0]


def philox_numpy(blocks, sample_id, seed):
    """Philox4x32-10 as the paper writes it, in numpy: uint64 [N] block numbers -> 4 arrays of words."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1 = blocks & low, blocks >> shift
    c2 = np.full_like(blocks, sample_id & 0xFFFFFFFF)
    c3 = np.full_like(blocks, (sample_id >> 32) & 0xFFFFFFFF)
    key0, key1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (product1 >> shift) ^ c1 ^ np.uint64(key0), product1 & low
        c2, c3 = (product0 >> shift) ^ c3 ^ np.uint64(key1), product0 & low
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def box_muller_float64(word0, word1):
    """The transform as philox_normal.h states it, in double precision from the uniform that fp32 holds."""
    u = (word0.astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33).astype(np.float32).astype(np.float64)
    radius = np.sqrt(-2 * np.log(u))
    signed = (word1 << np.uint64(2)).astype(np.uint32).view(np.int32)
    angle = signed.astype(np.float32).astype(np.float64) * 2.0**-31 * np.pi / 4
    sine, cosine = np.sin(angle), np.cos(angle)
    cosine = np.where(word1 & np.uint64(1 << 31), -cosine, cosine)
    swap = (word1 & np.uint64(1 << 30)) != 0
    return radius * np.where(swap, sine, cosine), radius * np.where(swap, cosine, sine)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_PHILOX)
def test_philox_known_answers(counter, key, words):
    assert list(_C.philox4x32_10(hex_words(counter), hex_words(key))) == hex_words(words)


@pytest.mark.parametrize("isa", _C.cpu_isas())
@pytest.mark.parametrize(("seed", "sample_id", "bits"), KNOWN_NORMALS)
def test_normal_known_answers(seed, sample_id, bits, isa):
    found = normals(8, seed=seed, sample_id=sample_id, isa=isa).view(torch.int32)
    assert [bits & 0xFFFFFFFF for bits in found.tolist()] == hex_words(bits)


@pytest.mark.parametrize(("seed", "sample_id"), [(0, 0), (0x0123456789ABCDEF, 0x7EDCBA9876543210)])
def test_layout_and_transform_against_float64(seed, sample_id):
    n = 1 << 20
    words = philox_numpy(np.arange(n // 4, dtype=np.uint64), sample_id, seed)
    expected = np.stack([*box_muller_float64(*words[:2]), *box_muller_float64(*words[2:])], axis=1).reshape(-1)
    found = normals(n, seed=seed, sample_id=sample_id).double().numpy()
    ulps = np.abs(found - expected) / np.spacing(np.abs(expected).astype(np.float32))
    assert ulps.max() < 4


@pytest.mark.parametrize("out_dtype", CODES)
@pytest.mark.parametrize("dtype", CODES)
def test_every_instruction_set_gives_the_same_bits(dtype, out_dtype):
    x = (torch.randn(2, UNCOMMON_N, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    options = {"seed": 5, "ids": torch.tensor([2**40 + 9, -3]), "out_dtype": out_dtype}
    first, *others = (noise_cpu(x, 0.6, 0.8, isa=isa, **options) for isa in _C.cpu_isas())
    assert all(torch.equal(first, other) for other in others)
    assert torch.equal(first, noise_cpu(x.float(), 0.6, 0.8, **options | {"out_dtype": torch.float32}).to(out_dtype))
    assert _C.cpu_isas()[-1] == "baseline"


def test_threads_change_nothing():
    x = torch.randn(5, UNCOMMON_N, generator=torch.Generator().manual_seed(0))
    alone = noise_cpu(x, 0.6, 0.8)
    for threads in (2, 3, 64):
        assert torch.equal(alone, noise_cpu(x, 0.6, 0.8, threads=threads))


@pytest.mark.parametrize("threads", [1, 2])
def test_flushing_subnormals_in_the_caller_changes_nothing(threads):
    x = torch.full((4, UNCOMMON_N), 3e-39)
    expected = noise_cpu(x, 1.0, 0.0)
    assert expected.view(torch.int32).count_nonzero() == x.numel()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        found = noise_cpu(x, 1.0, 0.0, threads=threads)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("isa", _C.cpu_isas())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_passes_unchanged(dtype, isa):
    words = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    x = words.view(dtype)[None]
    found = noise_cpu(x, 1.0, 0.0, isa=isa)[0]
    nan = x[0].isnan()
    # 0 * eps is added to x, which turns -0 into +0 where eps is positive.
    same = (found.view(torch.int16) == words) | (found == x[0])
    assert bool(same[~nan].all())
    assert set(found[nan].view(torch.int16).tolist()) == {0x7FFF}


@pytest.mark.parametrize("isa", _C.cpu_isas())
@pytest.mark.parametrize("scale", [1e-39, 3e-8, 1e-5, 1.0, 3e4, 1e38])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_16_bits_is_torchs(dtype, scale, isa):
    """Subnormal results and overflow included: the 16-bit path gives the fp32 path's value, rounded by torch."""
    x = torch.randn(1, UNCOMMON_N, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = noise_cpu(x.float(), scale, scale).to(dtype)
    assert torch.equal(noise_cpu(x, scale, scale, isa=isa), expected)


@pytest.mark.parametrize("isa", _C.cpu_isas())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ties_round_to_even(dtype, isa):
    """x * scale lies exactly between two neighbours of the storage type."""
    digits = {torch.bfloat16: 8, torch.float16: 11}[dtype]
    odd = torch.arange(2 ** (digits - 1) + 1, 2**digits, 2, dtype=torch.float32).to(dtype)[None]
    scale = 1 + 2.0 ** -(digits - 1)
    product = odd.float() * scale
    assert torch.equal(noise_cpu(odd, scale, 0.0, isa=isa), product.to(dtype))
    half = odd.float() * 1.5  # odd * 3 / 2 has one binary digit behind the point
    assert torch.equal(noise_cpu(odd, 1.5, 0.0, isa=isa), half.to(dtype))


@pytest.mark.parametrize("dtype", CODES)
def test_nan_and_infinity_propagate(dtype):
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1.0]], dtype=dtype)
    found = noise_cpu(x, 0.5, 0.5)[0].tolist()
    assert found[0] != found[0]
    assert found[1:3] == [float("inf"), -float("inf")]
    assert abs(found[3]) < 10


def test_unknown_isa_and_dtype_are_refused():
    with pytest.raises(ValueError, match=f"^isa: found 'mmx', expected one of {', '.join(_C.cpu_isas())} on this"):
        normals(4, isa="mmx")
    nothing = _C.NoiseArguments(x=0, out=0, samples=0, n=0, width=0, x_stride=0, out_stride=0, scales=0, seed=0)
    with pytest.raises(ValueError, match=r"^x_dtype: found 9, expected 0 "):
        _C.noise_cpu(nothing, 9, 0)
    with pytest.raises(ValueError, match=r"^out_dtype: found 3, expected 0 "):
        _C.noise_cpu(nothing, 0, 3)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"samples": -1}, "samples: found -1, expected 0 or more."),
        ({"n": -8}, "n: found -8, expected 0 or more."),
        ({"levels": -1}, "levels: found -1, expected 0 or more."),
        ({"width": 0}, "width: found 0, expected a divisor of n, 8."),
        ({"width": 3}, "width: found 3, expected a divisor of n, 8."),
        ({"width": 16}, "width: found 16, expected a divisor of n, 8."),
        ({"x_stride": -8}, "x_stride: found -8, expected 0 or more."),
        ({"out_stride": -8}, "out_stride: found -8, expected 0 or more."),
        ({"level_stride": -8}, "level_stride: found -8, expected 0 or more."),
        ({"levels": 2}, "levels: found 2, expected at most 1 without ladder."),
        ({"ladder": True}, "steps: found 0, expected an address for a ladder."),
        ({"x": 0}, "x: found 0, expected an address."),
        ({"out": 0}, "out: found 0, expected an address."),
        ({"scales": 0}, "scales: found 0, expected an address."),
    ],
)
def test_what_would_read_out_of_bounds_is_refused(wrong, sentence):
    right = {"samples": 1, "n": 8, "width": 8, "x_stride": 8, "out_stride": 8, "x": 64, "out": 64, "scales": 64}
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        _C.NoiseArguments(**right | wrong, seed=0)


def test_import_needs_no_driver():
    assert isinstance(_C.cuda_built, bool)
    assert _C.cuda_device_count() >= 0
    assert bool(_C.cuda_archs) == _C.cuda_built
