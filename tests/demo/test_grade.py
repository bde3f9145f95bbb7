"""Grades of answers against what the world itself says of its scenes."""

import random
from dataclasses import replace

import pytest

from bpo_fast.demo import world
from bpo_fast.demo.grade import GRADES, differences, grade, grade_descriptions, is_fluent, is_well_formed

SCENE = world.Scene(world.Object("red", "circle"), world.Object("orange", "star"), 3, "snow", layout_seed=0)
TRUE = "On the left there is a red circle. On the right there are three orange stars. The ground is snow."


def wrong(answer):
    return {name for name, right in grade(answer, SCENE).items() if not right}


def other(rng, values, value):
    return rng.choice([item for item in values if item != value])


def test_the_true_description_has_every_grade():
    rng = random.Random(0)
    scenes = [world.sample_scene(rng, bias) for bias in (0.0, 1.0) for _ in range(100)]
    assert world.describe(SCENE) == TRUE
    assert grade_descriptions([world.describe(scene) for scene in scenes], scenes) == dict.fromkeys(GRADES, 1.0)


def test_the_description_of_another_scene_is_wrong_in_just_what_differs():
    rng = random.Random(1)
    for _ in range(200):
        scene = world.sample_scene(rng, 0.0)
        left, right = scene.left, scene.right
        others = {
            "left_color": replace(scene, left=world.Object(other(rng, world.COLORS, left.color), left.shape)),
            "left_shape": replace(scene, left=world.Object(left.color, other(rng, world.SHAPES, left.shape))),
            "right_color": replace(scene, right=world.Object(other(rng, world.COLORS, right.color), right.shape)),
            "right_shape": replace(scene, right=world.Object(right.color, other(rng, world.SHAPES, right.shape))),
            "number": replace(scene, count=other(rng, (1, 2, 3), scene.count)),
            "ground": replace(scene, ground=other(rng, world.GROUNDS, scene.ground)),
        }
        for name, changed in others.items():
            found = grade(world.describe(changed), scene)
            assert {grade for grade, right in found.items() if not right} == {name, "exact"}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", set(GRADES)),
        (TRUE.removesuffix(" The ground is snow."), {"exact", "well_formed", "ground"}),
        (TRUE + " The ground is snow.", {"exact", "well_formed"}),
        (TRUE + " The ground is sand.", {"exact", "well_formed", "ground"}),
        (TRUE.replace(" stars", ""), {"exact", "well_formed", "right_shape"}),
        (TRUE.replace("three orange stars", "three orange star"), {"exact", "well_formed"}),
        (TRUE.replace("are three orange stars", "is a orange star"), {"exact", "well_formed", "number"}),
        (TRUE.replace("are three", "is an").replace("stars", "star"), {"exact", "number"}),
        (TRUE.replace("orange stars", "red orange stars"), {"exact", "well_formed", "right_color"}),
        (TRUE.removesuffix("."), {"exact", "well_formed"}),
        (
            "On the right there are three orange stars. On the left there is a red circle. The ground is snow.",
            {"exact", "well_formed"},
        ),
        ("There are three orange stars.", set(GRADES)),
    ],
)
def test_broken_answers_keep_the_grades_of_what_they_say(answer, expected):
    assert wrong(answer) == expected


def test_every_description_of_the_world_is_well_formed_and_none_without_a_word():
    rng = random.Random(2)
    for _ in range(50):
        words = world.describe(world.sample_scene(rng, 0.0)).split(" ")
        assert is_well_formed(" ".join(words))
        for place in range(len(words)):
            assert not is_well_formed(" ".join(words[:place] + words[place + 1 :]))


def test_rates_are_shares_of_the_answers():
    found = grade_descriptions([TRUE, TRUE.replace("snow", "sand"), "", TRUE + " The"], [SCENE] * 4)
    assert found == {
        "exact": 0.25,
        "well_formed": 0.5,
        "left_color": 0.75,
        "left_shape": 0.75,
        "right_color": 0.75,
        "right_shape": 0.75,
        "number": 0.75,
        "ground": 0.5,
    }


@pytest.mark.parametrize("answers", [[], [TRUE]])
def test_an_answer_to_each_scene_is_expected(answers):
    with pytest.raises(ValueError, match=rf"answers: found {len(answers)} to 2 scenes, expected one to each"):
        grade_descriptions(answers, [SCENE] * 2)


def test_the_answers_of_the_world_are_fluent_and_none_without_a_word():
    rng = random.Random(3)
    for kind in world.ANNOTATION_MIX:
        for _ in range(20):
            _, answer = world.question_answer(world.sample_scene(rng, 0.0), kind, rng)
            assert is_fluent(answer)
            words = answer.split(" ")
            for place in range(len(words)):
                assert not is_fluent(" ".join(words[:place] + words[place + 1 :])) or words[place] in world.COLORS


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (TRUE, {}),
        (TRUE.replace("stars", "squares"), {"object": 1}),
        (TRUE.replace("snow", "sand"), {"object": 1}),
        (TRUE.replace("a red", "an orange"), {"attribute": 1}),
        (TRUE.replace("are three orange stars", "is an orange star"), {"count": 1}),
        (TRUE.replace("a red circle", "two blue circles"), {"attribute": 1, "count": 1}),
        (
            "On the left there is an orange star. On the right there are three red circles. The ground is snow.",
            {"object": 2, "attribute": 2},
        ),
        (TRUE.removesuffix(" The ground is snow."), {"object": 1}),
        (TRUE + " And a star.", {"object": 1, "count": 1}),
        (TRUE.replace("On the left", "Left"), {}),
        ("", {"object": 3, "attribute": 2, "count": 2}),
    ],
)
def test_differences_are_counted_by_place(other, expected):
    assert differences(TRUE, other) == differences(other, TRUE) == expected
