import random

import pytest
import torch
from PIL import Image

from bpo_fast.answers.generate import GenerationSettings, Response, check_processor, encode, generate

QUESTIONS = ["w1 w2 w3 w4 w5", "w6", "w7 w8 w9"]


@pytest.fixture
def images():
    return [Image.frombytes("RGB", (20, 16), random.Random(n).randbytes(960)) for n in range(len(QUESTIONS))]


def greedy_by_hand(model, processor, image, question, length):
    """Tokens of one unpadded question, a whole forward pass a token."""
    inputs = encode(model, processor, [image], [question])
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
    model.lm_head.weight.data[model.config.image_token_id] = 0  # a random model may say it, and asks for a picture
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


def test_prompt_is_the_chat_template_with_one_bos_and_the_image(tiny_llava, images):
    model, processor = tiny_llava
    inputs = encode(model, processor, images[:2], QUESTIONS[:2])
    texts = processor.tokenizer.batch_decode(inputs["input_ids"])
    assert texts[0] == "<s> USER: <image> <image> <image> <image> w1 w2 w3 w4 w5 ASSISTANT:"
    assert texts[1] == "<pad> " * 4 + "<s> USER: <image> <image> <image> <image> w6 ASSISTANT:"


def test_sampling_depends_on_the_seed_and_leaves_the_random_state(tiny_llava, images):
    model, processor = tiny_llava
    settings = GenerationSettings(max_new_tokens=8, do_sample=True, temperature=2.0)
    state = torch.get_rng_state()
    first, again, other = (generate(model, processor, images, QUESTIONS, settings, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first != other
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, but it is 0"),
        ({"temperature": 0.5}, "have an effect with do_sample=True only"),
        ({"top_p": 0.5}, "have an effect with do_sample=True only"),
        ({"do_sample": True, "temperature": 0.0}, "temperature must be above 0"),
        ({"do_sample": True, "top_p": 1.5}, "top_p must be above 0 and at most 1"),
    ],
)
def test_decoding_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**options)


def test_a_processor_with_another_number_of_image_tokens_is_refused(tiny_llava, images, monkeypatch):
    model, processor = tiny_llava
    check_processor(model, processor, images[0])
    monkeypatch.setattr(processor, "num_additional_image_tokens", 0)
    with pytest.raises(ValueError, match="puts 3 image tokens into a prompt but the model makes 4 image features"):
        check_processor(model, processor, images[0])
