"""What the noise ops share: the checks of their arguments and the call into the native extension."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral

import torch

from bpo_fast.ops.noise import native
from bpo_fast.ops.noise.schedule import NoiseSchedule

DEVICES = ("cpu", "cuda")
# The codes by which the extension knows a storage type.
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def is_int(value) -> bool:
    """Whether `value` is a whole number, a symbolic one of torch.compile included; a bool is not."""
    return isinstance(value, (Integral, torch.SymInt)) and not isinstance(value, bool)


def check_data(name: str, tensor: torch.Tensor, shape: str) -> None:
    """Refuse what cannot hold noised values.

    Raises:
        TypeError: not a tensor, or not of a dtype that the ops know.
        ValueError: neither on the CPU nor on a CUDA device.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}; expected a tensor {shape}")
    if tensor.dtype not in _DTYPE_CODES:
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected float32, bfloat16 or float16")
    if tensor.device.type not in DEVICES:
        raise ValueError(f"{name} is on '{tensor.device}'; expected the CPU or a CUDA device")


def check_batch(x: torch.Tensor) -> None:
    """Refuse an x that is no batch of samples [B, ...].

    Raises:
        TypeError, ValueError: as `check_data`, or x has no dimensions.
    """
    check_data("x", x, "[B, ...]")
    if x.ndim < 1:
        raise ValueError(
            "x has no dimensions; expected [B, ...], a batch of samples (x.unsqueeze(0) makes one of one)"
        )


def check_stream(samples: int, schedule: NoiseSchedule, seed: int, sample_ids: torch.Tensor | None) -> None:
    """Refuse a schedule, a seed or sample ids that `samples` samples cannot be noised with.

    Raises:
        TypeError: one is of another type.
        ValueError: the seed is out of range or sample_ids of another shape.
    """
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule is {type(schedule).__name__}; expected a NoiseSchedule, such as .sigmoid()")
    if not is_int(seed):
        raise TypeError(f"seed is {type(seed).__name__}; expected an int")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed is {seed}; expected a signed 64-bit integer, -2**63 to 2**63 - 1")
    if sample_ids is None:
        return
    if not isinstance(sample_ids, torch.Tensor) or sample_ids.dtype != torch.int64:
        found = sample_ids.dtype if isinstance(sample_ids, torch.Tensor) else type(sample_ids).__name__
        raise TypeError(f"sample_ids is {found}; expected an int64 tensor [{samples}]")
    if sample_ids.shape != (samples,):
        raise ValueError(
            f"sample_ids has shape {list(sample_ids.shape)} but x has {samples} samples; expected one each"
        )


def check_integers(name: str, tensor: torch.Tensor, expected: str) -> None:
    """Refuse a tensor of anything but integers.

    Raises:
        TypeError: it is one.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}; expected {expected}")
    if tensor.dtype not in _INTEGERS:
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected {expected}")


def check_no_grad(x: torch.Tensor, out: torch.Tensor) -> None:
    """Refuse to write where autograd would not see it.

    Raises:
        ValueError: gradients are recorded and x or out requires one.
    """
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise ValueError("out cannot be given where x or out requires a gradient; leave it out or use torch.no_grad()")


def check_out(out: torch.Tensor, x: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Refuse an `out` that is not x's like, of the given shape.

    Raises:
        TypeError: not a tensor.
        ValueError: another shape, dtype or device, or a gradient would be lost.
    """
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out is {type(out).__name__}; expected a tensor like x")
    if out.shape != shape:
        raise ValueError(f"out has shape {list(out.shape)}; expected {list(shape)}")
    for name in ("dtype", "device"):
        found, expected = getattr(out, name), getattr(x, name)
        if found != expected:
            raise ValueError(f"out has {name} {found} but x has {expected}; expected the same")
    check_no_grad(x, out)


