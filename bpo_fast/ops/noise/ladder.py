"""add_noise_ladder: one batch at several noise levels, read once and with one draw of the noise."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bpo_fast.ops.checks import INTEGER_DTYPES, check_indices, is_int
from bpo_fast.ops.noise.launch import DEVICES, check_samples_apart, launch_samples, overlap
from bpo_fast.ops.noise.operands import (
    as_sample_ids,
    check_out,
    check_stream,
    check_values,
    save_scales,
    signal_scales,
)
from bpo_fast.ops.noise.schedule import NoiseSchedule


def add_noise_ladder(
    x: Tensor,
    steps: Sequence[int] | Tensor,
    *,
    schedule: NoiseSchedule,
    seed: int,
    sample_ids: Tensor | Sequence[int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`add_noise(x, t, ...)` for every t of `steps`, bit for bit, in one pass: x is read once and eps made once.

    For measuring how a model's answers change with the noise on its image (BPO, arXiv 2403.08730, image-weakened
    prompting): the levels differ in their scales only, so that nothing but the amount of noise changes.

    Differentiable in x (the sum over k of grad[k] * sqrt(abar_k), in fp32 and in that order), unless `out` is given.

    Args:
        x: [B, ...], as for `add_noise`.
        steps: K steps of the schedule, the same for all samples: ints, or an integer tensor [K]. A CUDA tensor of
            steps waits for the GPU to check its range.
        schedule: what each step keeps of x.
        seed: any signed 64-bit integer.
        sample_ids: int64 [B] or a list of ints, the id of each sample's noise; default 0 .. B - 1.
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
    check_values("x", x, ("B", "..."))
    sample_ids = as_sample_ids(sample_ids)
    check_stream(x.shape[0], schedule, seed, sample_ids)
    if isinstance(steps, Sequence) and all(is_int(step) for step in steps):
        steps = torch.tensor([schedule.checked_step(step, "steps") for step in steps], dtype=torch.int64)
    check_indices("steps", steps, ("K",), dtypes=INTEGER_DTYPES, otherwise="a list of ints")
    operands = (x, schedule.table(x.device), steps.to(torch.int64), sample_ids, seed)
    if out is None:
        return torch.ops.bpo_fast.add_noise_ladder(*operands)
    check_out(out, x, (steps.shape[0], *x.shape))
    torch.ops.bpo_fast.add_noise_ladder_out(*operands, out)
    return out


@torch.library.custom_op("bpo_fast::add_noise_ladder", mutates_args=(), device_types=DEVICES)
def _add_noise_ladder(x: Tensor, scales: Tensor, steps: Tensor, ids: Tensor | None, seed: int) -> Tensor:
    out = x.new_empty((steps.shape[0], *x.shape))
    launch_samples(x, scales, steps, ids, seed, out, ladder=True)
    return out


@_add_noise_ladder.register_fake
def _(x, scales, steps, ids, seed):
    return x.new_empty((steps.shape[0], *x.shape))


def _backward(ctx, grad):
    kept = signal_scales(ctx)
    total = grad.new_zeros(grad.shape[1:], dtype=torch.float32)
    for k in range(grad.shape[0]):
        total = total + grad[k].float() * kept[k]
    return total.to(grad.dtype), None, None, None, None


_add_noise_ladder.register_autograd(_backward, setup_context=save_scales)


@torch.library.custom_op("bpo_fast::add_noise_ladder_out", mutates_args=("out",), device_types=DEVICES)
def _add_noise_ladder_out(
    x: Tensor, scales: Tensor, steps: Tensor, ids: Tensor | None, seed: int, out: Tensor
) -> None:
    if out.numel() == 0:
        return
    check_samples_apart(out, leading=2)
    if overlap(x, out):
        raise ValueError("out: found memory that overlaps x, expected its own: x is read once for all levels.")
    launch_samples(x, scales, steps, ids, seed, out, ladder=True)
