"""Responses to rows of a shard, and what is left out of it with its reason."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bpo_fast.answers.score import Score
from bpo_fast.bootstrap.filters import check
from bpo_fast.bootstrap.job import Job
from bpo_fast.bootstrap.maker import Made, Maker
from bpo_fast.data.annotations import Annotation
from bpo_fast.runs.files import json_text
from bpo_fast.runs.fingerprint import fingerprint

_DECODING = ("max_new_tokens", "do_sample", "temperature", "top_p")


class Fault(str):
    """Why a sample has no responses: its image cannot be read."""

    __slots__ = ()


@dataclass
class Outcome:
    """What has become of a part's responses.

    Attributes:
        kinds, sources: pairs of each.
        rejected_truncated: pairs whose rejected response was cut at max_new_tokens.
        embedded: pairs whose image is in the shard.
        unscored: pairs whose log-probs were asked for and could not be had.
        skipped: a record for each response that makes no pair.
    """

    kinds: Counter = field(default_factory=Counter)
    sources: Counter = field(default_factory=Counter)
    rejected_truncated: int = 0
    embedded: int = 0
    unscored: int = 0
    skipped: list[dict] = field(default_factory=list)


def part_rows(
    job: Job,
    samples: Sequence[Annotation],
    found: Mapping[tuple[int, str], list[Made] | Fault],
    scores: Mapping[str, tuple[Score, Score]],
    settings: Mapping[str, Any],
    outcome: Outcome,
) -> Iterator[dict[str, Any]]:
    """The rows of a part's shard, in the order of samples, kinds, responses.

    Args:
        job: of the run.
        samples: of the part.
        found: (sample's id, kind) -> its responses, or why there are none.
        scores: `score_key` of a pair -> log-probs of chosen and rejected, where they were asked for.
        settings: those that the folder keeps.
        outcome: is told of each response.
    """
    provenance = {maker.kind: _provenance(job, maker, settings) for maker in job.makers}
    for sample in samples:
        for maker in job.makers:
            responses = found[sample.sample_id, maker.kind]
            if isinstance(responses, Fault):
                outcome.skipped.append(_skip(sample, maker.kind, "", responses, "an image that cannot be read"))
                continue
            if not responses:
                outcome.skipped.append(_skip(sample, maker.kind, "", "no response of this kind"))
            for made in responses:
                reason, pair = check(sample, made, job.filters), scores.get(score_key(sample, made))
                if pair is not None and not reason:
                    reason = check(sample, made, job.filters, scores=pair)
                if reason:
                    outcome.skipped.append(_skip(sample, maker.kind, made.variant, reason))
                    continue
                outcome.kinds[maker.kind] += 1
                outcome.sources[sample.source] += 1
                outcome.rejected_truncated += made.truncated
                outcome.embedded += _embeds(job, sample)
                outcome.unscored += job.score_pairs and made.rejected is not None and pair is None
                logps = {} if pair is None else {"chosen_logp": pair[0].logp, "rejected_logp": pair[1].logp}
                yield _row(sample, made, job) | logps | {"rejected_type": maker.kind, **provenance[maker.kind]}


def texts_of(sample: Annotation, made: Made) -> tuple[str, str | None]:
    """Chosen and rejected response of a pair."""
    return (sample.answer if made.chosen is None else made.chosen), made.rejected


def score_key(sample: Annotation, made: Made) -> str:
    """What the log-probs of a pair are known by: its prompt, its image by name, its responses."""
    return fingerprint(["score", sample.sample_id, *texts_of(sample, made)])


def _row(sample: Annotation, made: Made, job: Job) -> dict[str, Any]:
    details, (chosen, rejected) = dict(made.details), texts_of(sample, made)
    return {
        "images": [_image(job, sample)],
        "prompt": sample.prompt,
        "chosen": _answer(chosen),
        "rejected": None if rejected is None else _answer(rejected),
        "variant": made.variant,
        "rejected_truncated": made.truncated,
        "source": sample.source,
        "id": sample.id,
        "image_name": sample.image,
        "step": details.get("step"),
        "details": json_text(details, sort_keys=True),
    }


def _embeds(job, sample):
    return job.embed_images or job.samples.image_file(sample) is None


def _image(job, sample):
    """The image as its column has it: by absolute path, or as the content of its file."""
    if _embeds(job, sample):
        return {"bytes": job.samples.image_bytes(sample), "path": os.path.basename(sample.image)}
    return {"bytes": None, "path": os.path.abspath(job.samples.image_file(sample))}


def _answer(text):
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def _provenance(job: Job, maker: Maker, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the pairs of a kind have in common."""
    own = job.kind_settings[maker.kind]
    model = own.get("server_model")
    if maker.needs_model:
        parts = [settings[name]["weights"] for name in ("model", "adapter") if settings[name] is not None]
        model = " with adapter ".join(parts)
    decoding = own.get("decoding") or {name: own[name] for name in _DECODING if name in own}
    return {
        "seed": own.get("seed"),
        "schedule": own.get("schedule"),
        "template_version": own.get("template_version"),
        "model": model,
        "decoding": json_text(decoding) if decoding else None,
    }


def _skip(sample, kind, variant, reason, cause=None):
    return {
        "source": sample.source,
        "record": sample.record,
        "id": sample.id,
        "kind": kind,
        "variant": variant,
        "reason": reason,
        "cause": cause or reason.partition(":")[0],
    }
