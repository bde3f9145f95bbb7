"""What a description of a scene gets right: all of it, each attribute, and whether its sentences are whole.

Hallucination rates look at the objects alone: an answer that breaks a sentence off or forgets the ground is as good
there as a whole one. These figures count that too. And what two answers to one question say otherwise than each other.
"""

import re
from collections.abc import Sequence
from itertools import zip_longest

from bpo_fast.demo.world import COLORS, GROUNDS, NUMBERS, SHAPES, Scene, describe

# name -> what share of the answers it counts.
GRADES = {
    "exact": "Descriptions that are exactly right",
    "well_formed": "Descriptions in whole sentences",
    "left_color": "Color on the left right",
    "left_shape": "Shape on the left right",
    "right_color": "Color on the right right",
    "right_shape": "Shape on the right right",
    "number": "Number right",
    "ground": "Ground right",
}


def _one_of(words):
    return f"(?:{'|'.join(words)})"


def _objects(suffix=""):
    return rf"{_one_of(COLORS)} {_one_of(SHAPES)}{suffix}"


_ONE = rf"(?:a(?! [aeiou])|an(?= [aeiou])) {_objects()}"
_SEVERAL = rf"{_one_of(NUMBERS[1:])} {_objects('s')}"
_ON_THE_GROUND = rf"The ground is {_one_of(GROUNDS)}\."
_DESCRIPTION = re.compile(
    rf"On the left there is {_ONE}\. "
    rf"On the right there (?:is {_ONE}|are {_SEVERAL})\. "
    rf"{_ON_THE_GROUND}"
)
_SHORT_ANSWER = re.compile(
    rf"There (?:is (?:{_ONE}|one)|are (?:{_SEVERAL}|{_one_of(NUMBERS[1:])}))\.|{_ON_THE_GROUND}"
)
# A word and what it means, by kind.
_COLORS, _GROUNDS = ({word: word for word in words} for words in (COLORS, GROUNDS))
_NUMBERS = {"a": 1, "an": 1} | {word: number for number, word in enumerate(NUMBERS, start=1)}
_SHAPES = {shape + ending: shape for shape in SHAPES for ending in ("", "s")}
# What an answer can be wrong about -> the words that say it, and what they mean. The ground is a thing that is there.
_SAID = {"object": _SHAPES | _GROUNDS, "attribute": _COLORS, "count": _NUMBERS}


def is_well_formed(answer: str) -> bool:
    """Whether an answer is a description by the world's grammar, true or not.

    >>> is_well_formed("On the left there is a red star. On the right there are two blue stars. The ground is snow.")
    True
    >>> is_well_formed("On the left there is a red star. On the right there are two blue. The ground is snow.")
    False
    """
    return _DESCRIPTION.fullmatch(answer) is not None


def is_fluent(answer: str) -> bool:
    """Whether an answer is one by the world's grammar, to any of its questions but yes/no ones.

    >>> is_fluent("There are two blue stars."), is_fluent("There is two blue stars.")
    (True, False)
    """
    return is_well_formed(answer) or _SHORT_ANSWER.fullmatch(answer) is not None


def differences(answer: str, other: str) -> dict[str, int]:
    """At how many places two answers to one question name another object, attribute or count; those above 0.

    >>> differences("There are two blue squares.", "There are two red stars.")
    {'object': 1, 'attribute': 1}
    """
    found = {}
    for name, meanings in _SAID.items():
        sides = ([meanings[word] for word in re.findall(r"\w+", text) if word in meanings] for text in (answer, other))
        found[name] = sum(here != there for here, there in zip_longest(*sides))
    return {name: count for name, count in found.items() if count}


def grade(answer: str, scene: Scene) -> dict[str, bool]:
    """What an answer gets right of a scene, by the names of `GRADES`.

    An attribute is right when the sentences about its subject, broken ones too, say the true one and no other.

    >>> from bpo_fast.demo.world import Object
    >>> scene = Scene(Object("red", "circle"), Object("blue", "star"), 1, "sand", layout_seed=0)
    >>> found = grade("On the left there is a red circle. On the right there is a blue square.", scene)
    >>> [name for name, right in found.items() if right]
    ['left_color', 'left_shape', 'right_color', 'number']
    """
    left, right, ground = (_words_after(start, answer) for start in ("On the left", "On the right", "The ground"))
    return {
        "exact": answer == describe(scene),
        "well_formed": is_well_formed(answer),
        "left_color": _said(left, _COLORS) == {scene.left.color},
        "left_shape": _said(left, _SHAPES) == {scene.left.shape},
        "right_color": _said(right, _COLORS) == {scene.right.color},
        "right_shape": _said(right, _SHAPES) == {scene.right.shape},
        "number": _said(right, _NUMBERS) == {scene.count},
        "ground": _said(ground, _GROUNDS) == {scene.ground},
    }


def grade_descriptions(answers: Sequence[str], scenes: Sequence[Scene]) -> dict[str, float]:
    """Each of `GRADES` as a share of the answers, which are one a scene.

    Raises:
        ValueError: there is none, or not as many answers as scenes.
    """
    if not answers or len(answers) != len(scenes):
        raise ValueError(f"answers: found {len(answers)} to {len(scenes)} scenes, expected one to each.")
    grades = [grade(answer, scene) for answer, scene in zip(answers, scenes, strict=True)]
    return {name: sum(each[name] for each in grades) / len(grades) for name in GRADES}


def _words_after(start, answer):
    """The words of the sentences that begin with `start`."""
    sentences = (sentence.strip() for sentence in answer.split("."))
    return [word for sentence in sentences if sentence.startswith(start) for word in sentence[len(start) :].split()]


def _said(words, meanings):
    """What the words of one kind mean."""
    return {meanings[word] for word in words if word in meanings}
