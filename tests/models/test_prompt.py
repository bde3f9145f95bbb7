"""The one renderer against transformers' own chat template and tokenisation."""

import pytest
import torch
from tiny_models import make_pairs

from bpo_fast.models.prompt import answer_ids, encode, image_inputs, prompt_ids, question, render

TEXTS = ["w1 w2 w3 w4 w5", "w6"]


@pytest.fixture
def images():
    return [pair["images"][0] for pair in make_pairs(2)]


def test_prompts_are_those_of_the_chat_template_with_one_bos_and_the_image(processor, images):
    batch = encode(processor, [render(processor, question(text))[0] for text in TEXTS], [[image] for image in images])
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
        for image, text in zip(images, TEXTS, strict=True)
    ]
    expected = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    texts = processor.tokenizer.batch_decode(batch["input_ids"])
    assert texts[0] == "<s> USER: <image> <image> <image> <image> w1 w2 w3 w4 w5 ASSISTANT:"
    assert texts[1] == "<pad> " * 4 + "<s> USER: <image> <image> <image> <image> w6 ASSISTANT:"
    assert [len(ids) for ids in prompt_ids(batch)] == [12, 8]
    assert image_inputs(batch).keys() == {"pixel_values"}


def test_prompt_and_answer_together_are_the_whole_conversation(processor):
    answers = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in ("w7", "w8 w9")]
    prompt, texts = render(processor, question("w1"), answers)
    for answer, text in zip(answers, texts, strict=True):
        assert prompt + text == processor.apply_chat_template(question("w1") + answer, tokenize=False)
    ids = processor.tokenizer.convert_tokens_to_ids(["w8", "w9", "</s>"])
    assert answer_ids(processor, texts[1])[-3:] == ids


def test_a_plain_string_gets_the_images_before_it(processor):
    plain = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    assert render(processor, plain[:1], [plain[1:]]) == render(
        processor, question("w1"), [[{"role": "assistant", "content": [{"type": "text", "text": "w2"}]}]]
    )


def test_placeholders_and_images_that_differ_are_named(processor):
    with pytest.raises(ValueError, match=r"^prompt: found 1 image placeholders for 2 images in .*, expected as many;"):
        render(processor, question("w1"), num_images=2)
