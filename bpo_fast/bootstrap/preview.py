"""What a run is going to do, shown before it does it: the first prompts and images, and how much disk it will take."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from bpo_fast.bootstrap.job import Job
from bpo_fast.bootstrap.work import image_of
from bpo_fast.data.images import read_image
from bpo_fast.models.prompt import render
from bpo_fast.runs.tensor_cache import size

# Samples that stand for all in a forecast, spread evenly.
_SAMPLES = 256
# Bytes of a response beside its text: in a journal, and in a shard that is compressed.
_JOURNAL_ROW, _SHARD_ROW = 350, 250


def first_requests(job: Job, count: int = 2) -> str:
    """The first prompts of each kind as the model will read them, with their images: for this no weights are read.

    Args:
        job: the run.
        count: samples to show.
    """
    processor, lines = job.given.load_processor(), []
    for maker in job.makers:
        for sample in job.samples.batch(0, count):
            lines.append(f"--- {maker.kind}, {sample.source or 'record'} {sample.record}, id {sample.id}")
            lines.append(f"image: {_described(job, sample)}")
            for prompt in maker.asks(sample):
                text, _ = render(processor, prompt, num_images=int(maker.needs_images))
                lines += ["prompt:", text]
            lines += ["chosen:", sample.answer]
    return "\n".join(lines)


def _described(job, sample):
    file = image_of(job, sample)
    if isinstance(file, ValueError):
        return str(file)
    where = f"inside the data set, {sample.image}" if isinstance(file, bytes) else str(file)
    num_bytes = len(file) if isinstance(file, bytes) else file.stat().st_size
    try:
        width, height = read_image(file, sample.image).size
    except ValueError as error:
        return str(error)
    return f"{where} ({width} x {height} pixels, {size(num_bytes)})"


def disk_forecast(job: Job) -> int:
    """Bytes that a run's folder will hold, from samples spread evenly over it."""
    num_samples = len(job.samples)
    places = sorted(
        {number * num_samples // min(num_samples, _SAMPLES) for number in range(min(num_samples, _SAMPLES))}
    )
    total = 0
    for sample in job.samples.take(places):
        rows = sum(max(1, len(maker.asks(sample))) for maker in job.makers)
        text = len(f"{sample.question}{sample.answer}".encode())
        file = image_of(job, sample)
        if isinstance(file, bytes) or job.embed_images:
            image = len(file) if isinstance(file, bytes) else os.path.getsize(file) if isinstance(file, Path) else 0
        else:
            image = 0
        total += rows * (_JOURNAL_ROW + _SHARD_ROW + 2 * text + image)
    return total * num_samples // len(places)


def check_disk(job: Job) -> int:
    """Refuse a run that its disk has no room for.

    Returns:
        The bytes that its folder will hold.

    Raises:
        OSError: fewer are free than are still to be written.
    """
    needed = disk_forecast(job)
    there = 0
    for path in job.folder.rglob("*"):
        with suppress(FileNotFoundError):  # of another process, whose file has just got its name
            there += path.stat().st_size
    free = shutil.disk_usage(job.folder).free
    if needed - there > free:
        remedy = "leave embed_images out" if job.embed_images else "choose another output_dir"
        raise OSError(
            f"output_dir: found {size(free)} free on the disk of '{job.folder}', expected {size(needed - there)}, "
            f"which the run is going to write; make room or {remedy}."
        )
    return needed
