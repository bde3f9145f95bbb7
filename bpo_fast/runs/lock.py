"""One process a folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_FILE = ".lock"


@contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Hold `folder` for this process alone while the block runs.

    It is made if need be, and removed again if the block leaves nothing in it.

    Raises:
        ValueError: another process holds it, or it is a file.
        OSError: it cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir: found the file '{folder}', expected a folder.")
    path = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _opened(path)
    except BlockingIOError:
        raise ValueError(
            f"output_dir: found another process at work in '{folder}', expected none; wait for it or choose another "
            "output_dir."
        ) from None
    except OSError as error:
        raise OSError(
            f"output_dir: found that nothing can be written to '{folder}' ({error.strerror}), expected a folder of "
            "one's own; choose another output_dir."
        ) from None
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()


def _opened(path):
    """The lock file, locked; one that its holder removed in between is no lock."""
    while True:
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        except BaseException:
            file.close()
            raise
        file.close()
