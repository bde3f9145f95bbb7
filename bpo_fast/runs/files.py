"""Files that are never half-written."""

import filecmp
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from bpo_fast.runs.text import shown


@contextmanager
def writing(path: str | os.PathLike, *others: str | os.PathLike) -> Iterator[None]:
    """Turn the system's refusal to write `path` (a full disk, a missing permission) into a sentence.

    Args:
        path: the file or folder that the block writes.
        others: names that it is written under meanwhile.

    Raises:
        OSError: the sentence; errors of other files pass through.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(path), *map(str, others)):
            raise
        raise OSError(
            f"{path}: found that it cannot be written ({error.strerror}), expected room and permission for it; see to "
            "that and give the same command again, or choose another folder."
        ) from error


@contextmanager
def replacing(path: str | os.PathLike, *, binary: bool = False) -> Iterator[IO]:
    """Open `path` for writing under a temporary name; it takes its own name only when the block ends well.

    A file that holds the same bytes already is left alone, its time of change included.

    Args:
        path: the file.
        binary: write bytes; by default text in UTF-8.

    Raises:
        OSError: it cannot be written; see `writing`.

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
    with writing(path, temporary):
        try:
            with temporary.open("wb") if binary else temporary.open("w", encoding="utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if not (path.is_file() and filecmp.cmp(temporary, path, shallow=False)):
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def json_text(value: Any, **options: Any) -> str:
    """`json.dumps` in readable letters, or in escapes where a file does not take a text: see `is_text`.

    >>> print(json_text({"id": "é"}), json_text({"id": chr(0xD83D)}))
    {"id": "é"} {"id": "\\ud83d"}
    """
    text = json.dumps(value, ensure_ascii=False, **options)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, **options)
    return text


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with replacing(path) as file:
        file.write(json_text(value, indent=2) + "\n")


def write_jsonl(path: str | os.PathLike, records: Iterable[dict]) -> None:
    """Write one JSON object a line, whole or not at all."""
    with replacing(path) as file:
        for record in records:
            file.write(json_text(record) + "\n")


def json_file(path: str | os.PathLike) -> Path:
    """The path, of a file that is there.

    Raises:
        FileNotFoundError: it is not.
    """
    path = Path(path)
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        found = "a folder" if os.path.isdir(path) else "no such file"
        raise FileNotFoundError(f"{path}: found {found}, expected a JSON file.")
    return path


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file, or JSON lines as a list: a `.jsonl` file, or one of another name that holds several values.

    The text is UTF-8, UTF-16 or UTF-32, with or without a byte-order mark.

    Raises:
        FileNotFoundError: `path` is not a file.
        ValueError: it cannot be decoded, is not valid JSON (the sentence gives line and column), is nested too
            deeply, or an object in it has a key twice.
    """
    path = json_file(path)
    try:
        data = path.read_bytes()
        text = data.decode(json.detect_encoding(data))
    except OSError as error:
        raise OSError(f"{path}: found a file that cannot be read ({error.strerror}), expected a JSON file.") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}: found byte {error.start}, in line {line}, that cannot be decoded, expected UTF-8 text."
        ) from None
    if path.suffix == ".jsonl":
        return _read_lines(text, path)
    if not text.strip():
        raise ValueError(f"{path}: found an empty file, expected JSON.")
    try:
        return parse_json(text, path)
    except _Fault as fault:
        first, _, rest = text.lstrip().partition("\n")
        if first.startswith("{") and rest.strip() and _is_json(first):
            return _read_lines(text, path)
        raise ValueError(str(fault)) from None


class _Fault(ValueError):
    pass


def _read_lines(text, path):
    lines = text.split("\n")
    try:
        values = [parse_json(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()]
    except _Fault as fault:
        # A JSON list over several lines may be called .jsonl all the same.
        if text.lstrip().startswith("[") and _is_json(text):
            return parse_json(text, path)
        raise ValueError(str(fault)) from None
    return values[0] if len(values) == 1 and isinstance(values[0], list) else values


def _is_json(text):
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def parse_json(text: str, path: str | os.PathLike, line: int | None = None) -> Any:
    """The value in the text of a file, or in its line of that number.

    Raises:
        ValueError: as of `read_json`.
    """
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        where = f"line {line or error.lineno}, column {error.colno}"
        raise _Fault(f"{path}: found an error at {where} ({error.msg}), expected valid JSON.") from None
    # A key twice, a number of thousands of digits, brackets within brackets without end.
    except (ValueError, RecursionError) as error:
        where = f" in line {line}" if line else ""
        raise _Fault(f"{path}: found an error{where} ({error}), expected valid JSON.") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs, as `json`'s `object_pairs_hook`; ValueError where a key is there twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shown(twice)} is there twice in {shown(value)}")
    return value
