"""Journals of another layout: what was made when the samples were cut into other parts.

Annotations that are added, mended or taken out move the samples between parts. The journals of before are set aside
then, and every part finds in them what it needs. They are read and never written.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bpo_fast.bootstrap.parts import PARTS_FOLDER
from bpo_fast.runs.journal import Journal

# Of each record of a journal: the kind, and its responses as `Made` has them.
FIELDS = {"id": str, "kind": str, "made": list}


def set_aside(folder: Path) -> None:
    """Make the journals of a run's folder those of another layout; no process may work on a part meanwhile."""
    parts = folder / PARTS_FOLDER
    number = sum(1 for _ in parts.glob("kept-*.jsonl"))
    for journal in sorted(parts.glob("[0-9]*.jsonl")):
        journal.rename(parts / f"kept-{number:05}.jsonl")
        number += 1


class Kept:
    """The records of journals that were set aside, by key; in memory are their places alone.

    Args:
        folder: of the run. Its files are read at the first question.
    """

    def __init__(self, folder: Path):
        self._folder, self._places = folder / PARTS_FOLDER, None

    def get(self, key: str) -> Mapping[str, Any] | None:
        """The record of that key, or None."""
        if self._places is None:
            self._places = {}
            for path in sorted(self._folder.glob("kept-*.jsonl")):
                self._places |= {found: (path, place) for found, place in Journal(path, FIELDS).places.items()}
        if key not in self._places:
            return None
        path, place = self._places[key]
        with path.open("rb") as file:
            file.seek(place)
            return json.loads(file.readline())
