"""The parts that a run is cut into: fixed ranges of its samples, however many processes work on them."""

from dataclasses import dataclass
from pathlib import Path

PARTS_FOLDER = "parts"  # journals and records of what is done
DATA_FOLDER = "data"  # shards


@dataclass(frozen=True)
class Part:
    """A range of a run's samples: one journal, one shard, one process at a time.

    Attributes:
        folder: of the run.
        number: of the part, from 0.
        count: number of parts.
        start, stop: its samples, in the order of sources and records.
    """

    folder: Path
    number: int
    count: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of its samples."""
        return self.stop - self.start

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


def cut(folder: Path, num_samples: int, rows_per_part: int) -> list[Part]:
    """The parts of a run.

    >>> [(part.shard.name, part.start, part.stop) for part in cut(Path("out"), 5, 3)]
    [('part-00000-of-00002.parquet', 0, 3), ('part-00001-of-00002.parquet', 3, 5)]
    """
    starts = range(0, num_samples, rows_per_part)
    return [
        Part(folder, number, len(starts), start, min(start + rows_per_part, num_samples))
        for number, start in enumerate(starts)
    ]
