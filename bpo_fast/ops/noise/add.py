"""add_noise: a diffusion forward step in one pass, the same bits on every device, in every batch and in any order."""

from __future__ import annotations

import torch

from bpo_fast.ops.noise.launch import (
    DEVICES,
    check_batch,
    check_integers,
    check_out,
    check_samples_apart,
    check_stream,
    is_int,
    launch_samples,
    overlap,
)
from bpo_fast.ops.noise.schedule import NoiseSchedule


def add_noise(
    x: torch.Tensor,
    step: int | torch.Tensor,
    *,
    schedule: NoiseSchedule,
    seed: int,
    sample_ids: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x * sqrt(abar_t) + eps * sqrt(1 - abar_t), the image-weakening step of BPO (arXiv 2403.08730).

    eps is standard normal and depends on (seed, sample id, index of the element within its sample) alone:
    Philox4x32-10 (Salmon et al., SC 2011) with the seed as key and (element / 4, sample id) as counter, then
    Box-Muller. Neither the batch a sample is in, nor its place in it, nor dtype, strides, threads or device change a
    bit of eps. The arithmetic is fp32 whatever the dtype, and the result is rounded to x's dtype once, to nearest
    even; a NaN of x leaves as the one NaN 0x7fffffff (0x7fff). |eps| reaches 6.76.

    Differentiable in x (grad * sqrt(abar_t)), unless `out` is given.

    Args:
        x: [B, ...], float32, bfloat16 or float16, on the CPU or a CUDA device. Rows (x[b]) with gaps inside are copied
            first; a stride between rows is not, so `x.expand(K, ...)` noises one sample K ways.
        step: an int for all samples, or an integer tensor [B], one a sample. A CUDA tensor of steps waits for the GPU
            to check its range; an int never does.
        schedule: says what each step keeps.
        seed: any signed 64-bit integer.
        sample_ids: int64 [B], the name of each sample's stream; default 0 .. B - 1.
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
    check_batch(x)
    check_stream(x.shape[0], schedule, seed, sample_ids)
    if is_int(step):
        scales, steps = schedule.table(x.device).narrow(0, schedule.checked_step(step), 1), None
    else:
        check_integers("step", step, f"an int or an integer tensor [{x.shape[0]}]")
        if step.shape != x.shape[:1]:
            raise ValueError(
                f"step has shape {list(step.shape)} but x has {x.shape[0]} samples; expected an int or [{x.shape[0]}]"
            )
        scales, steps = schedule.table(x.device), step.to(torch.int64)
    ids = None if sample_ids is None else sample_ids.to(x.device).contiguous()
    if out is None:
        return torch.ops.bpo_fast.add_noise(x, scales, steps, ids, seed)
    check_out(out, x, x.shape)
    torch.ops.bpo_fast.add_noise_out(x, scales, steps, ids, seed, out)
    return out


@torch.library.custom_op("bpo_fast::add_noise", mutates_args=(), device_types=DEVICES)
def _add_noise(
    x: torch.Tensor,
    scales: torch.Tensor,
    steps: torch.Tensor | None,
    ids: torch.Tensor | None,
    seed: int,
) -> torch.Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch_samples(x, scales, steps, ids, seed, out, ladder=False)
    return out


@_add_noise.register_fake
def _(x, scales, steps, ids, seed):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    _, scales, steps, _, _ = inputs
    ctx.save_for_backward(scales, steps)


def _backward(ctx, grad):
    scales, steps = ctx.saved_tensors
    kept = scales[:, 0] if steps is None else scales[:, 0].index_select(0, steps.to(scales.device))
    scaled = grad.float() * kept.reshape(-1, *[1] * (grad.ndim - 1))
    return scaled.to(grad.dtype), None, None, None, None


_add_noise.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("bpo_fast::add_noise_out", mutates_args=("out",), device_types=DEVICES)
def _add_noise_out(
    x: torch.Tensor,
    scales: torch.Tensor,
    steps: torch.Tensor | None,
    ids: torch.Tensor | None,
    seed: int,
    out: torch.Tensor,
) -> None:
    if x.numel() == 0:
        return
    check_samples_apart(out)
    same = x.data_ptr() == out.data_ptr() and x.stride() == out.stride()
    if overlap(x, out) and not same:
        raise ValueError("out overlaps x in memory without being the same tensor; pass out=x or memory of its own")
    launch_samples(x, scales, steps, ids, seed, out, ladder=False)


@_add_noise_out.register_fake
def _(x, scales, steps, ids, seed, out):
    return None
