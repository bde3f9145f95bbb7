"""What pairs are sorted and filtered by, a column each, and the figures of each kind."""

import re
from array import array
from collections import Counter
from dataclasses import dataclass
from typing import Any

from bpo_fast.report.browse.records import MARKS, UNREADABLE, Record

NAMED = ("kind", "variant", "source")  # columns that hold few values many times: a number each, and their names once


@dataclass(slots=True)
class KindFigures:
    """Sums over the pairs of a kind."""

    pairs: int = 0
    chosen_words: int = 0
    rejected_words: int = 0
    rejected: int = 0  # pairs that have a rejected response
    gap: float = 0.0
    gaps: int = 0  # pairs whose gap is known


class Index:
    """Columns of all pairs, about 60 bytes a pair."""

    def __init__(self):
        self.kinds: dict[str, KindFigures] = {}
        self.marks = Counter()
        self._ids, self._gaps = [], array("d")
        self._words, self._marks = (array("i"), array("i")), array("B")
        self._names = {column: {} for column in NAMED}
        self._codes = {column: array("I") for column in NAMED}

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, record: Record, *, unreadable: bool) -> None:
        """Take the next pair in; `unreadable`: an image of it cannot be shown."""
        marks = (*record.marks, UNREADABLE) if unreadable else record.marks
        self._ids.append(record.id)
        self._gaps.append(float("nan") if record.gap is None else record.gap)
        for column, count in zip(self._words, record.words, strict=True):
            column.append(count)
        self._marks.append(sum(1 << MARKS.index(mark) for mark in marks))
        self.marks.update(marks)
        for column, names in self._names.items():
            self._codes[column].append(names.setdefault(getattr(record, column), len(names)))
        kind = self.kinds.setdefault(record.kind, KindFigures())
        kind.pairs += 1
        kind.chosen_words += record.words[0]
        if record.texts["rejected"] is not None:
            kind.rejected += 1
            kind.rejected_words += record.words[1]
        if record.gap is not None:
            kind.gap += record.gap
            kind.gaps += 1

    def as_json(self) -> dict[str, Any]:
        """Columns and names, as the page reads them: an unknown gap is null, `marks` has a bit for each of `MARKS`."""
        in_order = sorted(range(len(self)), key=lambda number: _natural(self._ids[number]))
        rank = array("I", bytes(4 * len(self)))
        for place, number in enumerate(in_order):
            rank[number] = place
        return {
            "names": {column: list(names) for column, names in self._names.items()} | {"mark": MARKS},
            "id": self._ids,
            "rank": rank.tolist(),
            **{column: codes.tolist() for column, codes in self._codes.items()},
            "marks": self._marks.tolist(),
            "chosenWords": self._words[0].tolist(),
            "rejectedWords": self._words[1].tolist(),
            "gap": [None if gap != gap else round(gap, 4) for gap in self._gaps],
        }


def _natural(text):
    """A sort key that has 9 before 10.

    >>> sorted(["a10", "a9", "b", "10", "9"], key=_natural)
    ['9', '10', 'a9', 'a10', 'b']
    """
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]
