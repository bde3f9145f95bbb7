"""Folders that hold one run each, and one process at a time."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bpo_fast.runs.files import read_json, write_json, writing

LOCK_FILE = ".lock"


@contextmanager
def locked_folder(output_dir: str | os.PathLike) -> Iterator[Path]:
    """Keep `output_dir` for this process while the block runs.

    The folder is made if there is none, and removed again if the block puts nothing into it: whoever was refused can
    correct the command and come back. What a killed process left half-written is removed.

    Yields:
        The folder.

    Raises:
        ValueError: `output_dir` is a file, or another process is at work in it.
        OSError: it cannot be made or written.

    Example:

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "run"
    >>> with locked_folder(path) as folder, locked_folder(path):  # doctest: +ELLIPSIS
    ...     pass
    Traceback (most recent call last):
    ValueError: output_dir: found another process at work in '...', expected none; wait for it or choose another ...
    >>> path.exists()
    False
    """
    output_dir = Path(output_dir)
    with writing(output_dir, output_dir / LOCK_FILE, *output_dir.parents):
        if output_dir.exists() and not output_dir.is_dir():
            raise ValueError(
                f"output_dir: found the file '{output_dir}', expected a folder; choose another output_dir."
            )
        made = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = _lock(output_dir / LOCK_FILE)
    try:
        for left in output_dir.glob(".*.tmp"):
            left.unlink(missing_ok=True)
        yield output_dir
    finally:
        (output_dir / LOCK_FILE).unlink(missing_ok=True)
        lock.close()
        for folder in made:
            if any(folder.iterdir()):
                break
            folder.rmdir()


def _lock(path):
    """The lock file, open and locked."""
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(
                f"output_dir: found another process at work in '{path.parent}', expected none; wait for it or choose "
                "another output_dir."
            ) from None
        # Its last holder may have removed it between the two calls above.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


def holds_run(output_dir: str | os.PathLike, settings: dict, *, record: str = "metadata.json") -> bool:
    """Whether `output_dir` holds the run that `settings` describe; the folder is left as it is.

    Args:
        output_dir: folder of the run.
        settings: what decides the run's result, as JSON values. One that is `{"path": ..., "weights": ...}` is known
            by its weights: a model or adapter may be moved, and another one in its place is another.
        record: name of the file in the folder that keeps the settings.

    Returns:
        True if it does, False if there is no folder or an empty one.

    Raises:
        ValueError: the folder holds a run with other settings, or files but no run.
    """
    kept = read_run(output_dir, record=record)
    if kept is None:
        return False
    found = kept["settings"]
    settings = json.loads(json.dumps(settings))
    for name in settings | found:
        if difference := _difference(name, found.get(name), settings.get(name)):
            raise ValueError(
                f"output_dir: found another run in '{output_dir}' ({difference}), expected this run or an empty "
                "folder; choose another output_dir."
            )
    return True


def read_run(output_dir: str | os.PathLike, *, record: str = "metadata.json") -> dict | None:
    """What the `record` of the run in `output_dir` says, its `settings` among it; None for no folder or an empty one.

    Raises:
        ValueError: the folder holds files but no run, or a record that cannot be read.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir: found the file '{output_dir}', expected a folder; choose another output_dir.")
    path = output_dir / record
    if not path.exists():
        if output_dir.exists() and any(not entry.name.startswith(".") for entry in output_dir.iterdir()):
            raise ValueError(
                f"output_dir: found files but no {record} in '{output_dir}', expected this run or an empty folder; "
                "choose another output_dir."
            )
        return None
    try:
        kept = read_json(path)
        readable = isinstance(kept["settings"], dict)
    except (ValueError, KeyError, TypeError):
        readable = False
    if not readable:
        raise ValueError(
            f"{path}: found no settings that can be read, expected those of the run in this folder; choose another "
            "output_dir."
        )
    return kept


def claim_folder(output_dir: str | os.PathLike, settings: dict, *, record: str = "metadata.json") -> bool:
    """Take `output_dir` for the run that `settings` describe, or go on with it if it is that run's already.

    Call it when the first work is about to be written: a command that failed before then can be corrected.

    Args:
        output_dir, settings, record: as those of `holds_run`; the folder is made if it does not exist.

    Returns:
        True if the folder held this run already.

    Raises:
        ValueError: the folder holds a run with other settings, or files but no run.
        OSError: it cannot be written.

    Example:

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "run"
    >>> claim_folder(folder, {"seed": 0}), claim_folder(folder, {"seed": 0})
    (False, True)
    >>> claim_folder(folder, {"seed": 1})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: output_dir: found another run in '...' (seed is 0 there and 1 here), expected this run or an empty ...
    """
    output_dir = Path(output_dir)
    if holds_run(output_dir, settings, record=record):
        return True
    with writing(output_dir, *output_dir.parents):
        output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / record, {"settings": settings})
    return False


def _difference(name: str, there: Any, here: Any) -> str | None:
    """What tells two values of a setting apart, or None."""
    paths = [value["path"] if _has_weights(value) else value for value in (there, here)]
    if _has_weights(there) and _has_weights(here):
        # A model id has no commit until the model has been downloaded.
        if there["weights"] == here["weights"] or there["weights"].startswith(f"{here['weights']}@"):
            return None
        if paths[0] == paths[1]:
            return f"{name} '{paths[0]}' had other weights then: it was changed or trained again"
    elif there == here:
        return None
    return f"{name} is {paths[0]!r} there and {paths[1]!r} here"


def _has_weights(value):
    return isinstance(value, dict) and value.keys() == {"path", "weights"}
