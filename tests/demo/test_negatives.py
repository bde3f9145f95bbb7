"""The demo's figures about its negatives, against answers made and counted one by one."""

import random

import pytest
import torch

from bpo_fast.answers.generate import GenerationSettings, generate
from bpo_fast.bootstrap import weaken
from bpo_fast.data.annotations import Annotation
from bpo_fast.demo import tiny_llava, world
from bpo_fast.demo.grade import grade
from bpo_fast.demo.negatives import hallucination_by_step, injected_errors
from bpo_fast.models.load import load_model, load_processor


def test_hallucination_is_counted_in_what_the_model_says_of_each_weakened_image():
    model = load_model(tiny_llava.CHECKPOINT, dtype=torch.float32, device="cpu")
    processor = load_processor(tiny_llava.CHECKPOINT)
    rng = random.Random(0)
    scenes = [world.sample_scene(rng, 0.0) for _ in range(10)]
    found = hallucination_by_step(model, processor, scenes, (300, 999), seed=4)
    assert found["steps"] == [300, 999]
    for step, share in zip(found["steps"], found["hallucinated"], strict=True):
        wrong = 0
        for number, scene in enumerate(scenes):
            sample = Annotation(number, str(number), str(number), world.QUESTIONS["describe"], world.describe(scene))
            with weaken(model, step, seed=4, sample_ids=[sample.sample_id]):
                (answer,) = generate(model, processor, [world.draw(scene)], [sample.question], GenerationSettings(48))
            right = grade(answer.text, scene)
            wrong += not all(right[name] for name in ("left_color", "left_shape", "right_color", "right_shape"))
        assert share == wrong / len(scenes)
    assert 0 < found["hallucinated"][0] < found["hallucinated"][1]


def test_errors_are_counted_by_what_was_asked_and_in_all():
    answers = [
        ("count", "There are two.", "There are three."),
        ("count", "There are two.", "There are two."),
        ("object", "There is a red star.", "There is a red circle"),
        ("object", "There is a red star.", "There are two red circles."),
    ]
    assert injected_errors(answers) == {
        "all": {"answers": 4, "changed": 0.75, "one_place": 0.5, "fluent": 0.75},
        "count": {"answers": 2, "changed": 0.5, "one_place": 0.5, "fluent": 1.0},
        "object": {"answers": 2, "changed": 1.0, "one_place": 0.5, "fluent": 0.5},
    }


@pytest.mark.parametrize("answers", [[], iter([])])
def test_no_answers_have_no_shares(answers):
    assert injected_errors(answers) == {}
