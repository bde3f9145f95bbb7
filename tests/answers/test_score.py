import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_families import EXACT, REFUSED
from tiny_models import WORDS, make_llava, make_processor

from bpo_fast.answers.score import check_scoring, score_answers, score_batch
from bpo_fast.data import Annotation
from bpo_fast.demo import tiny_llava, world
from bpo_fast.models import packed_forward
from bpo_fast.models.load import load_model, load_processor

ANSWERS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11", "w2 w2", "w1 w2 w3 w4", "w12 w13", "w40 w41 w42", "w1 w2 w9"]
HISTORY = (("w20 w21", "w22"), ("w23", "w24 w25 w26"))


def noise(number, side=20):
    return Image.frombytes("RGB", (side, 16), random.Random(number).randbytes(side * 48))


def asked(number=0, **fields):
    return Annotation(number, str(number), f"{number}.png", f"w3 w{30 + number}", "w4", **fields)


def by_itself(model, processor, image, messages, answer):
    """Log-prob and tokens of one answer, from the full logits of transformers' own forward of the conversation."""
    image_part = {"type": "image", "image": image}
    messages = [
        {**turn, "content": [image_part if part["type"] == "image" else part for part in turn["content"]]}
        for turn in messages
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    whole = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, **options)["input_ids"]
    inputs = processor.apply_chat_template(whole, **options)
    ids, start = inputs["input_ids"][0], prompt.shape[1]
    assert torch.equal(ids[:start], prompt[0])
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"]).logits[0]
    logps = logits.double().log_softmax(-1)[start - 1 : -1]
    return logps.gather(1, ids[start:, None]).sum().item(), len(ids) - start


def check_scores(found, expected):
    assert [each.num_tokens for each in found] == [tokens for _, tokens in expected]
    assert [each.logp for each in found] == pytest.approx([logp for logp, _ in expected], rel=0, abs=1e-5)


@pytest.mark.parametrize("history", [(), HISTORY])
def test_eight_candidates_in_one_forward_score_as_each_by_itself(tiny_llava, history):
    model, processor = tiny_llava
    plain, sample, image = make_llava(), asked(history=history), noise(0)
    found = score_answers(model, processor, image, sample.prompt, ANSWERS)
    check_scores(found, [by_itself(plain, processor, image, sample.prompt, answer) for answer in ANSWERS])
    assert found[2].mean == found[2].logp / 8  # seven words and the end token


def test_eight_candidates_of_the_demos_model():
    model, plain = (load_model(tiny_llava.CHECKPOINT, dtype=torch.float32, device="cpu") for _ in range(2))
    processor, rng = load_processor(tiny_llava.CHECKPOINT), random.Random(3)
    image = world.draw(world.sample_scene(rng, 0.5))
    sample = Annotation(0, "0", "0.png", world.QUESTIONS["describe"], "")
    answers = [world.describe(world.sample_scene(rng, 0.5)) for _ in range(8)]
    found = score_answers(model, processor, image, sample.prompt, answers)
    check_scores(found, [by_itself(plain, processor, image, sample.prompt, answer) for answer in answers])


def test_a_string_is_one_question(tiny_llava):
    model, processor = tiny_llava
    sample = asked()
    assert score_answers(model, processor, noise(1), sample.question, ["w4"]) == score_answers(
        model, processor, noise(1), sample.prompt, ["w4"]
    )


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=9), min_size=1, max_size=6), st.randoms())
def test_the_order_of_the_answers_and_their_number_change_rounding_alone(answers, rng):
    model, processor = make_llava(), make_processor()
    texts = [" ".join(words) for words in answers]
    found = dict(zip(texts, score_answers(model, processor, noise(0), "w1", texts), strict=True))
    shuffled = rng.sample(texts, len(texts))
    check_scores(score_answers(model, processor, noise(0), "w1", shuffled), [found[text] for text in shuffled])
    for text in texts[:2]:
        check_scores(score_answers(model, processor, noise(0), "w1", [text]), [found[text]])


