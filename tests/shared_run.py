"""A run without a model, for tests of how its work is shared: many samples, small parts, a kind made of nothing."""

import multiprocessing
import os
import random
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from unittest.mock import patch

from PIL import Image

from bpo_fast.bootstrap import bootstrap, work
from bpo_fast.bootstrap.maker import Made

NUM_SAMPLES = 24
RESULTS = ("README.md", "manifest.json", "skipped.jsonl")


@dataclass(frozen=True)
class Reversed:
    """The answer's words in reverse order; what it made is noted in a file, a line a batch."""

    kind: ClassVar[str] = "self_generated"
    needs_model: ClassVar[bool] = False
    needs_images: ClassVar[bool] = True
    needs_answer: ClassVar[bool] = True

    notes: str
    seconds: float = 0.0

    def settings(self):
        return {"seed": 3}

    def check(self, model, processor):
        pass

    def asks(self, sample):
        return [sample.prompt]

    def make(self, model, processor, samples, images):
        time.sleep(self.seconds)
        with open(self.notes, "a") as file:
            file.write(f"{os.getpid()} {' '.join(sample.id for sample in samples)}\n")
        assert all(image.mode == "RGB" for image in images)
        return [[Made(" ".join(reversed(sample.answer.split())))] for sample in samples]


class KilledOnce(Reversed):
    """Its fourth batch, or one soon after, kills the process that makes it."""

    def make(self, model, processor, samples, images):
        made = super().make(model, processor, samples, images)
        if len(Path(self.notes).read_text().splitlines()) >= 4:
            with suppress(FileExistsError):
                Path(self.notes).with_suffix(".killed").touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        return made


def make_samples(folder: Path) -> list[dict]:
    """Records of LLaVA-Instruct, the images of two of which cannot be read."""
    (folder / "images").mkdir(exist_ok=True)
    records = []
    for number in range(NUM_SAMPLES):
        name = f"{number}.png"
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / "images" / name)
        if number in (5, 17):
            (folder / "images" / name).write_bytes(b"no image")
        answer = " ".join(random.Random(number).sample(["a", "red", "cat", "on", "the", "mat"], k=3 + number % 4))
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": answer}]
        records.append({"id": str(number), "image": name, "conversations": turns})
    return records


def run(folder: Path, out: str, records: list[dict], **options):
    """One process's bootstrap of `records` in parts of five."""
    options = {"batch_size": 2, "rows_per_part": 5, "kinds": [Reversed(str(folder / f"{out}.notes"))]} | options
    with patch.object(work, "WITHOUT_MODEL", 0):  # so that a part has several batches
        return bootstrap("no model", None, records, folder / "images", folder / out, **options)


def start(count: int, *arguments, **options) -> list[multiprocessing.Process]:
    """So many processes of `run`."""
    # Forks of a process that has imported all and done nothing: they start in no time, and share no lock of tqdm's,
    # which a killed one would keep.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["shared_run"])
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    processes = [context.Process(target=run, args=arguments, kwargs=options) for _ in range(count)]
    for process in processes:
        process.start()
    return processes


def notes(folder: Path, out: str) -> list[list[str]]:
    """A process id and the ids of its samples, a list a batch that was made."""
    return [line.split() for line in (folder / f"{out}.notes").read_text().splitlines()]


def contents(out: Path) -> dict[str, bytes]:
    """What a run leaves, by name, but for its journals: hidden files as well."""
    made = (
        str(path.relative_to(out)) for pattern in ("data/*", "parts/*.json", "parts/.*") for path in out.glob(pattern)
    )
    return {name: (out / name).read_bytes() for name in [*RESULTS, "metadata.json", *made]}


def kill_at_random(folder: Path, out: str, records: list[dict], count: int, kills: int, seed: int) -> list[int]:
    """Processes that share a run, of which one drawn at random is killed at a random moment and started again.

    Args:
        folder, out, records: of `run`.
        count: processes at a time.
        kills: how many are killed.
        seed: of the draws.

    Returns:
        How the last `count` processes ended.
    """
    rng, kinds = random.Random(seed), [Reversed(str(folder / f"{out}.notes"), seconds=0.05)]
    processes = start(count, folder, out, records, kinds=kinds)
    for _ in range(kills):
        time.sleep(rng.uniform(0, 0.3))
        number = rng.randrange(count)
        processes[number].kill()
        processes[number].join()
        (processes[number],) = start(1, folder, out, records, kinds=kinds)
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]
