import random
from collections import Counter

import pytest
import torch
from PIL import Image

from bpo_fast.answers.generate import GenerationSettings, Response, check_processor, generate

QUESTIONS = ["w1 w2 w3 w4 w5", "w6", "w7 w8 w9"]


@pytest.fixture
def images():
    return [Image.frombytes("RGB", (20, 16), random.Random(n).randbytes(960)) for n in range(len(QUESTIONS))]


def greedy_by_hand(model, processor, image, question, length):
    """Tokens of one unpadded question, a whole forward pass a token."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert bool(inputs["attention_mask"].all())
    ids = inputs["input_ids"]
    tokens = []
    while len(tokens) < length:
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
        tokens.append(int(logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([[tokens[-1]]])], dim=1)
        if tokens[-1] == processor.tokenizer.eos_token_id:
            return tokens, False
    return tokens, True


def test_a_batch_answers_as_each_question_alone(tiny_llava, images):
    model, processor = tiny_llava
    model.lm_head.weight.data[model.config.image_token_id] = 0  # a random model may say it, and asks for an image
    responses = generate(model, processor, images, QUESTIONS, GenerationSettings(max_new_tokens=6))
    assert len({response.text for response in responses}) > 1
    for image, question, response in zip(images, QUESTIONS, responses, strict=True):
        tokens, truncated = greedy_by_hand(model, processor, image, question, 6)
        text = processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert response == Response(text, truncated)


def test_an_ended_response_is_not_truncated(tiny_llava, images):
    model, processor = tiny_llava
    tokens, _ = greedy_by_hand(model, processor, images[0], QUESTIONS[0], 3)
    model.generation_config.eos_token_id = tokens[2]
    (response,) = generate(model, processor, images[:1], QUESTIONS[:1], GenerationSettings(max_new_tokens=3))
    assert not response.truncated
    (response,) = generate(model, processor, images[:1], QUESTIONS[:1], GenerationSettings(max_new_tokens=2))
    assert response.truncated


def test_sampling_depends_on_the_seed_and_leaves_the_random_state(tiny_llava, images):
    model, processor = tiny_llava
    settings = GenerationSettings(max_new_tokens=8, do_sample=True, temperature=2.0)
    state = torch.get_rng_state()
    seeds = [[1, 2, 3], [1, 2, 3], [4, 5, 6]]
    first, again, other = (generate(model, processor, images, QUESTIONS, settings, seeds=each) for each in seeds)
    assert first == again
    assert first != other
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"top_p": 0.7}])
def test_a_sampled_answer_does_not_depend_on_its_batch(tiny_llava, images, options):
    model, processor = tiny_llava
    model.lm_head.weight.data[model.config.image_token_id] = 0
    settings = GenerationSettings(max_new_tokens=8, do_sample=True, **options)
    batch = generate(model, processor, images, QUESTIONS, settings, seeds=[7, 8, 9])
    for number in (2, 0, 1):
        alone = generate(model, processor, [images[number]], [QUESTIONS[number]], settings, seeds=[7 + number])
        assert alone == [batch[number]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.25, 0.09, 0.0225, 0.0025]),
        ({"top_p": 0.7}, [0.5, 0.3, 0, 0]),  # the likeliest tokens that have 0.7 together
    ],
)
def test_tokens_are_drawn_with_their_probabilities(tiny_llava, images, options, expected, monkeypatch):
    """All first tokens of many questions, from logits of four probabilities."""
    model, processor = tiny_llava
    words = processor.tokenizer.convert_tokens_to_ids(["w1", "w2", "w3", "w4"])

    def head(hidden):
        logits = hidden.new_full((*hidden.shape[:-1], model.config.text_config.vocab_size), float("-inf"))
        logits[..., words] = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
        return logits

    monkeypatch.setattr(model.lm_head, "forward", head)
    count, settings = 1000, GenerationSettings(max_new_tokens=1, do_sample=True, **options)
    responses = generate(model, processor, [images[0]] * count, ["w1"] * count, settings, seeds=range(count))
    drawn = Counter(response.text for response in responses)
    for word, weight in zip(("w1", "w2", "w3", "w4"), expected, strict=True):
        p = weight / sum(expected)
        assert abs(drawn[word] - count * p) <= 4 * (count * p * (1 - p)) ** 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: found 0, expected at least 1"),
        ({"max_new_tokens": None}, "max_new_tokens: found None, expected at least 1"),
        ({"do_sample": None}, "do_sample: found None, expected True or False"),
        ({"temperature": 0.5}, "temperature: found 0.5, expected None with greedy decoding"),
        ({"top_p": 0.5}, "top_p: found 0.5, expected None with greedy decoding"),
        ({"do_sample": True, "temperature": 0.0}, "temperature: found 0.0, expected a number above 0"),
        ({"do_sample": True, "top_p": 1.5}, "top_p: found 1.5, expected a number above 0 and at most 1"),
    ],
)
def test_decoding_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**options)


def test_a_processor_with_another_number_of_image_tokens_is_refused(tiny_llava, images, monkeypatch):
    model, processor = tiny_llava
    check_processor(model, processor, images[0])
    monkeypatch.setattr(processor, "num_additional_image_tokens", 0)
    with pytest.raises(ValueError, match="processor: found 3 image tokens in its prompt, expected 4, the image"):
        check_processor(model, processor, images[0])
