"""add_noise: a diffusion forward step in one pass, the same bits on every device, in every batch and in any order."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bpo_fast.ops.noise.launch import DEVICES, check_samples_apart, launch_samples, overlap
from bpo_fast.ops.noise.operands import (
    as_sample_ids,
    check_out,
    check_stream,
    check_values,
    save_scales,
    scales_of,
    signal_scales,
)
from bpo_fast.ops.noise.schedule import NoiseSchedule


def add_noise(
    x: Tensor,
    step: int | Tensor,
    *,
    schedule: NoiseSchedule,
    seed: int,
    sample_ids: Tensor | Sequence[int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x * sqrt(abar_t) + eps * sqrt(1 - abar_t), the image-weakening step of BPO (arXiv 2403.08730).

    eps is standard normal and depends on (seed, sample id, index of the element within its sample) alone:
    Philox4x32-10 (Salmon et al., SC 2011) with the seed as key and (element / 4, sample id) as counter, then
    Box-Muller. Neither the batch a sample is in, nor its place in it, nor dtype, strides, threads or device change a
    bit of eps. The arithmetic is fp32 whatever the dtype, and the result is rounded to x's dtype once, to nearest
    even; every NaN of x becomes the one NaN 0x7fffffff (0x7fff). |eps| reaches 6.76.

    Differentiable in x (grad * sqrt(abar_t)), unless `out` is given.

    Args:
        x: [B, ...], float32, bfloat16 or float16, on the CPU or a CUDA device. Samples (x[b]) with gaps inside are
            copied first; a stride between samples needs no copy, so `x.expand(K, ...)` noises one sample K ways.
        step: an int for all samples, or an integer tensor [B] with one for each. A CUDA tensor of steps waits for the
            GPU to check its range; an int never does.
        schedule: what each step keeps of x.
        seed: any signed 64-bit integer.
        sample_ids: int64 [B] or a list of ints, the id of each sample's noise; default 0 .. B - 1.
        out: where to write, of x's shape, dtype and device; may be x itself.

    Returns:
        [B, ...], dtype of x; `out` where it is given.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or range.
        ImportError, RuntimeError: the half of the native extension that x's device needs is missing.

    Example:
        >>> x = torch.zeros(4, 3)
        >>> y = add_noise(x, 900, schedule=NoiseSchedule.sigmoid(), seed=7)
        >>> z = add_noise(x[2:], 900, schedule=NoiseSchedule.sigmoid(), seed=7, sample_ids=torch.tensor([2, 3]))
        >>> torch.equal(y[2:], z)
        True
    """
    check_values("x", x, ("B", "..."))
    sample_ids = as_sample_ids(sample_ids)
    check_stream(x.shape[0], schedule, seed, sample_ids)
    scales, steps = scales_of(step, x.shape[0], schedule, x.device)
    if out is None:
        return torch.ops.bpo_fast.add_noise(x, scales, steps, sample_ids, seed)
    check_out(out, x, x.shape)
    torch.ops.bpo_fast.add_noise_out(x, scales, steps, sample_ids, seed, out)
    return out


@torch.library.custom_op("bpo_fast::add_noise", mutates_args=(), device_types=DEVICES)
def _add_noise(x: Tensor, scales: Tensor, steps: Tensor | None, ids: Tensor | None, seed: int) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch_samples(x, scales, steps, ids, seed, out, ladder=False)
    return out


@_add_noise.register_fake
def _(x, scales, steps, ids, seed):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward(ctx, grad):
    scaled = grad.float() * signal_scales(ctx).reshape(-1, *[1] * (grad.ndim - 1))
    return scaled.to(grad.dtype), None, None, None, None


_add_noise.register_autograd(_backward, setup_context=save_scales)


@torch.library.custom_op("bpo_fast::add_noise_out", mutates_args=("out",), device_types=DEVICES)
def _add_noise_out(
    x: Tensor, scales: Tensor, steps: Tensor | None, ids: Tensor | None, seed: int, out: Tensor
) -> None:
    if x.numel() == 0:
        return
    check_samples_apart(out)
    same = x.data_ptr() == out.data_ptr() and x.stride() == out.stride()
    if overlap(x, out) and not same:
        raise ValueError("out: found memory that overlaps x, expected that of x itself or its own; pass out=x.")
    launch_samples(x, scales, steps, ids, seed, out, ladder=False)
