"""A mixture of annotated data sets: so many samples of each, drawn uniformly, in 36 bytes of memory a sample.

Every record is read once and judged; of a sample that can be used a few numbers are kept, and its record is read again
when it is asked for. A source's draw is of the samples with the lowest `draw(seed, sample)`: it depends on seed and
content alone, whatever the order of the file or the other sources, and a larger number is the smaller one's and more.

Two samples of one id are two samples if image or questions differ (data sets name records after their images); a
repeat of id, image and questions is left out and counted, whatever its answer.
"""

import json
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from bpo_fast.data.annotations import Annotation, Skip, draw, no_usable_record
from bpo_fast.data.images import image_path, read_image
from bpo_fast.data.sources import Records, Source, check_source_names
from bpo_fast.data.tables import TableRecords
from bpo_fast.runs.files import json_text

# What is kept of a sample, and how: where its record is, which of its samples it is, what it is known and drawn by.
_KEPT = {"place": "q", "record": "I", "turn": "I", "length": "I", "sample_id": "q", "draw": "q"}
_REPEAT = "a repeat of an earlier record: the same id, image and question"


@dataclass(frozen=True)
class Selection:
    """What `read_sources` has found.

    Attributes:
        samples: those drawn, in the order of sources and records.
        skipped: what cannot be used.
        counts: source -> records, usable, asked and selected, as `report` has them.
    """

    samples: "Samples"
    skipped: "Skips"
    counts: dict[str, dict[str, Any]]

    def report(self) -> dict[str, Any]:
        """What was read, dropped and why, as JSON: for each source its `records`, `usable` samples, those `asked` for
        (None: all) and `selected`, and `skipped` by cause; and how many samples are selected in all."""
        sources = {
            name: {
                **counts,
                "skipped": {cause: n for (source, cause), n in self.skipped.counts.items() if source == name},
            }
            for name, counts in self.counts.items()
        }
        return {"selected": len(self.samples), "sources": sources}


def read_sources(
    sources: Sequence[Source], *, seed: int = 0, max_samples: int | None = None, max_response_words: int | None = 350
) -> Selection:
    """Read annotated data sets and draw samples of each.

    Args:
        sources: of different names; each with the number of samples that is wanted.
        seed: of the draw.
        max_samples: number of samples of the whole mixture, in which the sources keep their shares; None keeps all.
        max_response_words: longer answers are left out; None keeps all.

    Returns:
        The samples and what was left out. A source that has fewer samples than are asked for gives all it has.

    Raises:
        FileNotFoundError: annotations or images are not there.
        ValueError: annotations that cannot be read, or a source of which no record can be used.

    Example:

    >>> from PIL import Image
    >>> folder = Path(tempfile.mkdtemp())
    >>> Image.new("RGB", (4, 4)).save(folder / "1.png")
    >>> turns = [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A black square."}]
    >>> records = [{"id": str(number), "image": "1.png", "conversations": turns} for number in range(10)] + [{}]
    >>> selection = read_sources([Source(name="squares", annotations=records, image_folder=folder, samples=3)])
    >>> len(selection.samples), selection.samples.batch(0, 1)[0].question
    (3, 'What is this?')
    >>> selection.report()["sources"]["squares"]
    {'records': 11, 'usable': 10, 'asked': 3, 'selected': 3, 'skipped': {"no 'conversations'": 1}}
    """
    if max_response_words is not None and max_response_words < 1:
        raise ValueError(f"max_response_words: found {max_response_words}, expected at least 1 or None.")
    if not sources:
        raise ValueError("sources: found none, expected at least one.")
    check_source_names(sources)
    skipped, drawn, counts = Skips(), [], {}
    for source in sources:
        columns, counts[source.name] = _drawn(source, seed, max_response_words, skipped)
        drawn.append(columns)
    sizes = _shares([len(columns["place"]) for columns in drawn], max_samples)
    for source, size in zip(sources, sizes, strict=True):
        counts[source.name]["selected"] = size
    orders = [
        np.lexsort((columns["turn"][:size], columns["record"][:size]))
        for columns, size in zip(drawn, sizes, strict=True)
    ]
    # Column by column, so that no more than one is held twice.
    kept = {
        name: np.concatenate([columns.pop(name)[order] for columns, order in zip(drawn, orders, strict=True)])
        for name in list(drawn[0])
    }
    kept["source"] = np.repeat(np.arange(len(sources), dtype=np.int32), sizes)
    return Selection(Samples(sources, max_response_words, kept), skipped, counts)


def _shares(sizes: Sequence[int], total: int | None) -> list[int]:
    """How many of each source's samples make a mixture of `total` in which the sources keep their shares.

    Of the samples of all sources, each at the share of its source that it and those before it make up, the lowest are
    taken: a larger total is the smaller one's and more.

    >>> _shares([60, 30], 3), _shares([60, 30], 4), _shares([60, 30], None)
    ([2, 1], [3, 1], [60, 30])
    """
    if total is None or total >= sum(sizes):
        return list(sizes)
    shares = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    lowest = np.argsort(shares, kind="stable")[:total]
    return np.histogram(lowest, bins=[0, *np.cumsum(sizes)])[0].tolist()


