"""Files that are never half-written."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[TextIO]:
    """Open `path` for writing text under a temporary name; it takes its own name only when the block ends well.

    Example:

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with replacing(folder / "note.txt") as file:
    ...     _ = file.write("whole")
    >>> [entry.name for entry in folder.iterdir()]
    ['note.txt']
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with replacing(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def write_jsonl(path: str | os.PathLike, records: Iterable[dict]) -> None:
    """Write one JSON object a line, whole or not at all."""
    with replacing(path) as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file, or a JSON-lines file (`.jsonl`) as a list.

    Raises:
        FileNotFoundError: `path` is not a file.
        ValueError: it is not UTF-8 or not valid JSON; the sentence gives line and column.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: found no such file, expected a JSON file.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: found byte {error.start} that cannot be decoded, expected UTF-8 text.") from None
    if path.suffix != ".jsonl":
        return _parse_json(text, path)
    lines = text.split("\n")
    return [_parse_json(line, path, first_line=number) for number, line in enumerate(lines, start=1) if line.strip()]


def _parse_json(text, path, first_line=1):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {first_line + error.lineno - 1}, column {error.colno}"
        raise ValueError(f"{path}: found an error at {where} ({error.msg}), expected valid JSON.") from None
