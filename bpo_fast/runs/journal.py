"""The records made so far: one JSON object a line, appended and on disk before the next batch begins."""

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path


class Journal:
    """Append-only JSON lines of a run that may be killed at any moment.

    Records are appended a batch at a time and forced to disk. On opening, a line cut off by a kill is dropped, and so
    are whole lines after the last multiple of `batch_size`: their batch is made again as it would have been.

    Args:
        path: the file; made if there is none.
        batch_size: records of a batch.
        total: records of the finished run, whose last batch may be smaller.

    Attributes:
        records: all records on disk, in order.

    Raises:
        ValueError: another process is writing the file.

    Example:

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "responses.jsonl"
    >>> with Journal(path, batch_size=2, total=5) as journal:
    ...     journal.append([{"record": 0}, {"record": 1}])
    >>> _ = path.write_text(path.read_text() + '{"record": 2}' + chr(10) + '{"rec')
    >>> with Journal(path, batch_size=2, total=5) as journal:
    ...     journal.records
    [{'record': 0}, {'record': 1}]
    """

    def __init__(self, path: str | os.PathLike, batch_size: int, total: int):
        self.batch_size = batch_size
        self.records = []
        self._file = Path(path).open("a+b")  # noqa: SIM115 - open and locked for the life of the journal
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(
                f"{path}: found another process writing it, expected none; wait for it or choose another output_dir."
            ) from None
        self._file.seek(0)
        ends = [0]
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            try:
                self.records.append(json.loads(line))
            except ValueError:
                break
            ends.append(ends[-1] + len(line))
        kept = total if len(self.records) == total else len(self.records) // batch_size * batch_size
        del self.records[kept:]
        self._file.truncate(ends[kept])

    def append(self, records: Sequence[dict]) -> None:
        """Add `records` and return when they are on disk."""
        self._file.write(b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records.extend(records)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()