class Samples(Sequence):
    """Samples whose records are read when they are asked for.

    Attributes:
        sources: by name.
        sample_ids: [N] int64, `Annotation.sample_id` of each.
        lengths: [N] uint32, the characters of each answer.
    """

    def __init__(self, sources: Sequence[Source], max_response_words: int | None, kept: dict[str, np.ndarray]):
        self.sources = {source.name: source for source in sources}
        self.max_response_words, self.kept = max_response_words, kept
        self.sample_ids, self.lengths = kept["sample_id"], kept["length"]
        self._opened: dict[str, Records] = {}

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: int | slice) -> Annotation | list[Annotation]:
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        return self.take([range(len(self))[index]])[0]

    def __iter__(self) -> Iterator[Annotation]:
        for start in range(0, len(self), 256):
            yield from self.batch(start, start + 256)

    def __getstate__(self):
        return self.__dict__ | {"_opened": {}}

    def batch(self, start: int, stop: int) -> list[Annotation]:
        """The samples from `start` up to `stop`."""
        return self.take(range(start, min(stop, len(self))))

    def take(self, indices: Sequence[int]) -> list[Annotation]:
        """The samples of these numbers, in their order.

        Raises:
            ValueError: a source has changed since it was read.
        """
        found: dict[int, Annotation] = {}
        names = list(self.sources)
        for number in {int(self.kept["source"][index]) for index in indices}:
            mine = [index for index in indices if self.kept["source"][index] == number]
            records = self._records(names[number]).read([int(self.kept["place"][index]) for index in mine])
            for index, record in zip(mine, records, strict=True):
                found[index] = self._sample(names[number], record, index)
        return [found[index] for index in indices]

    def image_bytes(self, sample: Annotation) -> bytes:
        """The image file of a sample, wherever it lies."""
        found = self._image(sample)
        return found if isinstance(found, bytes) else found.read_bytes()

    def image_file(self, sample: Annotation) -> Path | None:
        """Path of a sample's image; None where it is embedded in a table."""
        found = self._image(sample)
        return None if isinstance(found, bytes) else found

    def read_image(self, sample: Annotation) -> Image.Image:
        """The image of a sample, as `data.images.read_image` decodes it.

        Raises:
            ValueError: it cannot be decoded.
        """
        return read_image(self._image(sample), sample.image)

    def _image(self, sample):
        """The bytes of an embedded image, the path of any other."""
        records = self._records(sample.source)
        embedded = records.image_bytes(sample.record) if isinstance(records, TableRecords) else None
        return image_path(self.sources[sample.source].folder, sample.image) if embedded is None else embedded

    def _records(self, name):
        if name not in self._opened:
            self._opened[name] = self.sources[name].open()
        return self._opened[name]

    def _sample(self, name, record, index):
        source, turn = self.sources[name], int(self.kept["turn"][index])
        found = source.samples_of(record, int(self.kept["record"][index]), self.max_response_words)
        sample = found[turn] if turn < len(found) else None
        if not isinstance(sample, Annotation) or sample.sample_id != self.sample_ids[index]:
            raise ValueError(
                f"{source.annotations}: found another record {self.kept['record'][index]} than when it was read, "
                "expected annotations that stay as they are during a run; give the same command again."
            )
        return sample


class Skips:
    """What was left out, counted in memory and listed in a temporary file.

    Attributes:
        counts: (source, cause) -> number.
    """

    def __init__(self):
        self.counts: Counter[tuple[str, str]] = Counter()
        self._file = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - lives as long as the object

    def add(self, skip: Skip) -> None:
        self.counts[skip.source, skip.cause] += 1
        self._file.write(json_text(asdict(skip)) + "\n")

    def __len__(self) -> int:
        return self.counts.total()

    def __iter__(self) -> Iterator[Skip]:
        """Source by source: by record, the repeats last."""
        self._file.seek(0)
        try:
            for line in self._file:
                yield Skip(**json.loads(line))
        finally:
            self._file.seek(0, 2)


def _drawn(source, seed, max_response_words, skipped):
    """The numbers of a source's samples in the order of their draw, as many as it wants, and its counts."""
    arrays, records, first = _read(source, seed, max_response_words, skipped)
    if not len(arrays["place"]):
        raise ValueError(f"{source.title}: {no_usable_record(records, first)}")
    order = np.argsort(arrays.pop("draw"), kind="stable")
    # Repeats share an id, and so their draw; the order of the file is kept among them.
    ids = arrays["sample_id"][order]
    repeats = np.concatenate([[False], ids[1:] == ids[:-1]])
    del ids
    if repeats.any():
        again = np.sort(order[repeats])
        kept = {name: values[again] for name, values in arrays.items()} | {"source": np.zeros(len(again), np.int32)}
        for sample in Samples([source], max_response_words, kept):
            skipped.add(Skip(sample.record, sample.id, _REPEAT, _REPEAT, source.name))
        order = order[~repeats]
    counts = {"records": records, "usable": len(order), "asked": source.samples}
    order = order[: source.samples]
    return {name: arrays.pop(name)[order] for name in list(arrays)}, counts


def _read(source, seed, max_response_words, skipped):
    """The numbers of all samples that can be used, how many records there are, and the first that was left out."""
    opened, kept = source.open(), {name: array(code) for name, code in _KEPT.items()}
    number, first = 0, None
    with tqdm(total=opened.size, desc=f"reading {source.name}".strip(), unit_scale=True, disable=None) as bar:
        for number, (place, record) in enumerate(opened, start=1):
            for turn, found in enumerate(source.samples_of(record, number - 1, max_response_words)):
                if isinstance(found, Skip):
                    first = first or found
                    skipped.add(found)
                    continue
                values = (place, number - 1, turn, len(found.answer), found.sample_id, draw(seed, found))
                for column, value in zip(kept.values(), values, strict=True):
                    column.append(value)
            bar.update(place - bar.n)
        bar.update(opened.size - bar.n)
    return {name: np.frombuffer(values, dtype=values.typecode) for name, values in kept.items()}, number, first
