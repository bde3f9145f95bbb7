"""add_noise: a diffusion forward step in one pass, the same bits on every device, in every batch and in any order."""

from __future__ import annotations

from numbers import Integral

import torch

from bpo_fast import native
from bpo_fast.noise import NoiseSchedule

# The codes by which the extension knows a storage type.
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_STEP_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


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
    even; a NaN of x stays a NaN. |eps| reaches 6.76.

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
    _check(x, schedule, seed, sample_ids)
    if isinstance(step, torch.Tensor):
        if step.dtype not in _STEP_DTYPES:
            raise TypeError(f"step has dtype {step.dtype}; expected an int or an integer tensor")
        if step.shape != x.shape[:1]:
            raise ValueError(
                f"step has shape {list(step.shape)} but x has {x.shape[0]} samples; expected an int or [{x.shape[0]}]"
            )
        scales, steps = schedule.table(x.device), step.to(x.device, torch.int64).contiguous()
    elif isinstance(step, (Integral, torch.SymInt)) and not isinstance(step, bool):
        scales, steps = schedule.table(x.device).narrow(0, schedule.checked_step(step), 1), None
    else:
        raise TypeError(f"step is {type(step).__name__}; expected an int or an integer tensor [{x.shape[0]}]")
    ids = None if sample_ids is None else sample_ids.to(x.device).contiguous()
    if out is None:
        return torch.ops.bpo_fast.add_noise(x, scales, steps, ids, seed)
    _check_out(out, x)
    torch.ops.bpo_fast.add_noise_out(x, scales, steps, ids, seed, out)
    return out


def _check(x, schedule, seed, sample_ids):
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is {type(x).__name__}; expected a tensor [B, ...]")
    if x.dtype not in _DTYPE_CODES:
        raise TypeError(f"x has dtype {x.dtype}; expected float32, bfloat16 or float16")
    if x.ndim < 1:
        raise ValueError(
            "x has no dimensions; expected [B, ...], a batch of samples (x.unsqueeze(0) makes one of one)"
        )
    if x.device.type not in ("cpu", "cuda"):
        raise ValueError(f"x is on '{x.device}'; expected the CPU or a CUDA device")
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule is {type(schedule).__name__}; expected a NoiseSchedule, such as .sigmoid()")
    if not isinstance(seed, (Integral, torch.SymInt)) or isinstance(seed, bool):
        raise TypeError(f"seed is {type(seed).__name__}; expected an int")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed is {seed}; expected a signed 64-bit integer, -2**63 to 2**63 - 1")
    if sample_ids is None:
        return
    if not isinstance(sample_ids, torch.Tensor) or sample_ids.dtype != torch.int64:
        found = sample_ids.dtype if isinstance(sample_ids, torch.Tensor) else type(sample_ids).__name__
        raise TypeError(f"sample_ids is {found}; expected an int64 tensor [{x.shape[0]}]")
    if sample_ids.shape != x.shape[:1]:
        raise ValueError(
            f"sample_ids has shape {list(sample_ids.shape)} but x has {x.shape[0]} samples; expected one each"
        )


def _check_out(out, x):
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out is {type(out).__name__}; expected a tensor like x")
    for name in ("shape", "dtype", "device"):
        found, expected = getattr(out, name), getattr(x, name)
        if found != expected:
            raise ValueError(f"out has {name} {found} but x has {expected}; expected the same")
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise ValueError("out cannot be given where x or out requires a gradient; leave it out or use torch.no_grad()")


def _dense_rows(x):
    """Whether each x[b] is contiguous, so that only the stride between rows is free."""
    return x.shape[0] == 0 or x[0].is_contiguous()


def _span(x):
    """The bytes from the first to past the last element of a non-empty tensor."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _check_memory(x, out):
    """The rows of out must not share memory with one another, nor with x unless they are the same rows."""
    if out.shape[0] > 1 and abs(out.stride(0)) < out[0].numel():
        raise ValueError(
            "out has samples that share memory, as after expand(); give it memory of its own, .contiguous()"
        )
    (x_start, x_end), (out_start, out_end) = _span(x), _span(out)
    same = x_start == out_start and x.stride() == out.stride()
    if x_start < out_end and out_start < x_end and not same:
        raise ValueError("out overlaps x in memory without being the same tensor; pass out=x or memory of its own")


def _run(x, scales, steps, ids, seed, out):
    """Writes to out, whose rows are dense, unless the call is empty."""
    if x.numel() == 0:
        return
    if steps is not None:
        low, high = torch.stack(steps.aminmax()).tolist()
        if low < 0 or high >= scales.shape[0]:
            bad = low if low < 0 else high
            raise ValueError(f"step holds {bad}; the schedule has steps 0 to {scales.shape[0] - 1}")
    x = x if _dense_rows(x) else x.contiguous()
    arguments = (
        x.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        x[0].numel(),
        x.stride(0),
        out.stride(0),
        scales.data_ptr(),
        0 if steps is None else steps.data_ptr(),
        0 if ids is None else ids.data_ptr(),
        seed,
        _DTYPE_CODES[x.dtype],
    )
    if x.device.type == "cuda":
        extension = native.cuda_extension()
        with torch.cuda.device(x.device):
            extension.noise_cuda(*arguments, x.device.index, torch.cuda.current_stream().cuda_stream)
    else:
        native.extension().noise_cpu(*arguments, torch.get_num_threads())


_DEVICES = ("cpu", "cuda")


@torch.library.custom_op("bpo_fast::add_noise", mutates_args=(), device_types=_DEVICES)
def _add_noise(
    x: torch.Tensor,
    scales: torch.Tensor,
    steps: torch.Tensor | None,
    ids: torch.Tensor | None,
    seed: int,
) -> torch.Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _run(x, scales, steps, ids, seed, out)
    return out


@_add_noise.register_fake
def _(x, scales, steps, ids, seed):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    _, scales, steps, _, _ = inputs
    ctx.save_for_backward(scales, steps)


def _backward(ctx, grad):
    scales, steps = ctx.saved_tensors
    kept = scales[:, 0] if steps is None else scales[:, 0].index_select(0, steps)
    scaled = grad.float() * kept.reshape(-1, *[1] * (grad.ndim - 1))
    return scaled.to(grad.dtype), None, None, None, None


_add_noise.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("bpo_fast::add_noise_out", mutates_args=("out",), device_types=_DEVICES)
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
    if not _dense_rows(out):
        raise ValueError(
            "out has gaps within its samples (out[b] is not contiguous); pass out=out.contiguous() instead"
        )
    _check_memory(x, out)
    _run(x, scales, steps, ids, seed, out)


@_add_noise_out.register_fake
def _(x, scales, steps, ids, seed, out):
    return None
