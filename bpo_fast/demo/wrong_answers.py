"""The miniature world's wrong answers: what a true answer becomes when one thing of its scene is another.

The tiny model learns this as a task of its own, without images: asked for a kind of error, it repeats an answer with
that one thing changed. A wrong answer is the true one about a changed scene, so it is fluent by construction. Where an
answer does not say what a kind of error changes ("There are two." names no object), it changes what there is.
"""

import random
from dataclasses import replace
from pathlib import Path

from bpo_fast.demo.world import (
    ANNOTATION_MIX,
    COLORS,
    GROUNDS,
    NUMBERS,
    SHAPES,
    Object,
    Scene,
    question_answer,
    sample_scene,
)

ERRORS = ("object", "attribute", "count", "relation")
TEMPLATE = Path(__file__).with_name("templates") / "error_injection.json"  # as `bootstrap.rewriting` reads it
REWRITTEN_BIAS = 0.5  # of the scenes whose answers are rewritten: what is kept is kept, be it typical or not


def _left_shape(scene, rng):
    return replace(scene, left=_reshaped(scene.left, rng))


def _left_color(scene, rng):
    return replace(scene, left=_recolored(scene.left, rng))


def _right_shape(scene, rng):
    return replace(scene, right=_reshaped(scene.right, rng))


def _right_color(scene, rng):
    return replace(scene, right=_recolored(scene.right, rng))


def _count(scene, rng):
    return replace(scene, count=_other(range(1, len(NUMBERS) + 1), scene.count, rng))


def _ground(scene, rng):
    return replace(scene, ground=_other(GROUNDS, scene.ground, rng))


def _swapped(scene, rng):
    return replace(scene, left=scene.right, right=scene.left)


# Kind of question -> what each of `ERRORS` changes. One place each, so that the model has to draw the new value alone
# and even its likeliest answer is a changed one.
_CHANGES = {
    "describe": (_right_shape, _left_color, _count, _swapped),
    "left": (_left_shape, _left_color, _left_shape, _left_shape),
    "right": (_right_shape, _right_color, _count, _right_shape),
    "count": (_count,) * 4,
    "ground": (_ground,) * 4,
}


def wrong_answer(scene: Scene, kind: str, error: str, rng: random.Random) -> str:
    """The answer to a question of `kind` with one error, which is one of `ERRORS`.

    >>> scene = Scene(Object("red", "circle"), Object("blue", "square"), 2, "sand", layout_seed=0)
    >>> wrong_answer(scene, "right", "count", random.Random(0))
    'There are three blue squares.'
    >>> wrong_answer(scene, "describe", "relation", random.Random(0))
    'On the left there is a blue square. On the right there are two red circles. The ground is sand.'
    """
    change = _CHANGES[kind][ERRORS.index(error)]
    return question_answer(change(scene, rng), kind, rng)[1]


def sample_rewriting(rng: random.Random) -> tuple[str, str, str, str]:
    """A kind of error, an annotated question and its answer, and the answer with such an error."""
    scene = sample_scene(rng, REWRITTEN_BIAS)
    kind = rng.choices(list(ANNOTATION_MIX), list(ANNOTATION_MIX.values()))[0]
    error = rng.choice(ERRORS)
    return (error, *question_answer(scene, kind, rng), wrong_answer(scene, kind, error, rng))


def _reshaped(item, rng):
    return Object(item.color, _other(SHAPES, item.shape, rng))


def _recolored(item, rng):
    return Object(_other(COLORS, item.color, rng), item.shape)


def _other(values, value, rng):
    return rng.choice([item for item in values if item != value])
