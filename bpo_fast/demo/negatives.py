"""What the miniature world's negatives are like: hallucination of weakened images, and what injected errors change."""

import json
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from datasets import Dataset
from torch import nn
from transformers import ProcessorMixin

from bpo_fast.answers.generate import GenerationSettings
from bpo_fast.bootstrap.error_injected import ErrorInjected
from bpo_fast.bootstrap.image_weakened import ImageWeakened
from bpo_fast.data.annotations import Annotation
from bpo_fast.demo import world
from bpo_fast.demo.grade import differences, is_fluent
from bpo_fast.evaluate.chair import ObjectMatcher

MAX_NEW_TOKENS = 48  # the longest answer of the world has 25
KINDS = (ImageWeakened.kind, ErrorInjected.kind)
SHARES = ("changed", "one_place", "fluent")
_TEXTS = {"question": "prompt", "chosen": "chosen", "rejected": "rejected"}


def hallucination_by_step(
    model: nn.Module, processor: ProcessorMixin, scenes: Sequence[world.Scene], steps: Sequence[int], *, seed: int
) -> dict[str, list]:
    """How often image-weakened descriptions name an object that is not there, as the noise grows.

    Args:
        model, processor: of the tiny LLaVA.
        scenes: scenes that break the bias.
        steps: noise steps.
        seed: of the noise, which is the same at every step but for its scale.

    Returns:
        `steps`, and for each the share of the scenes: `hallucinated`.
    """
    asked = world.QUESTIONS["describe"]
    samples = [
        Annotation(number, str(number), str(number), asked, world.describe(scene))
        for number, scene in enumerate(scenes)
    ]
    maker = ImageWeakened(steps=steps, seed=seed, decoding=GenerationSettings(MAX_NEW_TOKENS))
    made = maker.make(model, processor, samples, [world.draw(scene) for scene in scenes])
    named = ObjectMatcher(world.synonym_table())
    shares = [
        sum(bool(named(answer.rejected) - world.present(scene)) for answer, scene in zip(answers, scenes, strict=True))
        / len(scenes)
        for answers in zip(*made, strict=True)
    ]
    return {"steps": list(steps), "hallucinated": shares}


def injected_errors(answers: Iterable[tuple[str, str, str]]) -> dict[str, dict[str, float]]:
    """What rewriting has done to answers, by the kind of error that was asked for, and in all of them ("all").

    Args:
        answers: kind of error, the answer as it was and as it became.

    Returns:
        `answers`, and the shares of them that name another object, attribute or count than before (`changed`), that do
        so at one place (`one_place`), and that are by the world's grammar (`fluent`).
    """
    rows: dict[str, list] = {"all": []}
    for error, answer, rewritten in answers:
        places = sum(differences(answer, rewritten).values())
        row = dict(zip(SHARES, (places > 0, places == 1, is_fluent(rewritten)), strict=True))
        for name in ("all", error):
            rows.setdefault(name, []).append(row)
    return {
        name: {"answers": len(each), **{share: fmean(row[share] for row in each) for share in SHARES}}
        for name, each in rows.items()
        if each
    }


def read_texts(pairs: Dataset) -> list[dict[str, str | None]]:
    """The texts of bootstrapped pairs: `id`, `kind`, `error` (the one asked for), `question`, `chosen`, `rejected`."""
    return [
        {
            "id": pair["id"],
            "kind": pair["rejected_type"],
            "error": json.loads(pair["details"]).get("error"),
            **{name: pair[column][-1]["content"][-1]["text"] for name, column in _TEXTS.items()},
        }
        for pair in pairs.remove_columns("images")
    ]


def of_same_samples(pairs: Dataset) -> dict[str, Dataset]:
    """The pairs of each of `KINDS`, of the samples that have both."""
    rows = {kind: {} for kind in KINDS}
    for row, (kind, name) in enumerate(zip(pairs["rejected_type"], pairs["id"], strict=True)):
        rows[kind][name] = row
    shared = [name for name in rows[KINDS[0]] if name in rows[KINDS[1]]]
    return {kind: pairs.select([found[name] for name in shared]) for kind, found in rows.items()}


def first_of_both(texts: Iterable[Mapping], count: int) -> list[dict[str, Mapping]]:
    """The first `count` samples of `read_texts` that have a negative of each of `KINDS`, which are named by it."""
    by_id: dict[str, dict] = {}
    for text in texts:
        by_id.setdefault(text["id"], {})[text["kind"]] = text
    return [negatives for negatives in by_id.values() if set(KINDS) <= set(negatives)][:count]


def mean_of_runs(runs: Sequence[Mapping[str, Mapping]]) -> dict[str, dict]:
    """The figures of several runs as one: `noise` of `hallucination_by_step`, `errors` of `injected_errors`.

    Each image and each answer counts alike.
    """
    noise, errors = [run["noise"] for run in runs], {}
    for name in dict.fromkeys(name for run in runs for name in run["errors"]):
        rows = [run["errors"][name] for run in runs if name in run["errors"]]
        answers = sum(row["answers"] for row in rows)
        shares = {share: sum(row["answers"] * row[share] for row in rows) / answers for share in SHARES}
        errors[name] = {"answers": answers, **shares}
    hallucinated = [fmean(shares) for shares in zip(*(each["hallucinated"] for each in noise), strict=True)]
    return {"noise": {"steps": noise[0]["steps"], "hallucinated": hallucinated}, "errors": errors}
