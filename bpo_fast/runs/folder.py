"""Folders that hold one run each."""

import json
import os
from pathlib import Path

from bpo_fast.runs.files import read_json, write_json


def claim_folder(output_dir: str | os.PathLike, settings: dict, *, record: str = "metadata.json") -> bool:
    """Take `output_dir` for the run that `settings` describe, or go on with it if it is that run's already.

    Args:
        output_dir: folder of the run; made if it does not exist.
        settings: what decides the run's result, as JSON values.
        record: name of the file in the folder that keeps the settings.

    Returns:
        True if the folder held this run already.

    Raises:
        ValueError: the folder holds a run with other settings, or files but no run.

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
    settings = json.loads(json.dumps(settings))
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir: found the file '{output_dir}', expected a folder.")
    path = output_dir / record
    if path.exists():
        content = read_json(path)
        found = content.get("settings") if isinstance(content, dict) else None
        if not isinstance(found, dict):
            raise ValueError(f"{path}: found no settings, expected those of the run in this folder; choose another.")
        for name in settings | found:
            there, here = found.get(name), settings.get(name)
            if there != here:
                raise ValueError(
                    f"output_dir: found another run in '{output_dir}' ({name} is {there!r} there and {here!r} here), "
                    "expected this run or an empty folder; choose another output_dir or delete it."
                )
        return True
    if output_dir.exists() and any(not entry.name.startswith(".") for entry in output_dir.iterdir()):
        raise ValueError(
            f"output_dir: found files but no {record} in '{output_dir}', expected this run or an empty folder; choose "
            "another output_dir."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(path, {"settings": settings})
    return False
