"""Files that are never half-written, and folders that hold one run."""

import json
import os
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path):
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


def write_json(path, value):
    """Write `value` as indented JSON, whole or not at all."""
    with replacing(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def write_jsonl(path, rows):
    """Write one JSON object a line, whole or not at all."""
    with replacing(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_json(path):
    """Read a JSON file, or a JSON-lines file (`.jsonl`) as a list.

    Raises:
        FileNotFoundError: `path` is not a file.
        ValueError: it is not UTF-8 or not valid JSON; the sentence gives line and column.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} cannot be read.") from None
    if path.suffix != ".jsonl":
        return _parse_json(text, path)
    lines = text.split("\n")
    return [_parse_json(line, path, first_line=number) for number, line in enumerate(lines, start=1) if line.strip()]


def _parse_json(text, path, first_line=1):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{path} is not valid JSON: {error.msg} at line {line}, column {error.colno}.") from None


def claim_folder(output_dir, settings, *, record="metadata.json"):
    """Take `output_dir` for the run that `settings` describe, or go on with it if it is that run's already.

    Args:
        output_dir: folder of the run; made if it does not exist.
        settings (`dict`): what decides the run's result, as JSON values.
        record (`str`): name of the file in the folder that keeps the settings.

    Returns:
        `bool`: True if the folder held this run already.

    Raises:
        ValueError: the folder holds a run with other settings, or files that are no run's.

    Example:

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "run"
    >>> claim_folder(folder, {"seed": 0}), claim_folder(folder, {"seed": 0})
    (False, True)
    >>> claim_folder(folder, {"seed": 1})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: output_dir ... holds another run (seed is 0 there and 1 here): choose another output_dir or delete it.
    """
    output_dir = Path(output_dir)
    settings = json.loads(json.dumps(settings))
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir {output_dir} is a file: choose a folder.")
    path = output_dir / record
    if path.exists():
        content = read_json(path)
        found = content.get("settings") if isinstance(content, dict) else None
        if not isinstance(found, dict):
            raise ValueError(f"{path} does not hold the settings of a run: choose another output_dir or delete it.")
        for name in [*settings, *(name for name in found if name not in settings)]:
            there, here = found.get(name), settings.get(name)
            if there != here:
                raise ValueError(
                    f"output_dir {output_dir} holds another run ({name} is {there!r} there and {here!r} here): "
                    "choose another output_dir or delete it."
                )
        return True
    if output_dir.exists() and any(not entry.name.startswith(".") for entry in output_dir.iterdir()):
        raise ValueError(
            f"output_dir {output_dir} is not empty and has no {record} of an earlier run: choose another output_dir."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(path, {"settings": settings})
    return False
