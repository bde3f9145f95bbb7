"""One process's work on the parts of a run: what is missing is made, batch by batch, and a part's shard written."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from bpo_fast.answers.images import read_ahead
from bpo_fast.answers.score import Score, check_scoring, score_answers
from bpo_fast.bootstrap.filters import check
from bpo_fast.bootstrap.job import Job
from bpo_fast.bootstrap.kept import FIELDS, Kept
from bpo_fast.bootstrap.maker import Made, Maker
from bpo_fast.bootstrap.parts import Part
from bpo_fast.bootstrap.progress import Progress
from bpo_fast.bootstrap.rows import Fault, Outcome, part_rows, score_key, texts_of
from bpo_fast.data.annotations import Annotation
from bpo_fast.data.parquet import write_shard
from bpo_fast.runs.files import read_json, write_json
from bpo_fast.runs.folder import held, read_run
from bpo_fast.runs.journal import Journal

# Samples in a batch of a kind that asks no model but a server: many times the requests that are made at a time, since
# fewer of them overlap towards the end of a batch.
WITHOUT_MODEL = 256
# Seconds between two looks at the parts that other processes work on.
POLL = 1.0


class Worker:
    """Makes parts with one model, which is loaded for the first response that is missing.

    Args:
        job: what is made.
        progress: is told of every response.
    """

    def __init__(self, job: Job, progress: Progress):
        self._job, self._progress = job, progress
        self._kept, self._model, self._settings = Kept(job.folder), None, None
        self._was_training, self._results, self._tried = False, {}, set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._model:
            self._model[0].train(self._was_training)

    def make_all(self, parts: Sequence[Part]) -> None:
        """Make every part that no other process makes, and wait for those that others do.

        A part whose process ends before the part is whole is taken over, and goes on after its last batch.
        """
        waiting = list(parts)
        while waiting:
            waiting, before = [part for part in waiting if not self.make(part)], len(waiting)
            if len(waiting) == before:
                time.sleep(POLL)

    def make(self, part: Part) -> bool:
        """Make a part, unless it is done or another process works on it.

        Returns:
            Whether the part is done.
        """
        responses = part.size * len(self._job.makers)
        if self.is_done(part):
            self._progress.known(responses)
            return True
        with held(part.lock, wait=False) as mine:
            if not mine:
                return False
            if self.is_done(part):  # by now
                self._progress.known(responses)
            else:
                self._make(part)
        return True

    def is_done(self, part: Part) -> bool:
        """Whether a part's shard is there as it should be."""
        done = read_done(part)
        return done is not None and done["result"] == self._result(part)

    def _result(self, part):
        if part.number not in self._results:
            self._results[part.number] = self._job.result(part)
        return self._results[part.number]

    def _make(self, part):
        kept = read_run(part.folder)
        if kept is not None and kept.get("layout") != self._job.layout:
            self._begin()  # before a journal is opened that this sets aside
        samples = self._job.samples_of(part)
        with Journal(part.journal, FIELDS) as journal:
            found = {}
            for maker in self._job.makers:
                for sample, made in zip(samples, self._made(samples, maker, journal), strict=True):
                    found[sample.sample_id, maker.kind] = made
            scores = self._scores(samples, found, journal) if self._job.score_pairs else {}
            self._begin()
        outcome = Outcome()
        rows = part_rows(self._job, samples, found, scores, self._settings, outcome)
        shard = write_shard(part.shard, rows)
        write_json(part.done, {"result": self._result(part), **asdict(shard), **vars(outcome)})

    def _made(self, samples: Sequence[Annotation], maker: Maker, journal: Journal) -> list[list[Made] | Fault]:
        """The responses of a kind to each sample, or why there are none; those that are missing are made now."""
        keys = [self._job.key(sample, maker) for sample in samples]
        records = {key: self._record(key, journal) for key in keys}
        missing = {key: sample for key, sample in zip(keys, samples, strict=True) if records[key] is None}
        faults: dict[str, Fault] = {}
        self._progress.known(len(samples) - len(missing))
        self._make_missing(missing, maker, journal, faults)
        records |= {key: journal.records.get(key) for key in missing}
        return [
            faults[key] if records[key] is None else [Made(**each) for each in records[key]["made"]] for key in keys
        ]

    def _make_missing(
        self, missing: Mapping[str, Annotation], maker: Maker, journal: Journal, faults: dict[str, Fault]
    ) -> None:
        # Answers of like length share a batch, the longest first: less waiting for one long answer, and a batch too
        # large for the memory fails at once and not after hours.
        items = sorted(missing.items(), key=lambda item: -len(item[1].answer))
        size = self._job.batch_size if maker.needs_model else max(self._job.batch_size, WITHOUT_MODEL)
        for batch in self._readable(items, size, faults, keep=maker.needs_images):
            keys, samples, images = zip(*batch, strict=True)
            model, processor = self._ready(maker)
            self._begin()
            made = maker.make(model, processor, samples, images)
            records = zip(keys, samples, made, strict=True)
            journal.append(
                [
                    {"key": key, "id": sample.id, "kind": maker.kind, "made": list(map(_plain, each))}
                    for key, sample, each in records
                ]
            )
            self._progress.made(len(batch), self._tokens(made))

    def _scores(
        self, samples: Sequence[Annotation], found: Mapping[tuple[int, str], Any], journal: Journal
    ) -> dict[str, tuple[Score, Score]]:
        """Score key -> log-probs of chosen and rejected, of the pairs whose texts no filter leaves out.

        A pair is scored in a forward of its own, so that its bits depend on nothing else. One that cannot be scored
        has none, as one whose image is gone by now.
        """
        pairs = {
            score_key(sample, made): (sample, made)
            for sample in samples
            for maker in self._job.makers
            for made in found[sample.sample_id, maker.kind]
            if isinstance(made, Made) and made.rejected is not None and not check(sample, made, self._job.filters)
        }
        records = {key: self._record(key, journal) for key in pairs}
        missing = [(key, pair) for key, pair in pairs.items() if records[key] is None]
        items = [(key, sample) for key, (sample, _) in missing]
        for batch in self._readable(items, self._job.batch_size, {}):
            model, processor = self._load()
            self._begin()
            made = []
            for key, sample, image in batch:
                chosen, rejected = texts_of(*pairs[key])
                try:
                    scores = score_answers(model, processor, image, sample.prompt, [chosen, rejected])
                except ValueError:  # a text that the model's own chat cannot show, such as its image token typed out
                    scores = ()
                made.append({"key": key, "id": sample.id, "kind": "score", "made": [list(score) for score in scores]})
            journal.append(made)
        records |= {key: journal.records.get(key) for key, _ in missing}
        made = {key: record["made"] for key, record in records.items() if record}
        return {key: tuple(Score(*score) for score in each) for key, each in made.items() if each}

    def _readable(
        self, items: Sequence[tuple[str, Annotation]], size: int, faults: dict[str, Fault], *, keep: bool = True
    ) -> Iterator[list[tuple[str, Annotation, Image.Image | None]]]:
        """Batches of those whose image can be read; `faults` gets what is wrong with the others'.

        Images that nobody looks at are not kept, and no more are read ahead than fill two batches of the run.
        """
        files, batch = (image_of(self._job, sample) for _, sample in items), []
        for (key, sample), image in zip(items, read_ahead(files, 2 * self._job.batch_size), strict=True):
            if isinstance(image, ValueError):
                faults[key] = Fault(str(image))
                self._progress.known(1)
                continue
            batch.append((key, sample, image if keep else None))
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _record(self, key, journal):
        return journal.records.get(key) or self._kept.get(key)

    def _ready(self, maker):
        """The model and processor for a kind, tried once; None each where it needs none."""
        found = self._load() if maker.needs_model else (None, None)
        if maker.kind not in self._tried:
            maker.check(*found)
            self._tried.add(maker.kind)
        return found

    def _load(self):
        if self._model is None:
            self._model = self._job.given.load()
            self._was_training = self._model[0].training
            self._model[0].eval()
            if self._job.score_pairs:
                check_scoring(*self._model)
        return self._model

    def _begin(self):
        if self._settings is None:
            self._settings = self._job.begin()

    def _tokens(self, made):
        if self._model is None:
            return 0
        texts = [each.rejected for responses in made for each in responses if each.rejected]
        return sum(map(len, self._model[1].tokenizer(texts)["input_ids"])) if texts else 0


def image_of(job: Job, sample: Annotation) -> Path | bytes | ValueError:
    """Where the image of a sample is, or the content of its file, or why there is none."""
    try:
        path = job.samples.image_file(sample)
        return job.samples.image_bytes(sample) if path is None else path
    except ValueError as error:
        return error


def read_done(part: Part) -> dict[str, Any] | None:
    """What a part's record says, whose shard is whole; None if there is none."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        done = read_json(part.done)
        if part.shard.stat().st_size == done["bytes"]:
            return done
    return None


def _plain(made: Made) -> dict[str, Any]:
    return {
        "rejected": made.rejected,
        "truncated": made.truncated,
        "variant": made.variant,
        "chosen": made.chosen,
        "details": dict(made.details),
        "fault": made.fault,
    }
