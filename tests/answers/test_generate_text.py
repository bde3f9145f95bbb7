"""Answers without images: every family's language model alone, as a forward pass a token gives them."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from tiny_families import EXACT
from tiny_models import SPECIAL, make_llava, make_processor

from bpo_fast.answers.generate import GenerationSettings, Response, generate_text
from bpo_fast.models.load import load_model

PROMPTS = ["w1 w2 w3 w4 w5", "w6", "w7 w8 w9"]


def by_hand(model, processor, prompt, length):
    """Greedy answer to one unpadded prompt, a whole forward pass a token."""
    content = [{"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    tokens = []
    while len(tokens) < length:
        with torch.no_grad():
            tokens.append(int(model(input_ids=ids).logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([[tokens[-1]]])], dim=1)
    return processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def without_specials(model):
    """The model, kept from ending or leaving out an answer."""
    model.get_output_embeddings().weight.data[: len(SPECIAL)] = 0
    return model


@pytest.mark.parametrize("family", EXACT)
def test_a_batch_is_answered_as_each_prompt_alone_and_no_image_is_looked_for(family, monkeypatch):
    model, processor = EXACT[family]()
    without_specials(model)
    expected = [Response(by_hand(model, processor, prompt, 5), True) for prompt in PROMPTS]
    assert len({response.text for response in expected}) > 1
    monkeypatch.setattr(model.model, "get_image_features", lambda *_, **__: pytest.fail("looked at an image"))
    assert generate_text(model, processor, PROMPTS, GenerationSettings(5)) == expected


def test_an_adapter_answers_and_its_model_alone_otherwise(tiny_llava):
    model, processor = tiny_llava
    without_specials(model)
    plain = generate_text(model, processor, PROMPTS, GenerationSettings(5))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    expected = [Response(by_hand(adapted, processor, prompt, 5), True) for prompt in PROMPTS]
    assert generate_text(adapted, processor, PROMPTS, GenerationSettings(5)) == expected != plain


def test_a_model_of_4_bits_answers(tmp_path):
    saved = without_specials(make_llava(hidden_size=64, intermediate_size=64))  # blocks of 64 weights
    saved.save_pretrained(tmp_path)
    model, processor = load_model(tmp_path, device="cpu", dtype=torch.float32, quantization="nf4"), make_processor()
    assert isinstance(model.model.language_model.layers[0].mlp.up_proj, Linear4bit)
    expected = [Response(by_hand(model, processor, prompt, 5), True) for prompt in PROMPTS]
    assert generate_text(model, processor, PROMPTS, GenerationSettings(5)) == expected


def test_a_drawn_answer_depends_on_its_seed_alone(tiny_llava):
    model, processor = tiny_llava
    settings = GenerationSettings(8, do_sample=True, temperature=2.0)
    batch = generate_text(model, processor, PROMPTS, settings, seeds=[7, 8, 9])
    for number in (2, 0, 1):
        assert generate_text(model, processor, [PROMPTS[number]], settings, seeds=[7 + number]) == [batch[number]]
    assert generate_text(model, processor, PROMPTS, settings, seeds=[10, 11, 12]) != batch


def test_turns_are_given_as_messages(tiny_llava):
    model, processor = tiny_llava
    turns = [("user", "w1"), ("assistant", "w2"), ("user", "w3")]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    (response,) = generate_text(without_specials(model), processor, [messages], GenerationSettings(5))
    ids = processor.tokenizer("<s> USER: w1 ASSISTANT: w2 </s> USER: w3 ASSISTANT:", add_special_tokens=False)
    tokens = model.generate(
        input_ids=torch.tensor([ids["input_ids"]]), max_new_tokens=5, do_sample=False, pad_token_id=0
    )[0, len(ids["input_ids"]) :]
    assert response.text == processor.tokenizer.decode(tokens)
