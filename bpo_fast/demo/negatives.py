"""What the miniature world's negatives are like: hallucination of weakened images, and what injected errors change."""

from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from transformers import ProcessorMixin

from bpo_fast.answers.generate import GenerationSettings
from bpo_fast.bootstrap.image_weakened import ImageWeakened
from bpo_fast.data.annotations import Annotation
from bpo_fast.demo import world
from bpo_fast.demo.grade import differences, is_fluent
from bpo_fast.evaluate.chair import ObjectMatcher

MAX_NEW_TOKENS = 48  # the longest answer of the world has 25


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
        row = {"changed": places > 0, "one_place": places == 1, "fluent": is_fluent(rewritten)}
        for name in ("all", error):
            rows.setdefault(name, []).append(row)
    return {name: {"answers": len(each), **_shares(each)} for name, each in rows.items() if each}


def _shares(rows: Sequence[Mapping[str, bool]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
