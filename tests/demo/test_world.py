import json
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from bpo_fast.data import read_annotations
from bpo_fast.demo import world
from bpo_fast.evaluate.chair import ObjectMatcher, score_chair
from bpo_fast.evaluate.pope import says_yes

RED_CIRCLE = world.Object("red", "circle")


@pytest.mark.parametrize("bias", [0.0, 0.3, 0.95, 1.0])
def test_share_of_typical_scenes_is_the_bias(bias):
    rng = random.Random(1)
    share = np.mean([world.sample_scene(rng, bias).typical for _ in range(4000)])
    assert abs(share - bias) <= 5 * (bias * (1 - bias) / 4000) ** 0.5


def test_an_atypical_companion_is_any_other_object_and_not_the_left_one():
    rng = random.Random(2)
    scenes = [scene for scene in (world.sample_scene(rng, 0.0) for _ in range(6000)) if scene.left == RED_CIRCLE]
    seen = Counter(str(scene.right) for scene in scenes)
    expected = {str(item) for item in world.OBJECTS} - {"red circle", "blue square"}
    assert set(seen) == expected


def test_bias_out_of_range():
    with pytest.raises(ValueError, match=r"bias: found 1\.5, expected a probability from 0 to 1"):
        world.sample_scene(random.Random(0), 1.5)


def test_image_shows_what_the_scene_says():
    scene = world.Scene(RED_CIRCLE, world.Object("blue", "square"), 3, "sand", layout_seed=7)
    pixels = np.asarray(world.draw(scene))
    cell = world.IMAGE_SIZE // world.GRID
    shown = {}
    for column in range(world.GRID):
        for row in range(world.GRID):
            center = pixels[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell].reshape(-1, 3)
            for item in ("red", "blue"):
                if (center == world.COLORS[item]).all(1).sum() > 100:
                    shown[column, row] = item
    assert shown == {place: item.color for place, item in world.cells(scene).items()}
    assert Counter(shown.values()) == {"red": 1, "blue": 3}
    assert [item for (column, _), item in shown.items() if column == 0] == ["red"]
    assert tuple(pixels[-1, 0]) == world.GROUNDS["sand"] or tuple(pixels[0, 0]) == world.GROUNDS["sand"]


def test_shapes_differ():
    images = {
        world.draw(world.Scene(world.Object("red", shape), world.Object("blue", "star"), 1, "snow", 3)).tobytes()
        for shape in world.SHAPES
    }
    assert len(images) == len(world.SHAPES)


def test_description_names_just_what_is_there():
    rng = random.Random(3)
    scenes = [world.sample_scene(rng, 0.5) for _ in range(300)]
    objects = [sorted(world.present(scene)) for scene in scenes]
    matcher = ObjectMatcher(world.synonym_table())
    assert [sorted(matcher(world.describe(scene))) for scene in scenes] == objects
    assert (
        score_chair([world.describe(scene) for scene in scenes], objects, world.synonym_table())["response_rate"] == 0
    )


def test_answers_are_true():
    rng = random.Random(4)
    matcher = ObjectMatcher(world.synonym_table())
    kinds = Counter()
    for _ in range(500):
        scene, question, answer = world.sample_conversation(rng, 0.5)
        if question.startswith("Is there"):
            assert matcher(answer) == {str(scene.right)}
            assert says_yes(answer) == (matcher(question) == {str(scene.right)})
            kinds[says_yes(answer)] += 1
        elif "left?" in question:
            assert matcher(answer) == {str(scene.left)}
        elif question == world.QUESTIONS["right"]:
            assert matcher(answer) == {str(scene.right)}
        elif question == world.QUESTIONS["count"]:
            assert world.NUMBERS[scene.count - 1] in answer
    assert min(kinds.values()) > 40


def test_absent_objects_begin_with_the_missing_companion():
    rng = random.Random(5)
    for bias in (0.0, 1.0):
        scene = world.sample_scene(rng, bias)
        absent = world.absent_objects(scene)
        assert set(absent) | world.present(scene) == {str(item) for item in world.OBJECTS}
        assert not set(absent) & world.present(scene)
        if not scene.typical:
            assert absent[0] == str(world.typical_company(scene.left)[0])


def test_instruct_files_read_as_annotations_and_depend_on_the_seed_alone(tmp_path):
    paths = [
        world.write_instruct(tmp_path / name, 20, bias=0.5, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    annotations, skipped = read_annotations(paths[0], tmp_path / "a" / "images")
    assert (len(annotations), skipped) == (20, [])
    texts = [path.read_text() for path in paths]
    assert texts[0] == texts[1] != texts[2]
    images = [(path.parent / "images" / "000007.png").read_bytes() for path in paths]
    assert images[0] == images[1] != images[2]


def test_heldout_questions(tmp_path):
    descriptions, yes_no = world.write_heldout(tmp_path, 12, bias=0.0, seed=3)
    records = json.loads(descriptions.read_text())
    scenes = [world.read_scene(record) for record in records]
    assert not any(scene.typical for scene in scenes)
    for record, scene in zip(records, scenes, strict=True):
        assert set(record["objects"]) == world.present(scene)
        with Image.open(tmp_path / "images" / record["image"]) as image:
            assert image.tobytes() == world.draw(scene).tobytes()
    asked = json.loads(yes_no.read_text())
    assert [record["label"] for record in asked] == ["yes", "no"] * 12
    for record in asked:
        scene = world.read_scene(record)
        (name,) = ObjectMatcher(world.synonym_table())(record["question"])
        expected = scene.right if record["label"] == "yes" else world.typical_company(scene.left)[0]
        assert name == str(expected)
