"""add_noise_rows: cached features, with noise or clean, cast and written into the rows of a packed embedding."""

from __future__ import annotations

import torch

from bpo_fast.ops.noise.launch import (
    DEVICES,
    check_data,
    check_integers,
    check_no_grad,
    check_ranges,
    check_stream,
    dense,
    is_int,
    launch,
    overlap,
)
from bpo_fast.ops.noise.schedule import NoiseSchedule

# The step that adds nothing: features are cast and written as they are.
CLEAN = -1


def add_noise_rows(
    x: torch.Tensor,
    step: int | torch.Tensor = CLEAN,
    *,
    out: torch.Tensor,
    rows: torch.Tensor,
    schedule: NoiseSchedule | None = None,
    seed: int = 0,
    source: torch.Tensor | None = None,
    sample_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write pictures of a feature cache, noised or clean, into the rows that hold their image tokens, in one pass.

    out[rows[b, m]] = x[s, m] * sqrt(abar_t) + eps * sqrt(1 - abar_t), with s = source[b], t = step[b], and the eps of
    `add_noise` for sample_ids[b]; out[rows[b, m]] = x[s, m] where step[b] is CLEAN. It is what

        noised = add_noise(x[source].float(), step, schedule=schedule, seed=seed, sample_ids=sample_ids)
        out.index_copy_(0, rows.flatten(), noised.to(out.dtype).flatten(0, 1))

    leaves in out, bit for bit, while each feature is read once and written once: fp32 arithmetic, one rounding to
    out's dtype at the end, for any pair of dtypes. A NaN of x is written as the one NaN 0x7fffffff (0x7fff).

    It writes in place and is not differentiable: call it on the embeddings before they require a gradient, as those of
    frozen features and a frozen embedding table do not.

    Args:
        x: [N, M, H], float32, bfloat16 or float16: N cached pictures of M image tokens, on out's device.
        step: an int for all pictures, an integer tensor [B], or CLEAN (-1), which may also stand in the tensor.
        out: [S, H], float32, bfloat16 or float16, with dense rows: the packed row's embeddings. Rows that are not in
            `rows` are left alone.
        rows: integer tensor [B, M] or [B * M], picture after picture: the row of out of each image token, such as the
            positions of the image token's id in a packed row. No row may be named twice.
        schedule: says what each step keeps; not needed where step is CLEAN.
        seed: any signed 64-bit integer.
        source: integer tensor [B], the picture to read for each sample, repeats allowed; default 0 .. N - 1.
        sample_ids: int64 [B], the name of each sample's stream; default `source`, so that a picture's noise stays the
            same in any batch.

    Returns:
        `out`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or range, a row named twice, or a gradient that would be
            lost. Index tensors are checked where they are: on the CPU without waiting for the GPU, on a GPU by waiting
            for it.
        ImportError, RuntimeError: the half of the native extension that x's device needs is missing.

    Example:
        >>> cache = torch.ones(3, 2, 4, dtype=torch.bfloat16)
        >>> embeds = torch.zeros(6, 4)
        >>> rows, source = torch.tensor([1, 2, 4, 5]), torch.tensor([2, 2])
        >>> step = torch.tensor([900, CLEAN])
        >>> out = add_noise_rows(cache, step, out=embeds, rows=rows, source=source, schedule=NoiseSchedule.sigmoid())
        >>> out is embeds, embeds[4:].unique().tolist(), embeds[[0, 3]].unique().tolist()
        (True, [1.0], [0.0])
    """
    check_data("x", x, "[N, M, H]")
    if x.ndim != 3:
        raise ValueError(f"x has shape {list(x.shape)}; expected [N, M, H]: pictures, image tokens, width")
    check_data("out", out, "[S, H]")
    if out.ndim != 2 or out.shape[1] != x.shape[2]:
        raise ValueError(f"out has shape {list(out.shape)}; expected [S, {x.shape[2]}], as wide as x")
    if out.device != x.device:
        raise ValueError(f"out is on {out.device} but x is on {x.device}; expected the same device")
    check_no_grad(x, out)
    samples = x.shape[0]
    if source is not None:
        check_integers("source", source, "an integer tensor [B]")
        if source.ndim != 1:
            raise ValueError(f"source has shape {list(source.shape)}; expected [B], a picture of x for each sample")
        source, samples = source.to(torch.int64), source.shape[0]
    check_integers("rows", rows, f"an integer tensor [{samples}, {x.shape[1]}]")
    if rows.shape not in ((samples, x.shape[1]), (samples * x.shape[1],)):
        raise ValueError(
            f"rows has shape {list(rows.shape)} for {samples} pictures of {x.shape[1]} image tokens; expected "
            f"[{samples}, {x.shape[1]}] or [{samples * x.shape[1]}]"
        )
    clean = is_int(step) and step == CLEAN
    check_stream(samples, NoiseSchedule([1.0]) if clean and schedule is None else schedule, seed, sample_ids)
    if clean:
        scales, steps = x.new_empty((0, 2), dtype=torch.float32), torch.full((samples,), CLEAN)
    elif is_int(step):
        scales, steps = schedule.table(x.device).narrow(0, schedule.checked_step(step), 1), None
    else:
        check_integers("step", step, f"an int or an integer tensor [{samples}]")
        if step.shape != (samples,):
            raise ValueError(
                f"step has shape {list(step.shape)} for {samples} pictures; expected an int or [{samples}]"
            )
        scales, steps = schedule.table(x.device), step.to(torch.int64)
    ids = source if sample_ids is None else sample_ids
    rows = rows.to(torch.int64).flatten()
    torch.ops.bpo_fast.add_noise_rows(x, scales, steps, ids, seed, source, rows, out)
    return out


def _check_rows_once(rows, height):
    marked = torch.zeros(height, dtype=torch.bool, device=rows.device).index_fill_(0, rows, True)
    if int(marked.count_nonzero()) != rows.numel():
        counts = torch.bincount(rows, minlength=height)
        raise ValueError(f"rows names row {int(counts.argmax())} of out more than once; expected each row once")


@torch.library.custom_op("bpo_fast::add_noise_rows", mutates_args=("out",), device_types=DEVICES)
def _add_noise_rows(
    x: torch.Tensor,
    scales: torch.Tensor,
    steps: torch.Tensor | None,
    ids: torch.Tensor | None,
    seed: int,
    source: torch.Tensor | None,
    rows: torch.Tensor,
    out: torch.Tensor,
) -> None:
    samples, (pictures, tokens, width), height = rows.numel() // max(x.shape[1], 1), x.shape, out.shape[0]
    if samples * tokens * width == 0:
        return
    if out.stride(1) != 1 or (height > 1 and abs(out.stride(0)) < width):
        raise ValueError("out has rows with gaps inside or that share memory; pass out=out.contiguous() instead")
    if overlap(x, out):
        raise ValueError("out overlaps x in memory; expected memory of its own")
    check_ranges(
        [
            ("step", steps, CLEAN, scales.shape[0], "with CLEAN (-1) the steps are"),
            ("source", source, 0, pictures, "x has pictures"),
            ("rows", rows, 0, height, "out has rows"),
        ]
    )
    _check_rows_once(rows, height)
    if not dense(x):  # copy what is read, not the whole cache
        x, source = (x.contiguous() if source is None else x.index_select(0, source.to(x.device))), None
    on_device = {
        name: None if tensor is None else tensor.to(x.device, non_blocking=True).contiguous()
        for name, tensor in {"steps": steps, "ids": ids, "source": source, "out_rows": rows}.items()
    }
    launch(
        x,
        out,
        samples=samples,
        n=tokens * width,
        width=width,
        x_stride=x.stride(0),
        out_stride=out.stride(0),
        scales=scales,
        seed=seed,
        **on_device,
    )


@_add_noise_rows.register_fake
def _(x, scales, steps, ids, seed, source, rows, out):
    return None
