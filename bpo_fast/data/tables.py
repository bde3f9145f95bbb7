"""Rows of a data set of Hugging Face's, one at a time, in memory that does not grow with it.

`datasets` finds and fetches what there is (a name on the Hub, Parquet files, a folder of `save_to_disk`) and keeps it
as Arrow files. Those are mapped into memory here: a pass over a column touches no other, so images embedded in a table
are read only when they are asked for.
"""

import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, load_dataset, load_from_disk

from bpo_fast.data.conversations import Columns
from bpo_fast.data.images import Embedded
from bpo_fast.runs.text import shown

# Mapped pages count as memory of the process until they are given back.
_BATCHES_KEPT = 64


class TableRecords:
    """The rows of a data set, iterated as (number, record).

    Args:
        location: a Parquet or Arrow file, a folder of them, a folder of `save_to_disk`, or a data set of the Hub.
        columns: where a row keeps what; only these are read.
        split: of a data set that has several.
        subset: of a data set of the Hub that has several.

    Raises:
        ValueError: there is no such data set, it cannot be read, or it lacks a column.
    """

    def __init__(
        self, location: str | os.PathLike, columns: Columns, *, split: str = "train", subset: str | None = None
    ):
        self.name, self.columns = str(location), columns
        self.files = _arrow_files(self.name, split, subset)
        found = _batches(self.files[0])[0].schema.names if self.files else []
        missing = [name for name in (columns.image, *columns.texts) if name not in found]
        if missing:
            raise ValueError(
                f"{self.name}: found no column '{missing[0]}' among {shown(found)}, expected the columns of image and "
                "texts; say in columns which they are."
            )

    @property
    def size(self) -> int:
        """Number of rows."""
        return sum(_starts(file)[-1] for file in self.files)

    def __iter__(self) -> Iterator[tuple[int, dict]]:
        row = 0
        for file in self.files:
            for number, batch in enumerate(_batches(file)):
                for record in self._records(batch, row):
                    yield row, record
                    row += 1
                if number % _BATCHES_KEPT == 0:
                    _mapped(file).madvise(mmap.MADV_DONTNEED)
            _mapped(file).madvise(mmap.MADV_DONTNEED)

    def read(self, rows: Iterable[int]) -> list[dict]:
        """The records of these rows."""
        return [self._records(self._row(row), row)[0] for row in rows]

    def is_embedded(self, row: int) -> bool:
        """Whether the image of a row is in the table itself."""
        return isinstance(_images(self._row(row).column(self.columns.image), row)[0], Embedded)

    def image_bytes(self, row: int) -> bytes:
        """The embedded image of a row."""
        image = self._row(row).column(self.columns.image)[0].as_py()
        image = image[0] if isinstance(image, list) else image
        return image["bytes"] if isinstance(image, dict) else image

    def _row(self, row):
        """A batch of one row."""
        for file in self.files:
            starts = _starts(file)
            if row < starts[-1]:
                number = bisect_right(starts, row) - 1
                return _batches(file)[number].slice(row - starts[number], 1)
            row -= starts[-1]
        raise IndexError(row)

    def _records(self, batch, row):
        texts = [name for name in (self.columns.id, *self.columns.texts) if name in batch.schema.names]
        records = batch.select(texts).to_pylist()
        images = _images(batch.column(self.columns.image), row)
        return [record | {self.columns.image: image} for record, image in zip(records, images, strict=True)]


def _images(column: pa.Array, row: int) -> list[Any]:
    """An entry an image of a column: its path, its name if it is embedded, None if there is none or several."""
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        flat = iter(_images(column.flatten(), row))
        several = [[next(flat) for _ in range(count or 0)] for count in column.value_lengths().to_pylist()]
        return [images[0] if len(images) == 1 else None for images in several]
    if pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}:
        fields = dict(zip((field.name for field in kind), column.flatten(), strict=True))
        paths, embedded = fields["path"].to_pylist(), fields["bytes"].is_valid().to_pylist()
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        paths, embedded = [None] * len(column), column.is_valid().to_pylist()
    else:
        return column.to_pylist()
    names = (path or f"row {row + number}" for number, path in enumerate(paths))
    return [Embedded(name) if inside else path for name, path, inside in zip(names, paths, embedded, strict=True)]


def _arrow_files(name: str, split: str, subset: str | None) -> tuple[str, ...]:
    path = Path(name)
    try:
        if path.is_dir() and (path / "dataset_dict.json").is_file():
            path /= split
            if not path.is_dir():
                raise FileNotFoundError(f"no split '{split}'")
        if path.is_dir() and (path / "dataset_info.json").is_file():
            return _files_of(load_from_disk(str(path)))
        if path.is_file() and path.suffix == ".arrow":
            return (str(path),)
        if path.exists():
            files = [path] if path.is_file() else sorted(path.rglob("*.parquet")) or sorted(path.rglob("*.arrow"))
            if files and files[0].suffix == ".arrow":
                return tuple(map(str, files))
            if not files:
                raise FileNotFoundError("a folder without .parquet or .arrow files")
            return _files_of(load_dataset("parquet", data_files=list(map(str, files)), split="train"))
        return _files_of(load_dataset(name, subset, split=split))
    # What the Hub, the network, a damaged file or a builder brings up.
    except Exception as error:
        raise ValueError(
            f"{name}: found no data set that can be read ({shown(str(error))}), expected a JSON, Parquet or Arrow "
            "file, a folder of save_to_disk, or a data set of the Hub."
        ) from None


def _files_of(dataset: Dataset) -> tuple[str, ...]:
    return tuple(entry["filename"] for entry in dataset.cache_files)


@lru_cache
def _mapped(file: str) -> mmap.mmap:
    with open(file, "rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


@lru_cache
def _batches(file: str) -> list[pa.RecordBatch]:
    """The batches of a file, none of whose pages are read for that."""
    buffer = pa.py_buffer(_mapped(file))
    try:
        return list(pa.ipc.open_stream(buffer))
    except pa.ArrowInvalid:  # Arrow's other form, with an index at its end
        opened = pa.ipc.open_file(buffer)
        return [opened.get_batch(number) for number in range(opened.num_record_batches)]


@lru_cache
def _starts(file: str) -> list[int]:
    """The row that each batch of a file starts with, and at last the number of rows."""
    starts = [0]
    for batch in _batches(file):
        starts.append(starts[-1] + batch.num_rows)
    return starts
