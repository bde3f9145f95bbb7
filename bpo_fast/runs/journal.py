"""The responses made so far: one JSON object a line, appended and on disk before the next batch begins."""

import fcntl
import json
import os
from pathlib import Path


class Journal:
    """Append-only JSON lines of a run that may be killed at any moment.

    Lines are appended a batch at a time and forced to disk. On opening, a line cut off by a kill is dropped, and so
    are whole lines after the last multiple of `batch_size`: their batch is made again as it would have been.

    Args:
        path: the file; made if there is none.
        batch_size (`int`): lines of a batch.
        total (`int`): lines of the finished run, whose last batch may be smaller.

    Raises:
        ValueError: another process is writing the file.

    Example:

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "responses.jsonl"
    >>> with Journal(path, batch_size=2, total=5) as journal:
    ...     journal.append([{"row": 0}, {"row": 1}])
    >>> _ = path.write_text(path.read_text() + '{"row": 2}' + chr(10) + '{"ro')
    >>> with Journal(path, batch_size=2, total=5) as journal:
    ...     journal.rows
    [{'row': 0}, {'row': 1}]
    """

    def __init__(self, path, batch_size, total):
        self.rows = []
        self._file = Path(path).open("a+b")  # noqa: SIM115 - open and locked for the life of the journal
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"another process is writing {path}: wait for it or choose another output_dir.") from None
        self._file.seek(0)
        ends = []
        for line in self._file:
            try:
                self.rows.append(json.loads(line))
            except ValueError:
                break
            if not line.endswith(b"\n"):
                self.rows.pop()
                break
            ends.append(len(line) + (ends[-1] if ends else 0))
        kept = total if len(self.rows) == total else len(self.rows) // batch_size * batch_size
        del self.rows[kept:]
        self._file.truncate(ends[kept - 1] if kept else 0)

    def append(self, rows):
        """Add `rows` and return when they are on disk."""
        self._file.write(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows.extend(rows)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()
