"""Rows of a data set of Hugging Face's, one at a time, in memory that does not grow with it.

`datasets` finds and fetches what there is (a name on the Hub, Parquet files, a folder of `save_to_disk`) and keeps it
as Arrow files. Those are mapped into memory here: a pass over a column touches no other, so images embedded in a table
are read only when they are asked for.
"""

import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import load_dataset, load_from_disk
from pyarrow.dataset import ParquetFragmentScanOptions

from bpo_fast.data.conversations import LLAVA, Columns
from bpo_fast.data.images import Embedded
from bpo_fast.runs.text import shown

# Batches of a pass after which their pages, which count as memory of the process, are given back.
_BATCHES_KEPT = 8


class TableRecords:
    """The rows of a data set, iterated as (number, record).

    The image of a record is a path, an `Embedded` name, or None where the row has none or several.

    Args:
        location: a Parquet or Arrow file, a folder of them, a folder of `save_to_disk`, or a data set of the Hub.
        columns: where a row keeps what; only these are read.
        split: of a data set that has several.
        subset: of a data set of the Hub that has several.

    Raises:
        ValueError: there is no such data set, it cannot be read, or it lacks a column; while rows are read, that some
            are damaged.

    Example:

    >>> from tempfile import mkdtemp
    >>> path = Path(mkdtemp(), "rows.arrow")
    >>> table = pa.table({"picture": ["1.png", "2.png"], "q": ["What?", "Where?"], "a": ["A cat.", "Here."]})
    >>> with pa.ipc.new_stream(str(path), table.schema) as writer:
    ...     writer.write_table(table)
    >>> rows = TableRecords(path, Columns(image="picture", question="q", answer="a"))
    >>> rows.size, rows.read([1])
    (2, [{'q': 'Where?', 'a': 'Here.', 'picture': '2.png'}])
    """

    def __init__(
        self, location: str | os.PathLike, columns: Columns, *, split: str = "train", subset: str | None = None
    ):
        self.name, self.columns = str(location), columns
        try:
            self._files = [_ArrowFile(file) for file in _arrow_files(self.name, split, subset)]
        # What the Hub, the network, a damaged file or a builder of `datasets` brings up.
        except Exception as error:
            raise ValueError(
                f"{self.name}: found no data set that can be read ({shown(str(error))}), expected a JSON, Parquet or "
                "Arrow file, a folder of them or of save_to_disk, or a data set of the Hub."
            ) from None
        # A column of ids may be missing, unless it was asked for by its name.
        needed = (columns.image, *columns.texts, *({columns.id} - {LLAVA.id}))
        for file in self._files:
            missing = [name for name in needed if name not in file.schema.names]
            if missing:
                raise ValueError(
                    f"{self.name}: found no column '{missing[0]}' among {', '.join(file.schema.names)}, expected "
                    "those of image and texts; say in columns which they are."
                )
        self._starts = list(accumulate((file.starts[-1] for file in self._files), initial=0))

    @property
    def size(self) -> int:
        """Number of rows."""
        return self._starts[-1]

    def __iter__(self) -> Iterator[tuple[int, dict]]:
        for file, first in zip(self._files, self._starts, strict=False):
            for number, (batch, start) in enumerate(zip(file.batches, file.starts, strict=False), start=1):
                yield from enumerate(self._records(batch, first + start), start=first + start)
                if number % _BATCHES_KEPT == 0 or number == len(file.batches):
                    file.give_back()

    def read(self, rows: Iterable[int]) -> list[dict]:
        """The records of these rows."""
        records = [self._records(self._row(row), row)[0] for row in rows]
        for file in self._files:
            file.give_back()
        return records

    def image_bytes(self, row: int) -> bytes | None:
        """The embedded image of a row; None if it is given by its path."""
        image = self._row(row).column(self.columns.image)[0].as_py()
        image = image[0] if isinstance(image, list) else image
        image = image["bytes"] if isinstance(image, dict) else image
        return image if isinstance(image, bytes) else None

    def _row(self, row):
        """A batch of one row."""
        number = bisect_right(self._starts, row) - 1
        file, row = self._files[number], row - self._starts[number]
        number = bisect_right(file.starts, row) - 1
        return file.batches[number].slice(row - file.starts[number], 1)

    def _records(self, batch, row):
        names = [name for name in (self.columns.id, *self.columns.texts) if name in batch.schema.names]
        try:
            for name in (*names, self.columns.image):
                batch.column(name).validate(full=True)
            records = batch.select(names).to_pylist()
            images = _images(batch.column(self.columns.image), row)
        except (pa.ArrowException, UnicodeDecodeError) as error:
            rows = f"rows {row} to {row + len(batch) - 1}"
            raise ValueError(
                f"{self.name}: found damage within {rows} ({shown(str(error))}), expected whole ones; make or fetch "
                "the data set again."
            ) from None
        return [record | {self.columns.image: image} for record, image in zip(records, images, strict=True)]


class _ArrowFile:
    """A file of Arrow's, in either of its forms: its batches, and the row that each starts with."""

    def __init__(self, path: str):
        with open(path, "rb") as file:
            self.mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        buffer = pa.py_buffer(self.mapped)
        if self.mapped[:6] == b"ARROW1":  # with an index at its end
            file = pa.ipc.open_file(buffer)
            self.batches = [file.get_batch(number) for number in range(file.num_record_batches)]
        else:
            file = pa.ipc.open_stream(buffer)
            self.batches = list(file)
        self.schema = file.schema
        self.starts = list(accumulate(map(len, self.batches), initial=0))

    def give_back(self) -> None:
        """Let the pages go that were read; they are mapped again when they are looked at."""
        self.mapped.madvise(mmap.MADV_DONTNEED)


def _images(column: pa.Array, row: int) -> list[Any]:
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


def _arrow_files(name: str, split: str, subset: str | None) -> list[str]:
    path = Path(name)
    if (path / "dataset_dict.json").is_file():
        path /= split
        if not path.is_dir():
            raise FileNotFoundError(f"no split '{split}'")
    if (path / "dataset_info.json").is_file():
        dataset = load_from_disk(str(path))
    elif path.exists():
        files = [path] if path.is_file() else sorted(path.rglob("*.parquet")) or sorted(path.rglob("*.arrow"))
        if not files:
            raise FileNotFoundError("a folder without .parquet and .arrow files")
        if files[0].suffix == ".arrow":
            return list(map(str, files))
        # By default whole columns of a row group are read ahead, and converted in batches of a row group.
        reading = ParquetFragmentScanOptions(use_buffered_stream=True, pre_buffer=False)
        options = {"batch_size": 1000, "fragment_scan_options": reading}
        dataset = load_dataset("parquet", data_files=list(map(str, files)), split="train", **options)
        pa.default_memory_pool().release_unused()  # what the conversion took
    else:
        dataset = load_dataset(name, subset, split=split)
    return [entry["filename"] for entry in dataset.cache_files]
