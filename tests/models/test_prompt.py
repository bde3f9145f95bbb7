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


def test_a_plain_string_is_a_message_of_one(processor):
    assert render(processor, "w1", ["w2"]) == render(
        processor, [{"role": "user", "content": "w1"}], [[{"role": "assistant", "content": "w2"}]]
    )


def test_options_reach_the_chat_template(processor):
    template = "{{ mood }}{{ tools[0]['name'] if tools }}" + processor.chat_template
    options = {"chat_template": template, "mood": "kind ", "tools": [{"name": "w5 "}]}
    prompt, (answer,) = render(processor, question("w1"), ["w2"], template_options=options)
    plain, (expected,) = render(processor, question("w1"), ["w2"])
    assert (prompt, answer) == ("kind w5 " + plain, expected)


def test_an_answer_goes_on_with_the_prompts_last_message(processor):
    """Cut as TRL cuts it."""
    from trl.data_utils import apply_chat_template

    said = [*question("w1"), {"role": "assistant", "content": [{"type": "text", "text": "w2"}]}]
    answers = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in ("w3", "w4")]
    expected = apply_chat_template({"prompt": said, "chosen": answers[0], "rejected": answers[1]}, processor)
    prompt, texts = render(processor, said, answers)
    assert (prompt, texts) == (expected["prompt"], [expected["chosen"], expected["rejected"]])


SAID = [{"role": "assistant", "content": "w2"}]


def user(*parts, **more):
    return [{"role": "user", "content": list(parts), **more}]


@pytest.mark.parametrize(
    ("prompt", "answer", "sentence"),
    [
        ([], SAID, r"prompt: found \[\], expected a text or a list of messages"),
        (None, SAID, "prompt: found None, expected a text or a list of messages"),
        ("w1", [], r"answer: found \[\], expected a text or a list of messages"),
        (["w1"], SAID, "prompt: found 'w1', expected a message of role and content"),
        (
            [{"role": "human", "content": "w1"}],
            SAID,
            "prompt: found a message of role 'human', expected one of system, u",
        ),
        (
            [{"from": "user", "value": "w1"}],
            SAID,
            "prompt: found a message of role None, expected one of system, user",
        ),
        ("w1", [{"role": "gpt", "content": "w2"}], "answer: found a message of role 'gpt', expected one of"),
        ([{"role": "user", "content": 3}], SAID, "prompt: found the content 3, expected a text or a list of parts"),
        (user("w1"), SAID, "prompt: found the part 'w1', expected {'type': 'text', 'text': ...} or {'type': 'image'}"),
        (user({"type": "video"}), SAID, "prompt: found the part {'type': 'video'}, expected {'type': 'text'"),
        (user({"text": "w1"}), SAID, "prompt: found the part {'text': 'w1'}, expected"),
        (user({"type": "text", "text": None}), SAID, "prompt: found the part {'type': 'text'}, expected"),
        (user({"type": "text", "text": 3}), SAID, "prompt: found the part {'type': 'text', 'text': 3}, expected"),
        (user(), SAID, "prompt: found an empty message of role 'user', expected a text"),
        ([{"role": "user"}], SAID, "prompt: found an empty message of role 'user', expected a text"),
        ("w1", "", "answer: found an empty message of role 'assistant', expected a text"),
        (
            "w1",
            [{"role": "assistant", "content": " \n"}],
            "answer: found an empty message of role 'assistant', expected",
        ),
        (
            "w1",
            "w2 <image> w3",
            "answer: found <image> in the text 'w2 <image> w3', expected none; an image is a part",
        ),
        ("<image>\nw1", SAID, r"prompt: found <image> in the text '<image>\\nw1', expected none; an image is a part"),
        ("w1", question("w2"), "answer: found .*'user'.*, expected the assistant's, in text alone"),
        (
            "w1",
            [{"role": "assistant", "content": [{"type": "image"}]}],
            "answer: found .*, expected the assistant's, in t",
        ),
        (
            [*question("w1"), {"role": "system", "content": "w2"}],
            SAID,
            "prompt: found a last message of role 'system', expected a question",
        ),
    ],
)
def test_what_is_no_conversation_is_one_sentence(processor, prompt, answer, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}") as error:
        render(processor, prompt, [answer])
    assert "\n" not in str(error.value)


def test_the_processors_own_image_token_is_no_text(processor, monkeypatch):
    monkeypatch.setattr(processor, "image_token", "w9")
    with pytest.raises(ValueError, match=r"^answer: found <image> in the text"):
        render(processor, "w1", ["<image>"])
    for prompt, answer, name in (("w9", "w2", "prompt"), ("w1", "w9", "answer")):
        with pytest.raises(ValueError, match=f"^{name}: found w9 in the text 'w9', expected none"):
            render(processor, prompt, [answer])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages[0].content + 1 }}", "can only concatenate list"),
        ("{{ messages[7].content }}", "has no element 7"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_a_template_that_fails_is_one_sentence(processor, template, reason):
    with pytest.raises(
        ValueError, match=rf"^chat template: found a conversation .*{reason}.*, expected one of the mod"
    ):
        render(processor, "w1", template_options={"chat_template": template})


def test_placeholders_and_images_that_differ_are_named(processor):
    with pytest.raises(ValueError, match=r"^prompt: found 1 image placeholders for 2 images in .*, expected as many;"):
        render(processor, question("w1"), num_images=2)
