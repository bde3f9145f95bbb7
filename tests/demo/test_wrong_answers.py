"""Wrong answers against what they change, word by word, and the template that asks for them."""

import json
import random
from collections import Counter

import pytest

from bpo_fast.bootstrap.rewriting import read_template
from bpo_fast.demo import world, wrong_answers
from bpo_fast.demo.grade import differences, is_fluent

SCENE = world.Scene(world.Object("red", "circle"), world.Object("orange", "star"), 2, "snow", layout_seed=0)
DESCRIPTION = "On the left there is a red circle. On the right there are two orange stars. The ground is snow."
# Kind of question, error -> the words that stand in the answer to SCENE, and the choice of words in their place.
CHANGED = {
    ("describe", "object"): ("stars", {"circles", "squares", "triangles"}),
    ("describe", "attribute"): ("a red", {"a blue", "a green", "a yellow", "a purple", "an orange"}),
    ("describe", "count"): ("are two orange stars", {"is an orange star", "are three orange stars"}),
    ("left", "object"): ("circle", {"square", "triangle", "star"}),
    ("right", "attribute"): ("orange", {"red", "blue", "green", "yellow", "purple"}),
    ("count", "count"): ("are two", {"is one", "are three"}),
    ("ground", "count"): ("snow", {"grass", "sand", "water"}),
}


def answers_of(kind, error, scene=SCENE, times=200):
    rng = random.Random(0)
    return Counter(wrong_answers.wrong_answer(scene, kind, error, rng) for _ in range(times))


@pytest.mark.parametrize(("kind", "error"), CHANGED)
def test_each_error_puts_every_other_value_in_one_place(kind, error):
    old, values = CHANGED[kind, error]
    _, true = world.question_answer(SCENE, kind, random.Random(0))
    assert true.count(old) == 1
    found = answers_of(kind, error)
    assert set(found) == {true.replace(old, new) for new in values}
    assert min(found.values()) > 200 / len(values) / 2  # all alike often


def test_a_relation_is_wrong_when_the_sides_are_swapped():
    assert set(answers_of("describe", "relation")) == {
        "On the left there is an orange star. On the right there are two red circles. The ground is snow."
    }


def test_every_error_changes_every_annotated_answer_and_leaves_it_fluent():
    rng = random.Random(1)
    for kind in world.ANNOTATION_MIX:
        for error in wrong_answers.ERRORS:
            for _ in range(50):
                scene = world.sample_scene(rng, 0.5)
                _, true = world.question_answer(scene, kind, rng)
                wrong = wrong_answers.wrong_answer(scene, kind, error, rng)
                places = sum(differences(true, wrong).values())
                assert is_fluent(wrong)
                assert places >= 1 if error == "relation" else places == 1


def test_what_is_rewritten_are_annotated_answers_in_their_mix():
    rng = random.Random(2)
    rows = [wrong_answers.sample_rewriting(rng) for _ in range(3000)]
    asked = Counter(question for _, question, _, _ in rows)
    total = sum(world.ANNOTATION_MIX.values())
    assert set(asked) == {world.QUESTIONS[kind] for kind in world.ANNOTATION_MIX}
    for kind, weight in world.ANNOTATION_MIX.items():
        share = weight / total
        assert abs(asked[world.QUESTIONS[kind]] / 3000 - share) < 5 * (share * (1 - share) / 3000) ** 0.5
    assert set(Counter(error for error, *_ in rows)) == set(wrong_answers.ERRORS)
    assert all(answer != wrong for _, _, answer, wrong in rows)


def test_the_template_asks_for_each_error():
    template = read_template(wrong_answers.TEMPLATE)
    assert tuple(template.errors) == wrong_answers.ERRORS
    for error in wrong_answers.ERRORS:
        assert template.ask(error, "What is it?", DESCRIPTION) == f"Change the {error}: What is it? {DESCRIPTION}"
        assert template.keep(error, DESCRIPTION, DESCRIPTION.replace("two", "three"))
    assert json.loads(wrong_answers.TEMPLATE.read_text())["version"] == "1"