@pytest.mark.parametrize("token_budget", [None, 1, 24, 60, 10_000])
def test_a_batch_scores_as_each_prompt_by_itself(tiny_llava, token_budget):
    model, processor = tiny_llava
    samples = [asked(0), asked(1, history=HISTORY), asked(2), asked(3, history=HISTORY[:1])]
    images = [noise(n, side=16 + 4 * n) for n in range(4)]
    answers = [ANSWERS[:3], ANSWERS[3:4], ANSWERS[1:7], ANSWERS[4:6]]
    prompts = [sample.prompt for sample in samples]
    found = score_batch(model, processor, images, prompts, answers, token_budget=token_budget)
    for scores, *asked_for in zip(found, images, prompts, answers, strict=True):
        check_scores(scores, score_answers(model, processor, *asked_for))


def test_kept_scores_have_the_same_bits_alone_and_after_others(tiny_llava):
    model, processor = tiny_llava
    first = [score_answers(model, processor, noise(n), asked(n).prompt, ANSWERS[n : n + 2]) for n in range(4)]
    again = [score_answers(model, processor, noise(n), asked(n).prompt, ANSWERS[n : n + 2]) for n in (3, 1, 0, 2)]
    assert [again[n] for n in (2, 1, 3, 0)] == first


def test_a_prompt_has_a_forward_of_its_own_where_the_budget_says_so(tiny_llava):
    model, processor = tiny_llava
    images, prompts = [noise(n) for n in range(3)], [asked(n).prompt for n in range(3)]
    answers, forwards = [ANSWERS[:2], ANSWERS[2:3], ANSWERS[3:7]], []
    model.get_decoder().register_forward_pre_hook(lambda *_: forwards.append(1))
    for token_budget, expected in ((None, 1), (1, 3), (10_000, 1)):
        forwards.clear()
        score_batch(model, processor, images, prompts, answers, token_budget=token_budget)
        assert len(forwards) == expected


def test_the_image_is_seen_once_and_the_head_meets_the_answers_alone(tiny_llava, monkeypatch):
    model, processor = tiny_llava
    pixels, rows = [], []
    model.model.vision_tower.register_forward_pre_hook(
        lambda _, args, kwargs: pixels.append(len(kwargs.get("pixel_values", *args))), with_kwargs=True
    )
    head = packed_forward.flat_linear_token_logps

    def spied(hidden, *arguments, **options):
        rows.append(len(hidden))
        return head(hidden, *arguments, **options)

    monkeypatch.setattr(packed_forward, "flat_linear_token_logps", spied)
    found = score_answers(model, processor, noise(0), "w1", ANSWERS)
    assert pixels == [1]
    assert rows == [sum(each.num_tokens for each in found)]


def test_what_cannot_be_scored_is_a_sentence(tiny_llava):
    model, processor = tiny_llava
    for answer, said in ((" ", "answer: found an empty message"), ("<image> w1", "answer: found <image> in the text")):
        with pytest.raises(ValueError, match=said):
            score_answers(model, processor, noise(0), "w1", ["w1", answer])
    processor = make_processor(patch_size=4)
    with pytest.raises(ValueError, match="image_features: found 4 rows for 16 image tokens"):
        score_answers(model, processor, noise(0), "w1", ["w1"])
    with pytest.raises(ValueError, match=r"image_features: found \d+ rows for 16 image tokens"):
        score_batch(model, processor, [noise(0)] * 2, ["w1"] * 2, [["w1"]] * 2, token_budget=1)


@pytest.mark.parametrize("family", EXACT)
def test_families_whose_packed_sequences_are_exact_are_scored(family):
    model, processor = EXACT[family]()
    check_scoring(model, processor)
    assert len(score_answers(model, processor, noise(0), "w1", ["w2", "w3 w4"])) == 2


@pytest.mark.parametrize("family", REFUSED)
def test_other_families_are_refused_by_name(family):
    make, model_class, decoder_class = REFUSED[family]
    with pytest.raises(
        ValueError, match=rf"^model: found ({model_class} over )?{decoder_class}, .* docs/models.md lists"
    ):
        check_scoring(*make())
