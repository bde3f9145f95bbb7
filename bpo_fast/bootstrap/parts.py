"""The parts that a run is cut into: fixed ranges of its samples, however many processes work on them."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bpo_fast.bootstrap.maker import Maker
from bpo_fast.data.annotations import Annotation
from bpo_fast.runs.fingerprint import fingerprint

PARTS_FOLDER = "parts"  # journals and records of what is done
DATA_FOLDER = "data"  # shards


@dataclass(frozen=True)
class Part:
    """A range of a run's samples: one journal, one shard, one process at a time.

    Attributes:
        folder: of the run.
        number: of the part, from 0.
        count: number of parts.
        samples: its samples, in the order of their records.
    """

    folder: Path
    number: int
    count: int
    samples: Sequence[Annotation]

    @property
    def journal(self) -> Path:
        """What has been made of it, appended batch by batch."""
        return self.folder / PARTS_FOLDER / f"{self.number:05}.jsonl"

    @property
    def done(self) -> Path:
        """What says that the shard is whole, and what was left out of it; written last."""
        return self.folder / PARTS_FOLDER / f"{self.number:05}.json"

    @property
    def lock(self) -> Path:
        """Held by the process that works on it."""
        return self.folder / f".part-{self.number:05}.lock"

    @property
    def shard(self) -> Path:
        """Its pairs."""
        return self.folder / DATA_FOLDER / f"part-{self.number:05}-of-{self.count:05}.parquet"


def cut(folder: Path, samples: Sequence[Annotation], rows_per_part: int) -> list[Part]:
    """The parts of a run.

    >>> samples = [Annotation(number, str(number), "1.png", "What?", "A cat.") for number in range(5)]
    >>> [(part.shard.name, len(part.samples)) for part in cut(Path("out"), samples, 2)]
    [('part-00000-of-00003.parquet', 2), ('part-00001-of-00003.parquet', 2), ('part-00002-of-00003.parquet', 1)]
    """
    starts = range(0, len(samples), rows_per_part)
    return [Part(folder, n, len(starts), samples[start : start + rows_per_part]) for n, start in enumerate(starts)]


def layout(parts: Iterable[Part]) -> str:
    """Fingerprint of which sample lies in which part: journals of another layout are kept aside, see `kept.py`."""
    return fingerprint([sample.sample_id for sample in part.samples] for part in parts)


def made_key(sample: Annotation, maker: Maker, image_folders: Mapping[str, str | os.PathLike]) -> str:
    """What the responses of a kind to a sample are known by.

    The sample's id and texts, its image by name and size of its file, and the kind's settings: whatever else changes
    in a file of annotations leaves the responses as they are. The files of a large data set are not read again each
    time. The annotated answer counts where the responses are made of it.
    """
    try:
        size = os.stat(Path(image_folders[sample.source], sample.image)).st_size
    except (OSError, ValueError):
        size = None
    asked = [sample.source, sample.id, sample.image, size, [list(turn) for turn in sample.history], sample.question]
    answer = sample.answer if maker.needs_answer else None
    return fingerprint([maker.kind, maker.settings(), *asked, answer])
