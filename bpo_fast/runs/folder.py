"""Folders that hold one run each, and one process at a time, or as many as share its work."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bpo_fast.runs.files import read_json, write_json, writing

LOCK_FILE = ".lock"
# Seconds that a process of those that share a folder may hold it alone.
LONGEST_START = 10.0


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
    with _opened(Path(output_dir)) as folder:
        lock = _open_lock(folder / LOCK_FILE, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is None:
            raise _taken(folder)
        with _unlocking(lock, folder / LOCK_FILE):
            _remove_half_written(folder)
            yield folder


@contextmanager
def shared_folder(output_dir: str | os.PathLike, purpose: str) -> Iterator[Path]:
    """Work in `output_dir` beside other processes of the same purpose, of this machine or of others.

    As `locked_folder`, which it keeps out and which keeps it out, but for the others in the folder. Across machines
    the file system must know `flock`, as NFS and Lustre (mounted with `flock`) do. The kernel gives a lock back when
    its process ends, however it ends.

    Args:
        output_dir: the folder.
        purpose: what all of them must have in common, a fingerprint.

    Yields:
        The folder.

    Raises:
        ValueError: as `locked_folder`, or processes of another purpose are at work.

    Example:

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "run"
    >>> with shared_folder(path, "a"), shared_folder(path, "a"), shared_folder(path, "b"):  # doctest: +ELLIPSIS
    ...     pass
    Traceback (most recent call last):
    ValueError: output_dir: found a process at work in '...' on something else, expected none; wait for it or ...
    """
    with _opened(Path(output_dir)) as folder:
        path = folder / LOCK_FILE
        deadline = time.monotonic() + LONGEST_START
        while (lock := _join(folder, purpose.encode())) is None:
            # Another one that starts holds it for a moment, a command that wants the folder for itself does for long.
            if time.monotonic() > deadline:
                raise _taken(folder)
            time.sleep(0.05)
        with _unlocking(lock, path):
            lock.seek(0)
            if lock.read() != purpose.encode():
                raise ValueError(
                    f"output_dir: found a process at work in '{folder}' on something else, expected none; wait for it "
                    "or choose another output_dir."
                )
            yield folder


def _join(folder, purpose):
    """The lock of a folder that is shared; who comes first says what for. None if another has it alone."""
    path = folder / LOCK_FILE
    lock = _open_lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if lock is None:
        return _open_lock(path, fcntl.LOCK_SH | fcntl.LOCK_NB)
    _remove_half_written(folder)
    lock.truncate(0)
    lock.write(purpose)
    lock.flush()
    fcntl.flock(lock, fcntl.LOCK_SH)  # not at once: another may have come between, so that all read it again
    return lock


@contextmanager
def held(path: str | os.PathLike, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file while the block runs, for one piece of work that processes share.

    Args:
        path: of the lock file, which is there only while it is held.
        wait: until others give it back; otherwise the block runs without it.

    Yields:
        Whether it is held.

    Example:

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "part.lock"
    >>> with held(path) as mine, held(path, wait=False) as others:
    ...     print(mine, others)
    True False
    """
    path = Path(path)
    lock = _open_lock(path, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    if lock is None:
        yield False
        return
    with _unlocking(lock, path):
        yield True


@contextmanager
def _opened(folder):
    """The folder, made if there is none; what was made is removed again if it stays empty."""
    with writing(folder, folder / LOCK_FILE, *folder.parents):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"output_dir: found the file '{folder}', expected a folder; choose another output_dir.")
        made = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        for each in made:
            try:
                each.rmdir()
            except OSError:  # there is something in it by now
                break


def _open_lock(path, operation):
    """The lock file, open and locked; None if another holds it and `operation` does not wait."""
    while True:
        with writing(path.parent, path):
            file = path.open("a+b")
        try:
            fcntl.flock(file, operation)
        except BlockingIOError:
            file.close()
            return None
        # Its last holder may have removed it between the two calls above.
        try:
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass
        file.close()


@contextmanager
def _unlocking(lock, path):
    """Give the lock back after the block; who holds it alone removes its file."""
    try:
        yield
    finally:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            pass
        lock.close()


def _remove_half_written(folder):
    for pattern in (".*.tmp", "*/.*.tmp"):
        for left in folder.glob(pattern):
            left.unlink(missing_ok=True)


def _taken(folder):
    return ValueError(
        f"output_dir: found another process at work in '{folder}', expected none; wait for it or choose another "
        "output_dir."
    )


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
