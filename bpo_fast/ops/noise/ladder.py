"""add_noise_ladder: one batch at several noise levels, read once and with one draw of the noise."""

from __future__ import annotations

from collections.abc import Sequence

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


def add_noise_ladder(
    x: torch.Tensor,
    steps: Sequence[int] | torch.Tensor,
    *,
    schedule: NoiseSchedule,
    seed: int,
    sample_ids: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`add_noise(x, t, ...)` for every t of `steps`, bit for bit, in one pass: x is read once and eps made once.

    For probing how a model's answers change with the noise on its picture (BPO, arXiv 2403.08730, the effect of
    image-weakened prompting): the levels differ in their scales only, so that what changes is the amount of noise.

    Differentiable in x (the sum over k of grad[k] * sqrt(abar_k), in fp32 and in that order), unless `out` is given.

    Args:
        x: [B, ...], as for `add_noise`.
        steps: K steps of the schedule, for all samples alike: ints, or an integer tensor [K]. A tensor that is on a
            GPU is waited for, to check its range.
        schedule: says what each step keeps.
        seed: any signed 64-bit integer.
        sample_ids: int64 [B], the name of each sample's stream; default 0 .. B - 1.
        out: [K, B, ...] of x's dtype and device, where to write; shares no memory with x.

    Returns:
        [K, B, ...], dtype of x; `out` where it is given.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or range.
        ImportError, RuntimeError: the half of the native extension that x's device needs is missing.

    Example:
        >>> x, schedule = torch.zeros(4, 3), NoiseSchedule.sigmoid()
        >>> levels = add_noise_ladder(x, [0, 500, 999], schedule=schedule, seed=7)
        >>> levels.shape
        torch.Size([3, 4, 3])
    """
    check_batch(x)
    check_stream(x.shape[0], schedule, seed, sample_ids)
    if isinstance(steps, Sequence) and all(is_int(step) for step in steps):
        steps = torch.tensor([schedule.checked_step(step) for step in steps], dtype=torch.int64)
    check_integers("steps", steps, "a list of ints or an integer tensor [K]")
    if steps.ndim != 1:
        raise ValueError(f"steps has shape {list(steps.shape)}; expected a list of ints or an integer tensor [K]")
    scales, steps = schedule.table(x.device), steps.to(torch.int64)
    ids = None if sample_ids is None else sample_ids.to(x.device).contiguous()
    if out is None:
        return torch.ops.bpo_fast.add_noise_ladder(x, scales, steps, ids, seed)
    check_out(out, x, (steps.shape[0], *x.shape))
    torch.ops.bpo_fast.add_noise_ladder_out(x, scales, steps, ids, seed, out)
    return out


@torch.library.custom_op("bpo_fast::add_noise_ladder", mutates_args=(), device_types=DEVICES)
def _add_noise_ladder(
    x: torch.Tensor,
    scales: torch.Tensor,
    steps: torch.Tensor,
    ids: torch.Tensor | None,
    seed: int,
) -> torch.Tensor:
    out = x.new_empty((steps.shape[0], *x.shape))
    launch_samples(x, scales, steps, ids, seed, out, ladder=True)
    return out


@_add_noise_ladder.register_fake
def _(x, scales, steps, ids, seed):
    return x.new_empty((steps.shape[0], *x.shape))


def _setup_context(ctx, inputs, output):
    _, scales, steps, _, _ = inputs
    ctx.save_for_backward(scales, steps)


def _backward(ctx, grad):
    scales, steps = ctx.saved_tensors
    kept = scales[:, 0].index_select(0, steps.to(scales.device))
    total = grad.new_zeros(grad.shape[1:], dtype=torch.float32)
    for k in range(grad.shape[0]):
        total = total + grad[k].float() * kept[k]
    return total.to(grad.dtype), None, None, None, None


_add_noise_ladder.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("bpo_fast::add_noise_ladder_out", mutates_args=("out",), device_types=DEVICES)
def _add_noise_ladder_out(
    x: torch.Tensor,
    scales: torch.Tensor,
    steps: torch.Tensor,
    ids: torch.Tensor | None,
    seed: int,
    out: torch.Tensor,
) -> None:
    if out.numel() == 0:
        return
    check_samples_apart(out, leading=2)
    if overlap(x, out):
        raise ValueError("out overlaps x in memory; x is read once for all levels, so out needs memory of its own")
    launch_samples(x, scales, steps, ids, seed, out, ladder=True)


@_add_noise_ladder_out.register_fake
def _(x, scales, steps, ids, seed, out):
    return None