def check_ranges(ranges: Iterable[tuple[str, torch.Tensor | None, int, int, str]]) -> None:
    """Refuse indices out of range: each is (name, non-empty tensor or None, lowest, one past the highest, of what).

    Tensors on a GPU are waited for, together once.

    Raises:
        ValueError: naming the first tensor with such an index, and the index.
    """
    ranges = [entry for entry in ranges if entry[1] is not None]
    bounds = {}
    for device in {entry[1].device for entry in ranges}:
        here = [entry for entry in ranges if entry[1].device == device]
        pairs = torch.stack([torch.stack(tensor.aminmax()).long() for _, tensor, *_ in here]).tolist()
        bounds |= {entry[0]: pair for entry, pair in zip(here, pairs, strict=True)}
    for name, _, lowest, past, what in ranges:
        low, high = bounds[name]
        if low < lowest or high >= past:
            bad = low if low < lowest else high
            raise ValueError(f"{name} holds {bad}; {what} {lowest} to {past - 1}")


def dense(x: torch.Tensor) -> bool:
    """Whether each x[b] is contiguous, so that only the stride between samples is free."""
    return x.shape[0] == 0 or x[0].is_contiguous()


def _span(tensor):
    """The bytes from the first to past the last element of a non-empty tensor."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def overlap(x: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether the memory between the ends of two non-empty tensors meets."""
    (x_start, x_end), (out_start, out_end) = _span(x), _span(out)
    return x_start < out_end and out_start < x_end


def check_samples_apart(out: torch.Tensor, leading: int = 1) -> None:
    """Refuse a non-empty `out` whose samples, out[b] or (leading=2) out[k, b], have gaps inside or share memory.

    Raises:
        ValueError: they have or do.
    """
    sample = out[(0,) * leading]
    if not sample.is_contiguous():
        raise ValueError(
            "out has gaps within its samples (out[b] is not contiguous); pass out=out.contiguous() instead"
        )
    extent = sample.numel()
    for stride, size in sorted(zip(out.stride()[:leading], out.shape[:leading], strict=True)):
        if size > 1 and stride < extent:
            raise ValueError(
                "out has samples that share memory, as after expand(); give it memory of its own, .contiguous()"
            )
        extent += stride * (size - 1)


def launch(x: torch.Tensor, out: torch.Tensor, *, seed: int, **arguments: int | bool | torch.Tensor | None) -> None:
    """Run the extension on x's device; `arguments` are the fields of NoiseArguments in csrc/philox_normal.h.

    Tensors are passed by their address and must be contiguous, on x's device and of the field's type; None is null.
    """
    fields = {
        name: value.data_ptr() if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
        if value is not None
    }
    codes = _DTYPE_CODES[x.dtype], _DTYPE_CODES[out.dtype]
    if x.device.type == "cuda":
        extension = native.cuda_extension()
        call = extension.NoiseArguments(x=x.data_ptr(), out=out.data_ptr(), seed=seed, **fields)
        with torch.cuda.device(x.device):
            extension.noise_cuda(call, *codes, x.device.index, torch.cuda.current_stream().cuda_stream)
    else:
        extension = native.extension()
        call = extension.NoiseArguments(x=x.data_ptr(), out=out.data_ptr(), seed=seed, **fields)
        extension.noise_cpu(call, *codes, torch.get_num_threads())


def launch_samples(x, scales, steps, ids, seed, out, *, ladder):
    """Write x [B, ...], noised, to out [B, ...], or [K, B, ...] for a ladder; the samples of out are dense.

    Raises:
        ValueError: a step that `scales` has not.
    """
    if out.numel() == 0:
        return
    check_ranges([("steps" if ladder else "step", steps, 0, scales.shape[0], "the schedule has steps")])
    x = x if dense(x) else x.contiguous()
    n, levels = x[0].numel(), out if ladder else out.unsqueeze(0)
    launch(
        x,
        out,
        samples=x.shape[0],
        n=n,
        width=n,
        x_stride=x.stride(0),
        out_stride=levels.stride(1),
        levels=levels.shape[0],
        level_stride=levels.stride(0) if ladder else 0,
        scales=scales,
        steps=None if steps is None else steps.to(x.device).contiguous(),
        ids=ids,
        seed=seed,
        ladder=ladder,
    )
