"""The call into the native extension, and how the memory of its operands has to lie."""

import torch
from torch import Tensor

from bpo_fast.ops.checks import check_ranges
from bpo_fast.ops.noise import native

DEVICES = ("cpu", "cuda")
# The codes by which the extension knows a storage type.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def dense(x: Tensor) -> bool:
    """Whether each x[b] is contiguous, so that only the stride between samples is free."""
    return x.shape[0] == 0 or x[0].is_contiguous()


def _span(tensor):
    """The addresses of the first byte and past the last byte of a non-empty tensor."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def overlap(x: Tensor, out: Tensor) -> bool:
    """Whether the spans of memory of two non-empty tensors meet."""
    (x_start, x_end), (out_start, out_end) = _span(x), _span(out)
    return x_start < out_end and out_start < x_end


def check_samples_apart(out: Tensor, leading: int = 1) -> None:
    """Raise unless the samples of a non-empty tensor, out[b] or (leading=2) out[k, b], are contiguous and disjoint."""
    sample = out[(0,) * leading]
    if not sample.is_contiguous():
        raise ValueError(
            "out: found samples with gaps inside (out[b] is not contiguous), expected contiguous ones; "
            "pass out=out.contiguous()."
        )
    extent = sample.numel()
    for stride, size in sorted(zip(out.stride()[:leading], out.shape[:leading], strict=True)):
        if size > 1 and stride < extent:
            raise ValueError(
                "out: found samples that share memory, as after expand(), expected memory of its own for each; "
                "pass out=out.contiguous()."
            )
        extent += stride * (size - 1)


def _check_operands(x, out, arguments):
    """What the extension reads by its address alone: the dtypes and lengths that the fields of NoiseArguments have."""
    if out.device != x.device:
        raise ValueError(f"out: found on {out.device}, expected on {x.device}, the device of x.")
    samples = arguments["samples"]
    steps = arguments["levels"] if arguments.get("ladder") else samples
    rows = samples * arguments["n"] // arguments["width"]
    counts = {"steps": steps, "ids": samples, "source": samples, "out_rows": rows}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            dtype, count = (torch.int64, counts[name]) if name in counts else (torch.float32, value.numel())
            if value.dtype != dtype or value.numel() != count:
                raise ValueError(f"{name}: found {value.numel()} of {value.dtype}, expected {count} of {dtype}.")


def launch(x: Tensor, out: Tensor, **arguments: int | bool | Tensor | None) -> None:
    """Run the extension on x's device; `arguments` are the fields of NoiseArguments in csrc/philox_normal.h.

    Tensors that are elsewhere are copied to x's device, without waiting if that is a GPU. None is a null pointer. On a
    GPU it is queued on the current stream of x's device, which need not be the current device.

    Raises:
        ValueError: an operand of another dtype, length or device than the extension takes for granted.
    """
    _check_operands(x, out, arguments)
    on_cuda = x.device.type == "cuda"
    extension = native.cuda_extension() if on_cuda else native.extension()
    copies = {
        name: value.to(x.device, non_blocking=on_cuda).contiguous()
        for name, value in arguments.items()
        if isinstance(value, Tensor)
    }
    fields = {name: value for name, value in arguments.items() if value is not None}
    fields |= {name: copy.data_ptr() for name, copy in copies.items()}
    call = extension.NoiseArguments(x=x.data_ptr(), out=out.data_ptr(), **fields)
    codes = DTYPE_CODES[x.dtype], DTYPE_CODES[out.dtype]
    if not on_cuda:
        extension.noise_cpu(call, *codes, torch.get_num_threads())
        return
    with torch.cuda.device(x.device):
        extension.noise_cuda(call, *codes, x.device.index, torch.cuda.current_stream(x.device).cuda_stream)


def launch_samples(
    x: Tensor, scales: Tensor, steps: Tensor | None, ids: Tensor | None, seed: int, out: Tensor, *, ladder: bool
) -> None:
    """Write x [B, ...], noised, to out [B, ...], or [K, B, ...] for a ladder; the samples of out are contiguous.

    Raises:
        ValueError: a step that `scales` does not have.
    """
    if out.numel() == 0:
        return
    check_ranges([("steps" if ladder else "step", steps, 0, scales.shape[0], "the steps of the schedule")])
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
        steps=None if steps is None else steps.to(x.device),
        ids=None if ids is None else ids.to(x.device),
        seed=seed,
        ladder=ladder,
    )
