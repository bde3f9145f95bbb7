"""From the arguments of a noise op to its operands, and how its gradient reads them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bpo_fast.ops.checks import INTEGER_DTYPES, check_indices, check_same, check_tensor, is_int
from bpo_fast.ops.noise.launch import DEVICES, DTYPE_CODES
from bpo_fast.ops.noise.schedule import NoiseSchedule


def check_values(name: str, tensor: Tensor, shape: Sequence[int | str]) -> None:
    """Raise unless `tensor` has this shape (see `check_tensor`), and a dtype and a device of the extension."""
    check_tensor(name, tensor, shape, tuple(DTYPE_CODES))
    if tensor.device.type not in DEVICES:
        raise ValueError(f"{name}: found on {tensor.device}, expected on the CPU or a CUDA device.")


def check_no_grad(x: Tensor, out: Tensor) -> None:
    """Raise where autograd would lose what is written to `out`."""
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise ValueError(
            "out: found x or out requiring a gradient, expected neither, since writing to out is not differentiable; "
            "detach them or use torch.no_grad()."
        )


def check_out(out: Tensor, x: Tensor, shape: Sequence[int]) -> None:
    """Raise unless `out` is a tensor like x, of this shape, and no gradient would be lost."""
    check_values("out", out, shape)
    check_same("out", out, "x", x)
    check_no_grad(x, out)


def as_sample_ids(sample_ids: Tensor | Sequence[int] | None) -> Tensor | None:
    """A list of ints as int64 [B]; anything else as it is, for `check_stream` to see.

    Raises:
        ValueError: an id is not a number of 64 bits.
    """
    if not isinstance(sample_ids, list | tuple) or not all(map(is_int, sample_ids)):
        return sample_ids
    for number in sample_ids:
        if not -(2**63) <= number < 2**63:
            raise ValueError(f"sample_ids: found {number}, expected -2**63 to 2**63 - 1.")
    return torch.tensor(sample_ids, dtype=torch.int64)


def check_stream(samples: int, schedule: NoiseSchedule, seed: int, sample_ids: Tensor | None) -> None:
    """Raise unless `samples` samples can be noised with this schedule, seed and these ids."""
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(
            f"schedule: found {type(schedule).__name__}, expected a NoiseSchedule such as NoiseSchedule.sigmoid()."
        )
    if not is_int(seed):
        raise TypeError(f"seed: found {type(seed).__name__}, expected an int.")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: found {seed}, expected -2**63 to 2**63 - 1.")
    if sample_ids is not None:
        check_indices("sample_ids", sample_ids, (samples,), dtypes=(torch.int64,), otherwise="a list of ints")


def scales_of(
    step: int | Tensor, samples: int, schedule: NoiseSchedule, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Scales [1, 2] of one step and None, or the scales [T, 2] of all steps and int64 steps [samples]."""
    if is_int(step):
        return schedule.table(device).narrow(0, schedule.checked_step(step), 1), None
    check_indices("step", step, (samples,), dtypes=INTEGER_DTYPES, otherwise="an int")
    return schedule.table(device), step.to(torch.int64)


def save_scales(ctx, inputs, output) -> None:
    """Autograd's `setup_context` of an op of (x, scales, steps, ids, seed)."""
    _, scales, steps, _, _ = inputs
    ctx.save_for_backward(scales, steps)


def signal_scales(ctx) -> Tensor:
    """sqrt(abar) of each step of what `save_scales` saved, float32 [1] or [number of steps]."""
    scales, steps = ctx.saved_tensors
    return scales[:, 0] if steps is None else scales[:, 0].index_select(0, steps.to(scales.device))
