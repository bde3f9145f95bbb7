"""A mixture of annotated data sets: so many samples of each, drawn uniformly, in memory that does not grow with them.

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
_KEPT = {"place": "q", "record": "q", "turn": "i", "length": "i", "sample_id": "q", "draw": "q"}


@dataclass(frozen=True)
class Selection:
    """What `read_sources` has found.

    Attributes:
        samples: those drawn, in the order of sources and records.
        skipped: what cannot be used.
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
    check_source_names(sources)
    skipped, drawn, counts = Skips(), [], {}
    for source in sources:
        found, number = _read(source, seed, max_response_words, skipped)
        order = np.argsort(found["draw"], kind="stable")[: source.samples]
        counts[source.name] = {"records": number, "usable": len(found["draw"]), "asked": source.samples}
        drawn.append({name: values[order] for name, values in found.items()})
    kept = {name: np.concatenate([found[name] for found in drawn]) for name in _KEPT}
    kept["source"] = np.repeat(np.arange(len(sources), dtype=np.int16), [len(found["draw"]) for found in drawn])
    # The share of its source that a sample and those drawn before it make up: the lowest are a mixture of the same
    # shares.
    shares = np.concatenate([(np.arange(len(found["draw"])) + 0.5) / len(found["draw"]) for found in drawn])
    lowest = np.lexsort((kept["source"], shares))[:max_samples]
    chosen = lowest[np.lexsort((kept["turn"][lowest], kept["record"][lowest], kept["source"][lowest]))]
    samples = Samples(sources, max_response_words, {name: values[chosen] for name, values in kept.items()})
    for number, source in enumerate(sources):
        counts[source.name]["selected"] = int((samples.kept["source"] == number).sum())
    return Selection(samples, skipped, counts)


class Samples(Sequence):
    """Samples whose records are read when they are asked for.

    Attributes:
        sources: by name.
        sample_ids: [N] int64, `Annotation.sample_id` of each.
        lengths: [N] int32, the characters of each answer.
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
        path = self.image_file(sample)
        return self._records(sample.source).image_bytes(sample.record) if path is None else path.read_bytes()

    def image_file(self, sample: Annotation) -> Path | None:
        """Path of a sample's image; None where it is embedded in a table."""
        records, folder = self._records(sample.source), self.sources[sample.source].folder
        if isinstance(records, TableRecords) and records.is_embedded(sample.record):
            return None
        return image_path(folder, sample.image)

    def read_image(self, sample: Annotation) -> Image.Image:
        """The image of a sample, as `data.images.read_image` decodes it.

        Raises:
            ValueError: it cannot be decoded.
        """
        path = self.image_file(sample)
        return read_image(self.image_bytes(sample), sample.image) if path is None else read_image(path)

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


def _read(source, seed, max_response_words, skipped):
    """The numbers of a source's usable samples, repeats left out, and how many records it has."""
    records, kept = source.open(), {name: array(code) for name, code in _KEPT.items()}
    number, first = 0, None
    with tqdm(total=records.size, desc=f"reading {source.name}", unit_scale=True, disable=None) as bar:
        for number, (place, record) in enumerate(records, start=1):
            for turn, found in enumerate(source.samples_of(record, number - 1, max_response_words)):
                if isinstance(found, Skip):
                    first = first or found
                    skipped.add(found)
                    continue
                values = (place, number - 1, turn, len(found.answer), found.sample_id, draw(seed, found))
                for column, value in zip(kept.values(), values, strict=True):
                    column.append(value)
            bar.update(place - bar.n)
        bar.update(records.size - bar.n)
    if not kept["place"]:
        raise ValueError(f"source '{source.name}': {no_usable_record(number, first)}")
    arrays = {name: np.frombuffer(values, dtype=values.typecode) for name, values in kept.items()}
    _, firsts = np.unique(arrays["sample_id"], return_index=True)
    firsts.sort()
    repeats = np.setdiff1d(np.arange(len(arrays["place"])), firsts, assume_unique=True)
    repeated = Samples(
        [source],
        max_response_words,
        {"source": np.zeros(len(repeats), np.int16)} | {name: values[repeats] for name, values in arrays.items()},
    )
    for sample in repeated:
        reason = "a repeat of an earlier record: the same id, image and question"
        skipped.add(Skip(sample.record, sample.id, reason, reason, source.name))
    return {name: values[firsts] for name, values in arrays.items()}, number
