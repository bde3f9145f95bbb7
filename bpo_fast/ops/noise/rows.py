"""add_noise_rows: cached image features, noised or clean, cast and written into rows of a packed sequence."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bpo_fast.ops.checks import INTEGER_DTYPES, check_device, check_indices, check_ranges, is_int
from bpo_fast.ops.noise.launch import DEVICES, dense, launch, overlap
from bpo_fast.ops.noise.operands import as_sample_ids, check_no_grad, check_stream, check_values, scales_of
from bpo_fast.ops.noise.schedule import NoiseSchedule

# The step that adds nothing: features are cast and written as they are.
CLEAN = -1
# Stands where no schedule is given and every step is CLEAN.
_NO_NOISE = NoiseSchedule([1.0], name="empty")


def add_noise_rows(
    x: Tensor,
    step: int | Tensor = CLEAN,
    *,
    out: Tensor,
    rows: Tensor,
    schedule: NoiseSchedule | None = None,
    seed: int = 0,
    source: Tensor | None = None,
    sample_ids: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """Write images of a feature cache, noised or clean, into the rows of their image tokens, in one pass.

    out[rows[b, m]] = x[s, m] * sqrt(abar_t) + eps * sqrt(1 - abar_t), with s = source[b], t = step[b], and the eps of
    `add_noise` for sample_ids[b]; out[rows[b, m]] = x[s, m] where step[b] is CLEAN. It is what

        noised = add_noise(x[source].float(), step, schedule=schedule, seed=seed, sample_ids=sample_ids)
        out.index_copy_(0, rows.flatten(), noised.to(out.dtype).flatten(0, 1))

    leaves in out, bit for bit, while each feature is read once and written once: fp32 arithmetic, one rounding to
    out's dtype at the end, for any pair of dtypes. Every NaN of x is written as the one NaN 0x7fffffff (0x7fff).

    It writes in place and is not differentiable: it is for frozen features and a frozen embedding table, before
    anything requires a gradient.

    Args:
        x: [N, M, H], float32, bfloat16 or float16: N cached images of M image tokens, on out's device.
        step: an int for all images, or an integer tensor [B]. CLEAN (-1), also as an element of the tensor, adds no
            noise.
        out: [S, H], float32, bfloat16 or float16, with contiguous rows: the embeddings of a packed sequence. Rows that
            are not in `rows` stay as they are.
        rows: integer tensor [B, M] or [B * M], image after image: the row of out of each image token, such as the
            positions of the image token's id in the packed sequence. No row may occur twice.
        schedule: what each step keeps of x; not needed where step is CLEAN.
        seed: any signed 64-bit integer.
        source: integer tensor [B], the image to read for each sample, repeats allowed; default 0 .. N - 1.
        sample_ids: int64 [B] or a list of ints, the id of each sample's noise; default `source`, so that an image has
            the same noise in any batch.

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
    check_values("x", x, ("N", "M", "H"))
    check_values("out", out, ("S", x.shape[2]))
    check_device("out", out, "x", x)
    check_no_grad(x, out)
    samples, tokens = x.shape[:2]
    if source is not None:
        check_indices("source", source, ("B",), dtypes=INTEGER_DTYPES)
        source, samples = source.to(torch.int64), source.shape[0]
    check_indices("rows", rows, (samples, tokens), (samples * tokens,), dtypes=INTEGER_DTYPES)
    if is_int(step) and step == CLEAN:
        step = torch.full((samples,), CLEAN)
        schedule = _NO_NOISE if schedule is None else schedule
    sample_ids = as_sample_ids(sample_ids)
    check_stream(samples, schedule, seed, sample_ids)
    scales, steps = scales_of(step, samples, schedule, x.device)
    ids = source if sample_ids is None else sample_ids
    torch.ops.bpo_fast.add_noise_rows(x, scales, steps, ids, seed, source, rows.to(torch.int64).flatten(), out)
    return out


def _check_rows_once(rows, height):
    marked = torch.zeros(height, dtype=torch.bool, device=rows.device).index_fill_(0, rows, True)
    if int(marked.count_nonzero()) != rows.numel():
        twice = int(torch.bincount(rows, minlength=height).argmax())
        raise ValueError(f"rows: found row {twice} of out more than once, expected each row at most once.")


@torch.library.custom_op("bpo_fast::add_noise_rows", mutates_args=("out",), device_types=DEVICES)
def _add_noise_rows(
    x: Tensor,
    scales: Tensor,
    steps: Tensor | None,
    ids: Tensor | None,
    seed: int,
    source: Tensor | None,
    rows: Tensor,
    out: Tensor,
) -> None:
    (images, tokens, width), height = x.shape, out.shape[0]
    if rows.numel() * width == 0:
        return
    if out.stride(1) != 1 or (height > 1 and abs(out.stride(0)) < width):
        raise ValueError(
            "out: found rows with gaps inside or that share memory, expected contiguous ones; "
            "pass out=out.contiguous()."
        )
    if overlap(x, out):
        raise ValueError("out: found memory that overlaps x, expected its own.")
    check_ranges(
        [
            ("step", steps, CLEAN, scales.shape[0], "CLEAN (-1) or a step of the schedule"),
            ("source", source, 0, images, "the images of x"),
            ("rows", rows, 0, height, "the rows of out"),
        ]
    )
    _check_rows_once(rows, height)
    if not dense(x):  # copy what is read, not the whole cache
        x, source = (x.contiguous() if source is None else x.index_select(0, source.to(x.device))), None
    launch(
        x,
        out,
        samples=rows.numel() // tokens,
        n=tokens * width,
        width=width,
        x_stride=x.stride(0),
        out_stride=out.stride(0),
        scales=scales,
        steps=steps,
        ids=ids,
        source=source,
        out_rows=rows,
        seed=seed,
    )
