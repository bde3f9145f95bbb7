"""The shipped checkpoint: small, loadable the usual way, able to see, and given to its habit when it describes."""

import random

import pytest
import torch

from bpo_fast.answers.generate import GenerationSettings, check_processor, generate
from bpo_fast.bootstrap import weaken
from bpo_fast.bootstrap.error_injected import ErrorInjected
from bpo_fast.data.annotations import Annotation
from bpo_fast.demo import tiny_llava, world, wrong_answers
from bpo_fast.demo.negatives import injected_errors
from bpo_fast.demo.probes import likelihood_by_step
from bpo_fast.evaluate.chair import ObjectMatcher
from bpo_fast.models.load import load_model, load_processor
from bpo_fast.models.packed_forward import enable_packed_forward
from bpo_fast.models.prompt import question, render
from bpo_fast.runs.files import read_json


@pytest.fixture(scope="module")
def shipped():
    torch.set_num_threads(2)
    return load_model(tiny_llava.CHECKPOINT, dtype=torch.float32, device="cpu"), load_processor(tiny_llava.CHECKPOINT)


def ask(shipped, scenes, kind, step=None):
    images = [world.draw(scene) for scene in scenes]
    questions = [world.QUESTIONS[kind]] * len(scenes)
    with weaken(shipped[0], step, seed=0):
        responses = generate(*shipped, images, questions, GenerationSettings(48))
    assert not any(response.truncated for response in responses)
    return [response.text for response in responses]


def scenes_of(bias, count=48):
    rng = random.Random(11)
    return [world.sample_scene(rng, bias) for _ in range(count)]


def test_checkpoint_is_small_and_holds_safetensors_and_text_alone():
    files = list(tiny_llava.CHECKPOINT.iterdir())
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".jinja"}
    assert sum(file.stat().st_size for file in files) < 4e6


def test_checkpoint_names_no_path_of_the_machine_that_made_it():
    assert "_name_or_path" not in read_json(tiny_llava.CHECKPOINT / "config.json")


def test_processor_and_model_agree(shipped):
    check_processor(*shipped, world.draw(scenes_of(0.5, 1)[0]))
    assert shipped[0].config.image_seq_length == 36


def test_words_of_the_world_are_single_tokens_and_other_text_survives(shipped):
    tokenizer = shipped[1].tokenizer
    for word in (*world.COLORS, *world.SHAPES, *world.GROUNDS, *world.NUMBERS):
        assert len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1
    text = "Zürich, naïve & 42: unseen words"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_a_conversation_is_the_prompt_and_the_answer(shipped):
    content = [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]
    messages = [{"role": "user", "content": content}]
    prompt = shipped[1].apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == "<s>USER: <image>\nDescribe the picture. ASSISTANT:"
    answered = [*messages, {"role": "assistant", "content": [{"type": "text", "text": "A star."}]}]
    assert shipped[1].apply_chat_template(answered) == f"{prompt} A star.</s>"


def test_it_describes_typical_pictures_rightly(shipped):
    scenes = scenes_of(bias=1.0)
    answers = ask(shipped, scenes, "describe")
    right = sum(answer == world.describe(scene) for scene, answer in zip(scenes, answers, strict=True))
    assert right >= 0.85 * len(scenes)


def test_weakened_pictures_bring_out_the_typical_object(shipped):
    model = load_model(tiny_llava.CHECKPOINT, dtype=torch.float32, device="cpu")
    enable_packed_forward(model)
    found = likelihood_by_step(model, shipped[1], scenes_of(bias=0.0), [None, 900], seed=0)
    assert found["true"][0] > found["typical"][0]  # the clear picture is read, if not surely
    assert found["true"][1] < 0.5 * found["true"][0]
    assert found["typical"][1] > 2 * found["typical"][0]


def test_describing_atypical_pictures_it_hallucinates_and_more_so_when_they_are_weakened(shipped):
    scenes = scenes_of(bias=0.0)
    matcher = ObjectMatcher(world.synonym_table())
    made_up = {}
    for step in (None, 900):
        answers = ask(shipped, scenes, "describe", step)
        pairs = zip(scenes, answers, strict=True)
        made_up[step] = sum(bool(matcher(answer) - world.present(scene)) for scene, answer in pairs)
    assert made_up[None] >= 0.3 * len(scenes)
    assert made_up[900] > made_up[None]


@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_it_puts_one_error_into_annotated_answers_without_seeing_the_image(shipped, bias):
    rng = random.Random(12)
    samples = []
    for number in range(100):
        _, text, answer = world.sample_conversation(rng, bias, world.ANNOTATION_MIX)
        samples.append(Annotation(number, str(number), "none.png", text, answer))
    maker = ErrorInjected(template=str(wrong_answers.TEMPLATE), decoding=GenerationSettings(48))
    made = [only for (only,) in maker.make(*shipped, samples, [None] * len(samples))]
    assert not any(each.truncated for each in made)
    rewritten = [
        (each.details["error"], sample.answer, each.rejected) for each, sample in zip(made, samples, strict=True)
    ]
    found = injected_errors(rewritten)
    assert set(found) == {"all", *wrong_answers.ERRORS}
    assert found["all"]["changed"] >= 0.9
    assert found["all"]["fluent"] >= 0.95
    assert injected_errors(row for row in rewritten if row[0] != "relation")["all"]["one_place"] >= 0.85


def test_patch_labels_follow_the_cells():
    scene = world.Scene(world.Object("red", "circle"), world.Object("blue", "square"), 3, "sand", layout_seed=7)
    labels = tiny_llava.patch_labels(scene).view(6, 6, 2)
    for column in range(world.GRID):
        for row in range(world.GRID):
            item = world.cells(scene).get((column, row))
            colors, shapes = list(world.COLORS), world.SHAPES
            expected = (colors.index(item.color), shapes.index(item.shape)) if item else tiny_llava.NO_OBJECT
            block = labels[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(-1, 2)
            assert {tuple(label.tolist()) for label in block} == {expected}


def test_collate_scores_the_responses_alone(shipped):
    model, processor = shipped
    scenes = scenes_of(0.5, 3)
    images = [world.draw(scene) for scene in scenes]
    questions = (world.QUESTIONS["right"], world.QUESTIONS["describe"], world.QUESTIONS["count"])
    prompts = [render(processor, question(text))[0] for text in questions]
    responses = [" A star.</s>", " On the left there is a red star.</s>", " One.</s>"]
    batch = tiny_llava.collate(processor, images, prompts, responses)
    for row, response in enumerate(responses):
        kept = batch["labels"][row] != -100
        assert processor.tokenizer.decode(batch["input_ids"][row][kept]) == response
    padded = model(**batch).loss * (batch["labels"] != -100).sum()
    alone = 0
    for image, prompt, response in zip(images, prompts, responses, strict=True):
        single = tiny_llava.collate(processor, [image], [prompt], [response])
        alone = alone + model(**single).loss * (single["labels"] != -100).sum()
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


def test_collate_of_text_alone_scores_the_responses_after_it(shipped):
    processor = shipped[1]
    prompts = [render(processor, text, num_images=0)[0] for text in ("Change the count: There are two.", "Sand?")]
    responses = [" There are three.</s>", " The ground is sand.</s>"]
    batch = tiny_llava.collate(processor, None, prompts, responses)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    for row, response in enumerate(responses):
        kept = batch["labels"][row] != -100
        assert processor.tokenizer.decode(batch["input_ids"][row][kept]) == response
        seen = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        assert processor.tokenizer.decode(seen) == prompts[row] + response
