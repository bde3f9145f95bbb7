"""The demo's figures about its negatives, against answers made and counted one by one."""

import random

import pytest
import torch
from datasets import Dataset

from bpo_fast.answers.generate import GenerationSettings, generate
from bpo_fast.bootstrap import weaken
from bpo_fast.data.annotations import Annotation
from bpo_fast.demo import tiny_llava, world
from bpo_fast.demo.negatives import (
    first_of_both,
    hallucination_by_step,
    injected_errors,
    mean_of_runs,
    of_same_samples,
    read_texts,
)
from bpo_fast.evaluate.chair import score_chair
from bpo_fast.models.load import load_model, load_processor


def test_hallucination_is_counted_in_what_the_model_says_of_each_weakened_image():
    model = load_model(tiny_llava.CHECKPOINT, dtype=torch.float32, device="cpu")
    processor = load_processor(tiny_llava.CHECKPOINT)
    rng = random.Random(0)
    scenes = [world.sample_scene(rng, 0.0) for _ in range(10)]
    found = hallucination_by_step(model, processor, scenes, (300, 999), seed=4)
    assert found["steps"] == [300, 999]
    for step, share in zip(found["steps"], found["hallucinated"], strict=True):
        answers = []
        for number, scene in enumerate(scenes):
            sample = Annotation(number, str(number), str(number), world.QUESTIONS["describe"], world.describe(scene))
            with weaken(model, step, seed=4, sample_ids=[sample.sample_id]):
                (answer,) = generate(model, processor, [world.draw(scene)], [sample.question], GenerationSettings(48))
            answers.append(answer.text)
        expected = score_chair(answers, [sorted(world.present(scene)) for scene in scenes], world.synonym_table())
        assert share == expected["response_rate"]
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


def pairs_of(rows):
    def turn(text):
        return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]

    asked = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]}]
    return Dataset.from_list(
        [
            {
                "images": [],
                "prompt": asked,
                "chosen": turn("Yes."),
                "rejected": turn(rejected),
                "id": name,
                "rejected_type": kind,
                "details": '{"error": "count"}' if kind == "error_injected" else '{"step": 900}',
            }
            for name, kind, rejected in rows
        ]
    )


def test_pairs_of_both_kinds_are_told_apart_and_those_of_one_sample_meet():
    weakened, injected = "image_weakened", "error_injected"
    rows = [
        ("b", injected, "1"),
        ("a", weakened, "2"),
        ("c", weakened, "3"),
        ("a", injected, "4"),
        ("c", injected, "5"),
    ]
    pairs = pairs_of(rows)
    texts = read_texts(pairs)
    assert texts[0] == {
        "id": "b",
        "kind": injected,
        "error": "count",
        "question": "What?",
        "chosen": "Yes.",
        "rejected": "1",
    }
    assert texts[1]["error"] is None
    found = [(each[weakened]["rejected"], each[injected]["rejected"]) for each in first_of_both(texts, 5)]
    assert found == [("2", "4"), ("3", "5")]
    assert first_of_both(texts, 1) == first_of_both(texts, 5)[:1]
    same = of_same_samples(pairs)
    assert [same[kind]["id"] for kind in (weakened, injected)] == [["a", "c"]] * 2
    assert [read_texts(same[injected])[row]["rejected"] for row in (0, 1)] == ["4", "5"]


def test_the_mean_of_runs_counts_each_answer_alike():
    def run(hallucinated, **errors):
        return {"noise": {"steps": [1, 2], "hallucinated": hallucinated}, "errors": errors}

    def row(answers, share):
        return {"answers": answers, "changed": share, "one_place": share / 2, "fluent": 1.0}

    runs = [run([0.0, 0.5], all=row(3, 1.0), count=row(3, 1.0)), run([0.5, 1.0], all=row(1, 0.0))]
    assert mean_of_runs(runs) == run([0.25, 0.75], all=row(4, 0.75), count=row(3, 1.0))
