"""The records made so far: one JSON object a line, appended and on disk before the next batch begins."""

import json
import os
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from bpo_fast.runs.files import json_text, writing
from bpo_fast.runs.text import shown

_START = b'{"key": '  # of every line


class Journal:
    """Append-only JSON lines of a run that may be killed at any moment, each record found again by its key.

    Records are appended a batch at a time and forced to disk; each says how many of its batch are still `left` behind
    it. What a kill cut off, a line or whole lines of an unfinished batch, does not count and is overwritten: that
    batch is made again as it would have been. Any other damage is an error, so that nothing that was made is dropped
    without a word. A file is written only once a record is appended.

    Args:
        path: the file; there may be none yet.
        fields: what each record has beside its `key`, and of which type.

    Attributes:
        records: key -> record, in the order of the file.
        places: key -> where its line starts in the file, in bytes.

    Raises:
        ValueError: a line is not a record; the sentence names it.

    Example:

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "responses.jsonl"
    >>> with Journal(path, {"text": str}) as journal:
    ...     journal.append([{"key": "a", "text": "A cat."}, {"key": "b", "text": "A dog."}])
    >>> _ = path.write_text(path.read_text() + '{"key": "c", "te')
    >>> Journal(path, {"text": str}).records
    {'a': {'key': 'a', 'text': 'A cat.'}, 'b': {'key': 'b', 'text': 'A dog.'}}
    """

    def __init__(self, path: str | os.PathLike, fields: Mapping[str, type]):
        self.records, self.places = {}, {}
        self._path, self._fields = Path(path), {"key": str, **fields, "left": int}
        self._file, self._end = None, 0
        if self._path.exists():
            self._read()

    def _read(self):
        position, batch, places = 0, {}, {}
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                start, position = position, position + len(line)
                if not line.endswith(b"\n") and _is_cut_off(line):
                    break
                record = self._parse(line, number)
                left = record.pop("left")
                batch[record["key"]], places[record["key"]] = record, start
                if not left:
                    self.records |= batch
                    self.places |= places
                    self._end, batch, places = position, {}, {}

    def _parse(self, line, number):
        try:
            record = json.loads(line.decode())
            fits = isinstance(record, dict) and all(type(record.get(n)) is t for n, t in self._fields.items())
        except (ValueError, RecursionError):
            fits = False
        if not fits:
            raise ValueError(
                f"{self._path}, line {number}: found {shown(line.decode(errors='replace').rstrip())}, expected a "
                f"record of {', '.join(self._fields)}; delete the line, and the same command makes it again."
            )
        return record

    def append(self, records: Sequence[dict]) -> None:
        """Add a batch of `records` and return when they are on disk.

        Raises:
            OSError: they cannot be written; the journal is as it was.
        """
        lefts = reversed(range(len(records)))
        lines = [
            (json_text({"key": record["key"], **record, "left": left}) + "\n").encode()
            for record, left in zip(records, lefts, strict=True)
        ]
        starts = accumulate(map(len, lines), initial=self._end)
        data = memoryview(b"".join(lines))
        with writing(self._path):
            if self._file is None:
                self._file = self._path.open("ab", buffering=0)
                self._file.truncate(self._end)
            try:
                rest = data
                while rest:
                    rest = rest[self._file.write(rest) :]
                os.fsync(self._file.fileno())
            except BaseException:
                self._file.truncate(self._end)
                raise
        self._end += len(data)
        self.records |= {record["key"]: record for record in records}
        self.places |= {record["key"]: start for record, start in zip(records, starts, strict=False)}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._file is not None:
            self._file.close()


def _is_cut_off(line):
    """Whether a last line is what a kill leaves of a record, or a power failure of a file that had grown already."""
    return line.startswith(_START) or _START.startswith(line) or not line.strip(b"\0")
