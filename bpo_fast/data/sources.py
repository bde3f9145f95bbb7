"""One source of annotated images: where it lies, how many samples of it are wanted, and in what form."""

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from bpo_fast.data.annotations import Annotation, Skip, read_record
from bpo_fast.data.conversations import TURNS, Columns
from bpo_fast.data.tables import TableRecords
from bpo_fast.runs.json_records import JsonRecords
from bpo_fast.runs.numbers import COUNT, check_numbers
from bpo_fast.runs.text import is_text, shown

_JSON_SUFFIXES = (".json", ".jsonl")


class Records(Protocol):
    """What a source reads: records by their places, which are numbers below `size`."""

    size: int

    def __iter__(self) -> Iterator[tuple[int, Any]]: ...

    def read(self, places: Sequence[int]) -> list[Any]: ...


@dataclass(frozen=True, kw_only=True)
class Source:
    """One entry of a recipe's `sources`.

    Attributes:
        name: of the source, in every sample, pair and count; empty for one that is alone.
        annotations: a JSON or JSON-lines file; a Parquet or Arrow file, a folder of them, a folder of `save_to_disk`
            or a data set of the Hub; or a list of records.
        image_folder: folder that the image paths start from; by default the one the annotations lie in.
        samples: number of samples, drawn uniformly; None takes all.
        turns: what becomes of conversations of several questions, one of `conversations.TURNS`.
        columns: names of `Columns` -> those of the records; by default LLaVA's `id`, `image`, `conversations`.
        split, subset: of a data set that has several.

    Example:

    >>> Source(name="llava", annotations="llava_instruct_150k.json", samples=0)
    Traceback (most recent call last):
    ValueError: source 'llava', samples: found 0, expected a whole number of at least 1.
    """

    name: str
    annotations: str | os.PathLike | Sequence[Any]
    image_folder: str | os.PathLike | None = None
    samples: int | None = None
    turns: str = "first"
    columns: Mapping[str, str] = field(default_factory=dict)
    split: str = "train"
    subset: str | None = None

    def __post_init__(self):
        if not is_text(self.name) or (self.name and not self.name.strip()):
            raise ValueError(f"source, name: found {shown(self.name)}, expected a text.")
        try:
            self._check()
        except ValueError as error:
            raise ValueError(f"source '{self.name}', {error}") from None

    def _check(self):
        for name in ("image_folder", "split", "subset"):
            value = getattr(self, name)
            if not (isinstance(value, str | os.PathLike) and str(value)) and not (value is None and name != "split"):
                raise ValueError(f"{name}: found {shown(value)}, expected a text.")
        if not isinstance(self.annotations, str | os.PathLike | list) or not self.annotations:
            raise ValueError(f"annotations: found {shown(self.annotations)}, expected a path or a data set's name.")
        check_numbers(self, {"samples": COUNT})
        if self.turns not in list(TURNS):
            raise ValueError(f"turns: found {self.turns!r}, expected one of {', '.join(TURNS)}.")
        if not isinstance(self.columns, Mapping):
            raise ValueError(f"columns: found {shown(self.columns)}, expected a map from image, question, answer, ...")
        _check_names(self.columns, {item.name for item in fields(Columns)}, "columns")
        Columns(**self.columns)

    @cached_property
    def keys(self) -> Columns:
        """Where its records keep what."""
        return Columns(**self.columns)

    @property
    def title(self) -> str:
        """What an error calls it."""
        if self.name:
            return f"source '{self.name}'"
        return "annotations" if isinstance(self.annotations, list) else str(self.annotations)

    @cached_property
    def folder(self) -> str | os.PathLike | None:
        """The folder of the images; None where there can be none, since they are embedded."""
        if self.image_folder is None and not isinstance(self.annotations, list) and os.path.exists(self.annotations):
            path = Path(self.annotations)
            return path if path.is_dir() else path.parent
        return self.image_folder

    def open(self) -> Records:
        """What it reads.

        Raises:
            FileNotFoundError, ValueError: there is none, or no image folder.
        """
        if self.image_folder is not None and not os.path.isdir(self.image_folder):
            raise FileNotFoundError(
                f"image_folder: found no folder '{self.image_folder}', expected that of the images."
            )
        if isinstance(self.annotations, list):
            return ListRecords(self.annotations)
        path = Path(self.annotations)
        if path.suffix in _JSON_SUFFIXES or (os.path.isfile(path) and path.suffix not in (".parquet", ".arrow")):
            return JsonRecords(path)
        return TableRecords(self.annotations, self.keys, split=self.split, subset=self.subset)

    def samples_of(self, record: Any, number: int, max_response_words: int | None) -> list[Annotation | Skip]:
        """The samples of one of its records, as `read_record` makes them."""
        return read_record(
            record,
            number,
            self.folder,
            columns=self.keys,
            turns=self.turns,
            max_response_words=max_response_words,
            source=self.name,
        )


class ListRecords:
    """Records that are in memory already."""

    def __init__(self, records: list):
        self.records, self.size = records, len(records)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return enumerate(self.records)

    def read(self, places: Sequence[int]) -> list[Any]:
        """The records at these places."""
        return [self.records[place] for place in places]


def parse_sources(value: Any, where: str = "sources") -> list[Source]:
    """Sources as a recipe writes them: a list of maps of `Source`'s attributes.

    Args:
        value: what the recipe holds.
        where: the place in the recipe, for errors.

    Raises:
        ValueError: it is no such list, or has an unknown name, a value of another type or a name of a source twice.

    Example:

    >>> parse_sources([{"name": "a", "annotations": "a.json", "turn": "split"}])
    Traceback (most recent call last):
    ValueError: sources[0], 'turn': found an unknown name, expected name, annotations, image_folder, samples, turns, \
columns, split, subset; did you mean turns?
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: found {shown(value)}, expected a list of sources, each with name and annotations.")
    sources = []
    for number, entry in enumerate(value):
        place = f"{where}[{number}]"
        if not isinstance(entry, Mapping):
            raise ValueError(f"{place}: found {shown(entry)}, expected a map with name and annotations.")
        _check_names(entry, [item.name for item in fields(Source)], place)
        missing = [name for name in ("name", "annotations") if name not in entry]
        if missing:
            raise ValueError(f"{place}: found no '{missing[0]}', expected one.")
        try:
            sources.append(Source(**entry))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    check_source_names(sources, where)
    return sources


def check_source_names(sources: Sequence[Source], where: str = "sources") -> None:
    """Refuse a name that two sources share: samples are told apart by it."""
    names = [source.name for source in sources]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{where}: found the name '{twice[0]}' twice, expected each source to have its own.")


def _check_names(entry, known, where):
    for name in entry:
        if name not in known:
            near = difflib.get_close_matches(str(name), sorted(known), n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ValueError(f"{where}, {shown(name)}: found an unknown name, expected {', '.join(known)}{hint}")
