"""The decoding loop against transformers' own `generate`, and answers that no batch changes."""

import random

import pytest
import torch
from PIL import Image
from tiny_families import EXACT, REFUSED
from tiny_models import SPECIAL

from bpo_fast.answers import decode as loop
from bpo_fast.answers.generate import GenerationSettings, generate
from bpo_fast.answers.plain import decodes_alike
from bpo_fast.answers.prompts import Prompts
from bpo_fast.demo import world
from bpo_fast.demo.tiny_llava import CHECKPOINT
from bpo_fast.models.load import load_model, load_processor
from bpo_fast.models.weakened_features import ImageNoise
from bpo_fast.ops.noise.schedule import NoiseSchedule

QUESTIONS = ["w1 w2 w3 w4 w5", "w6", "w7 w8 w9"]
LENGTH = 20  # more than the cache's room


def make_images():
    """Of several sizes, so that tiling families cut them into one or more tiles."""
    sizes = [(16, 16), (40, 24), (24, 48)]
    return [Image.frombytes("RGB", (w, h), random.Random(n).randbytes(3 * w * h)) for n, (w, h) in enumerate(sizes)]


def without_specials(model):
    """The model, kept from leaving out a token or asking for an image; it ends an answer where it likes."""
    model.get_output_embeddings().weight.data[: len(SPECIAL)] = 0
    return model


def own_answers(model, processor, images):
    """Of each question alone, by the model's own `generate` with pixels."""
    answers = []
    for image, question in zip(images, QUESTIONS, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=[text], images=[[image]], return_tensors="pt", add_special_tokens=False)
        tokens = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False, pad_token_id=0)
        tokens = tokens[0, inputs["input_ids"].shape[1] :].tolist()
        answers.append(processor.tokenizer.decode(tokens, skip_special_tokens=True).strip())
    return answers


@pytest.mark.parametrize("family", EXACT)
def test_every_exact_family_answers_in_the_loop_as_its_own_generate_does(family):
    model, processor = EXACT[family]()
    without_specials(model)
    images = make_images()
    expected = own_answers(model, processor, images)
    assert decodes_alike(Prompts.of(model, processor, QUESTIONS, images))
    responses = generate(model, processor, images, QUESTIONS, GenerationSettings(LENGTH))
    assert [response.text for response in responses] == expected
    assert len(set(expected)) == 3


@pytest.mark.parametrize("family", ["Qwen2-VL", "Qwen3-VL", "Gemma 3", "LLaVA over Lfm2"])
def test_a_family_that_needs_more_answers_by_its_own_generate(family):
    model, processor = REFUSED[family][0]()
    without_specials(model)
    images = make_images()
    assert not decodes_alike(Prompts.of(model, processor, QUESTIONS, images))
    responses = generate(model, processor, images, QUESTIONS, GenerationSettings(LENGTH))
    assert [response.text for response in responses] == own_answers(model, processor, images)


def test_rows_that_end_are_dropped_and_the_others_go_on(tiny_llava, monkeypatch):
    model, processor = tiny_llava
    without_specials(model)
    images = make_images()
    answers = own_answers(model, processor, images)
    # A word that one answer has soon, one late and one never ends them.
    words = answers[0].split()
    (end,) = processor.tokenizer.convert_tokens_to_ids([words[3]])
    model.generation_config.eos_token_id = end
    kept, keep = [], loop.Decoder.keep

    def spy(decoder, rows):
        assert not decoder.logits.requires_grad
        kept.append(rows.tolist())
        keep(decoder, rows)

    monkeypatch.setattr(loop.Decoder, "keep", spy)
    monkeypatch.setattr(loop, "ROOM", 4)
    expected = own_answers(model, processor, images)
    responses = generate(model, processor, images, QUESTIONS, GenerationSettings(LENGTH))
    assert [response.text for response in responses] == expected
    assert not responses[0].truncated
    assert any(response.truncated for response in responses)
    assert kept[0]
    assert 0 not in kept[0]


DECODINGS = {
    "greedy": GenerationSettings(32),
    "sampled": GenerationSettings(32, do_sample=True),
    "nucleus": GenerationSettings(32, do_sample=True, temperature=1.3, top_p=0.8),
}


@pytest.fixture(scope="module")
def demo():
    model = load_model(CHECKPOINT, dtype=torch.float32, device="cpu").eval()
    rng = random.Random(0)
    rows = [world.sample_conversation(rng, 0.5) for _ in range(16)]
    return (
        model,
        load_processor(CHECKPOINT),
        [world.draw(scene) for scene, _, _ in rows],
        [text for _, text, _ in rows],
    )


def answers_of(demo, order, size, decoding, steps=(600, 900)):
    """{sample: its answers}, asked in `order` in batches of `size`."""
    model, processor, images, questions = demo
    found = {}
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        noise = ImageNoise(steps, batch, NoiseSchedule.sigmoid(), seed=1)
        shown, asked = [images[n] for n in batch], [questions[n] for n in batch]
        seeds = [100 * n + step for n in batch for step in steps]
        responses = generate(model, processor, shown, asked, decoding, seeds=seeds, noise=noise)
        found |= {n: responses[len(steps) * k : len(steps) * (k + 1)] for k, n in enumerate(batch)}
    return found


@pytest.mark.parametrize("decoding", DECODINGS.values(), ids=DECODINGS)
def test_batch_size_and_order_change_no_answer(demo, decoding):
    order = list(range(16))
    whole = answers_of(demo, order, 16, decoding)
    assert len({response.text for responses in whole.values() for response in responses}) > 8
    assert answers_of(demo, order[::-1], 4, decoding) == whole
    assert answers_of(demo, order[:6], 1, decoding) == {n: whole[n] for n in range(6)}


@pytest.mark.parametrize("decoding", DECODINGS.values(), ids=DECODINGS)
def test_rounding_that_goes_with_the_batch_changes_no_answer(demo, decoding, monkeypatch):
    """Pairs of words that the head cannot tell apart, and logits off by what a batch's shape does to them."""
    model, *_ = demo
    weight = model.lm_head.weight
    twins = weight.data.clone()
    twins[1::2] = twins[:-1:2]
    monkeypatch.setattr(weight, "data", twins)

    def off(module, arguments, output):
        rows = len(output)
        if rows > 1:
            generator = torch.Generator().manual_seed(rows)
            output += 5e-6 * torch.randn(output.shape, generator=generator)

    handle = model.lm_head.register_forward_hook(off)
    try:
        order = list(range(8))
        whole = answers_of(demo, order, 8, decoding)
        assert answers_of(demo, order, 3, decoding) == whole
        assert answers_of(demo, order[:3], 1, decoding) == {n: whole[n] for n in range(3)}
    finally:
        handle.remove()
