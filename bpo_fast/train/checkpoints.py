"""Which checkpoint a stopped run goes on from: the newest one that is whole."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from bpo_fast.runs.files import write_json

SEAL_FILE = "checksums.json"


def seal_checkpoint(folder: str | Path) -> None:
    """Write the checksums of all files of a checkpoint, as its last file: it is whole from then on."""
    folder = Path(folder)
    write_json(folder / SEAL_FILE, {path.name: _checksum(path) for path in sorted(folder.iterdir()) if path.is_file()})


def check_checkpoint(folder: str | Path) -> None:
    """Refuse a checkpoint that was not written to its end, or that has changed since.

    Raises:
        ValueError: the sentence names the file.
    """
    folder = Path(folder)
    try:
        checksums = json.loads((folder / SEAL_FILE).read_text(encoding="utf-8"))
        step = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        files = dict(checksums)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(
            f"{folder}: found a checkpoint that was not written to its end, expected a whole one."
        ) from None
    for name, checksum in files.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: found no {name}, expected the whole checkpoint of step {step}.")
        if _checksum(folder / name) != checksum:
            raise ValueError(f"{folder / name}: found other bytes than were saved, expected those of step {step}.")


def last_complete_checkpoint(output_dir: str | Path, *, report: Callable[[str], object] | None = None) -> str | None:
    """The newest checkpoint that is whole, or None.

    A run killed while it saves leaves a checkpoint without its checksums; it is passed over and written anew when
    training comes by again. One that is damaged is passed over too, and reported.

    Args:
        output_dir: of the run; it need not exist.
        report: called with a sentence for each damaged checkpoint that is passed over.
    """
    folders = [folder for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _step(folder) is not None]
    for folder in sorted(folders, key=_step, reverse=True):
        try:
            check_checkpoint(folder)
        except ValueError as error:
            if report is not None and (folder / SEAL_FILE).exists():
                report(str(error))
            continue
        return str(folder)
    return None


def not_written(error: Exception) -> str:
    """Why a checkpoint or an adapter could not be written, in the system's words where there are any."""
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    return getattr(cause, "strerror", None) or str(error).partition("\n")[0]


def _step(folder):
    number = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdecimal() and folder.is_dir() else None


def _checksum(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
