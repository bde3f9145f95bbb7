"""Which model families pass the start check and which it refuses, on tiny random models of every one."""

import re

import pytest
import torch
from tiny_families import EXACT, REFUSED, make_examples

from bpo_fast.models.packed_forward import enable_packed_forward, image_features
from bpo_fast.models.prompt import render
from bpo_fast.train.collator import PreferenceCollator
from bpo_fast.train.start_check import check_packed_forward

TYPES = [torch.float32, torch.float16, torch.bfloat16]


def collator_of(model, processor, **options):
    return PreferenceCollator(processor, image_token_id=model.config.image_token_id, **options)


def refusal(model, processor, examples):
    """The sentence and the nats in it."""
    with pytest.raises(ValueError, match=r"^model: found .*; use a family that docs/models.md lists\.$") as raised:
        check_packed_forward(model, collator_of(model, processor), examples)
    return str(raised.value), float(re.search(r"by ([\d.e+-]+) nats", str(raised.value))[1])


def whole_logps(model, processor, examples):
    """Log-probs of the answers, each conversation one text that the processor reads with its own image."""
    found = []
    for example in examples:
        prompt, answers = render(processor, example["prompt"], [example["chosen"], example["rejected"]])
        for answer in answers:
            inputs = processor(
                text=[prompt + answer], images=[example["images"]], return_tensors="pt", add_special_tokens=False
            )
            length = len(processor.tokenizer(answer, add_special_tokens=False)["input_ids"])
            ids = inputs["input_ids"][0, -length:]
            logps = model(**inputs).logits[0, -length - 1 : -1].log_softmax(-1)
            found.append(logps.gather(1, ids[:, None])[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("family", EXACT)
@torch.no_grad()
def test_exact_families_equal_their_own_forward(family):
    model, processor = EXACT[family]()
    examples = make_examples()
    expected = whole_logps(model, processor, examples)
    enable_packed_forward(model)
    (sequence,) = collator_of(model, processor)(examples)["sequences"]
    features = image_features(model, sequence.image_inputs)
    ours = model(packing=sequence.packing, image_features=features, image_rows=sequence.image_rows).token_logps
    assert (ours - expected).abs().max() < 2e-5
    without = model(packing=sequence.packing, image_features=0 * features, image_rows=sequence.image_rows).token_logps
    assert (without - expected).abs().mean() > 0.01  # the images matter


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("family", EXACT)
def test_exact_families_pass_in_every_precision(family, dtype):
    model, processor = EXACT[family]()
    model = model.to(dtype)
    figure = check_packed_forward(model, collator_of(model, processor), make_examples(seed=1))
    assert figure < {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]


@pytest.mark.parametrize("family", REFUSED)
def test_other_families_are_refused_by_name_and_size(family):
    make, model_class, decoder_class = REFUSED[family]
    model, processor = make()
    assert (type(model).__name__, type(model.get_decoder()).__name__) == (model_class, decoder_class)
    sentence, nats = refusal(model, processor, make_examples())
    assert f"found {model_class} over {decoder_class}, " in sentence
    assert nats > 0.05
    assert refusal(model, processor, make_examples())[0] == sentence  # the first refusal leaves the model as it was


@pytest.mark.parametrize("family", REFUSED)
def test_other_families_are_refused_in_half_precision_with_small_weights(family):
    make, *_ = REFUSED[family]
    model, processor = make(initializer_range=0.05)
    assert refusal(model.to(torch.bfloat16), processor, make_examples())[1] > 0


def test_convolutions_are_refused_however_small_their_weights():
    make, *_ = REFUSED["LLaVA over FalconH1"]
    model, processor = make(initializer_range=1e-3)
    sentence, nats = refusal(model, processor, make_examples())
    assert "over FalconH1Model, whose layers have convolutions over tokens, and whose log-probs" in sentence
    assert nats < 1e-5


@pytest.mark.parametrize("family", ["Qwen2-VL", "Gemma 3", "GLM-4V"])
def test_a_first_batch_without_images_hides_nothing(family):
    make, *_ = REFUSED[family]
    model, processor = make()
    examples = [example | {"images": []} for example in make_examples()]
    for example in examples:
        example["prompt"] = [{"role": "user", "content": example["prompt"][0]["content"][1:]}]
    assert refusal(model, processor, examples)[1] > 0.02
