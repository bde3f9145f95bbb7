"""A preference pair as the page shows it, from a row in TRL's columns."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bpo_fast.runs.files import json_text

# What can be said of a pair beside its kind; the page filters by it.
UNREADABLE, CUT, ALONE, SAME = MARKS = ("image unreadable", "rejected cut off", "chosen alone", "same texts")
# Name of a column, by what it holds: ours, then TRL's of pairs whose reference log-probs were kept.
_LOGPS = (("chosen_logp", "rejected_logp"), ("ref_chosen_logps", "ref_rejected_logps"))
_SHOWN = {"images", "prompt", "chosen", "rejected", "rejected_type", "variant", "source", "id", "rejected_truncated"}
_LONGEST_FIELD = 1000  # characters


@dataclass(frozen=True, slots=True)
class Record:
    """One pair.

    Attributes:
        id, kind, variant, source: as the row has them, empty where it has none.
        words: of the chosen and of the rejected response.
        gap: log-prob of the chosen response less that of the rejected one; None where one is not known.
        marks: of `MARKS`.
        images: as the row has them.
        texts: what the page shows of the pair alone: `turns` (role and text of each), `chosen`, `rejected` (None where
            there is none), `logps` (of both), `fields` (all other columns, as texts).
    """

    id: str
    kind: str
    variant: str
    source: str
    words: tuple[int, int]
    gap: float | None
    marks: tuple[str, ...]
    images: Sequence[Any]
    texts: dict[str, Any]


def to_record(row: Mapping[str, Any], number: int) -> Record:
    """The record of a row.

    Args:
        row: TRL's columns `images`, `prompt`, `chosen` and `rejected`, as texts or messages, and any others.
        number: of the row, the id of one that has none.

    Example:

    >>> row = {"images": [], "prompt": "What?", "chosen": "A red cat.", "rejected": "A cat.", "details": '{"step": 5}'}
    >>> record = to_record(row, 7)
    >>> record.id, record.words, record.gap, record.texts["turns"], record.texts["fields"]
    ('7', (3, 2), None, [['user', 'What?']], {'step': '5'})
    """
    images = list(row.get("images") or ())
    chosen, rejected = (_response(row.get(name)) for name in ("chosen", "rejected"))
    logps, names = [None, None], _LOGPS[0]
    for names in _LOGPS:
        if any(row.get(name) is not None for name in names):
            logps = [_finite(row.get(name)) for name in names]
            break
    marks = []
    if row.get("rejected_truncated"):
        marks.append(CUT)
    if rejected is None:
        marks.append(ALONE)
    elif rejected == chosen:
        marks.append(SAME)
    return Record(
        id=str(number) if row.get("id") is None else str(row["id"]),
        kind=_label(row.get("rejected_type")),
        variant=_label(row.get("variant")),
        source=_label(row.get("source")),
        words=(len((chosen or "").split()), len((rejected or "").split())),
        gap=None if None in logps else logps[0] - logps[1],
        marks=tuple(marks),
        images=images,
        texts={
            "turns": _turns(row.get("prompt"), len(images)),
            "chosen": chosen or "",
            "rejected": rejected,
            "logps": logps,
            "fields": _fields({name: value for name, value in row.items() if name not in _SHOWN | set(names)}),
        },
    )


def _label(value):
    return "" if value is None else str(value)


def _finite(value):
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _turns(messages, num_images):
    if isinstance(messages, str):
        return [["user", messages]]
    return [[_label(each.get("role")), _content(each.get("content"), num_images)] for each in messages or ()]


def _response(messages):
    """The text of a response; None where there is none."""
    if messages is None or isinstance(messages, str):
        return messages
    texts = [text for _, text in _turns(messages, 0)]
    return "\n\n".join(texts) if texts else None


def _content(content, num_images):
    """A message's text. One image stands beside the pair anyway; of several, the text says where they are."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = [
        ("[image] " if num_images > 1 else "") if part.get("type") == "image" else part.get("text") or ""
        for part in content
    ]
    return "".join(parts)


def _fields(columns):
    """The columns of provenance as texts, those of `details` among them by their own names."""
    fields = {}
    for name, value in columns.items():
        if name == "details" and isinstance(value, str):
            try:
                inside = json.loads(value)
            except ValueError:
                inside = None
            if isinstance(inside, dict):
                fields |= {key: _field(each) for key, each in inside.items() if each is not None}
                continue
        if value is not None and value != "":
            fields[name] = _field(value)
    return fields


def _field(value):
    text = value if isinstance(value, str) else json_text(value, default=lambda other: f"<{type(other).__name__}>")
    return text if len(text) <= _LONGEST_FIELD else f"{text[: _LONGEST_FIELD - 3]}..."
