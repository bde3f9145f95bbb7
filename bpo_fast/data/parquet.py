"""Shards of preference pairs: Parquet files that `datasets.load_dataset` reads with no code of ours.

The columns are TRL's `images`, `prompt`, `chosen` and `rejected`, and where each pair comes from. A shard's bytes
depend on its rows and on pyarrow's version alone: every setting of the writer is fixed, and nothing tells the time.
"""

import hashlib
import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, List, Value
from datasets.table import InMemoryTable, Table

from bpo_fast.runs.files import replacing
from bpo_fast.runs.text import shown

TURNS = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
# Of every shard. Plain `datasets` decodes an image to RGB, as `read_image` does.
FEATURES = Features(
    {
        "images": List(Image(mode="RGB")),
        "prompt": TURNS,
        "chosen": TURNS,
        "rejected": TURNS,  # null where there is a chosen response alone
        "rejected_type": Value("string"),  # the kind
        "variant": Value("string"),  # what tells it from the others of its kind
        "rejected_truncated": Value("bool"),
        "chosen_logp": Value("float64"),  # of the whole response, in nats; null where it was not asked for
        "rejected_logp": Value("float64"),
        "source": Value("string"),
        "id": Value("string"),
        "image_name": Value("string"),  # below its image folder
        "seed": Value("int64"),
        "step": Value("int64"),  # of the noise schedule
        "schedule": Value("string"),
        "template_version": Value("string"),
        "model": Value("string"),  # fingerprint of its weights, and of its adapter's
        "decoding": Value("string"),  # JSON
        "details": Value("string"),  # JSON: whatever else the kind says of this response
    }
)
# Rows that are in memory at a time, and that a reader reads for one of them: with images inside, some 10 MB.
_GROUP_ROWS = 100


@dataclass(frozen=True, slots=True)
class Shard:
    """What is written of a shard, to know it again.

    Attributes:
        rows: number of pairs.
        bytes: size of the file.
        sha256: of the file.
    """

    rows: int
    bytes: int
    sha256: str


def write_shard(path: str | os.PathLike, rows: Iterable[dict]) -> Shard:
    """Write rows with the columns of `FEATURES` as one Parquet file, whole or not at all.

    Args:
        path: of the file.
        rows: `images` as {bytes, path}, one of them null; a column that a row lacks is null there.
    """
    schema, count = FEATURES.arrow_schema, 0
    with replacing(path, binary=True) as file:
        hashed = _Hashed(file)
        options = {"compression": "zstd", "compression_level": 3, "write_page_checksum": True, "version": "2.6"}
        with pq.ParquetWriter(hashed, schema, **options) as writer:
            rows = iter(rows)
            while group := list(islice(rows, _GROUP_ROWS)):
                columns = {name: [row.get(name) for row in group] for name in schema.names}
                writer.write_table(pa.table(columns, schema=schema), row_group_size=_GROUP_ROWS)
                count += len(group)
        return Shard(count, hashed.size, hashed.digest.hexdigest())


def read_shards(folder: Path, sizes: Mapping[str, tuple[int, int]], *, in_memory: bool = True) -> Table:
    """Read the shards of a folder, each page against its checksum.

    Args:
        folder: of the data set.
        sizes: name of a file below it -> its bytes and rows, as the manifest has them.
        in_memory: read all now; otherwise they go through the Arrow cache of `datasets`, which maps them into memory.

    Raises:
        ValueError: a shard is missing, damaged, or not the one that the manifest means.
    """
    for name, size in sizes.items():
        try:
            found = (folder / name).stat().st_size, pq.read_metadata(folder / name).num_rows
        except FileNotFoundError:
            raise _damaged(folder / name, "no such file") from None
        except (OSError, pa.ArrowException) as error:
            raise _damaged(folder / name, f"no Parquet file that can be read ({shown(str(error))})") from None
        if found != size:
            raise _damaged(
                folder / name, f"{found[0]:,} bytes and {found[1]:,} rows instead of {size[0]:,} and {size[1]:,}"
            )
    if not in_memory:
        files = [str(folder / name) for name in sizes]
        return Dataset.from_parquet(files, features=FEATURES).data
    tables = []
    for name in sizes:
        try:
            tables.append(pq.read_table(folder / name, schema=FEATURES.arrow_schema, page_checksum_verification=True))
        except (OSError, pa.ArrowException) as error:
            raise _damaged(folder / name, f"pages that cannot be read ({shown(str(error))})") from None
    return InMemoryTable(pa.concat_tables(tables))


def _damaged(path, found):
    return ValueError(
        f"{path}: found {found}, expected the shard that the manifest lists; delete it, and the same bootstrap "
        "command writes it again."
    )


class _Hashed(io.RawIOBase):
    """A file that is written from its start to its end, and what it holds so far."""

    def __init__(self, file):
        self._file, self.digest, self.size = file, hashlib.sha256(), 0

    def writable(self):
        return True

    def write(self, data):
        self._file.write(data)
        self.digest.update(data)
        self.size += len(memoryview(data))
        return len(memoryview(data))

    def tell(self):
        return self.size
