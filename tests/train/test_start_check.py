"""The start check itself: what it compares, what it refuses, and that it leaves the model and the run as they were."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_families import REFUSED, llava, make_examples
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bpo_fast.models import packed_forward
from bpo_fast.models.attention import ATTENTION_NAME
from bpo_fast.models.lora import restrict_to_decoder
from bpo_fast.models.rounding import tolerance
from bpo_fast.train import start_check
from bpo_fast.train.collator import PreferenceCollator
from bpo_fast.train.start_check import check_packed_forward


def sharp_attention(module, query, key, value, attention_mask, *, scaling, **kwargs):
    """Attention whose scores are doubled: exact in itself, and not what packed attention computes."""
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=2 * scaling, **kwargs)


AttentionInterface.register("sharp", sharp_attention)
AttentionMaskInterface.register("sharp", sdpa_mask)


@pytest.fixture
def parts():
    """(model, collator, examples) that pass."""
    model, processor = llava()
    return model, PreferenceCollator(processor, image_token_id=4), make_examples()


def with_lora(model, dropout=0.0):
    return get_peft_model(model, restrict_to_decoder(LoraConfig(r=4, lora_dropout=dropout), model))


def test_a_fresh_adapter_in_training_mode_passes_and_all_stays_as_it_was(parts):
    base, collator, examples = parts
    model = with_lora(base, dropout=0.5).train()
    base.model.vision_tower.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    weights = {name: (p.data_ptr(), p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    random_state = torch.get_rng_state()
    assert check_packed_forward(model, collator, examples) < 1e-6
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: (p.data_ptr(), p.dtype, p.requires_grad) for name, p in model.named_parameters()} == weights
    assert torch.equal(torch.get_rng_state(), random_state)
    assert base.get_decoder().config._attn_implementation == ATTENTION_NAME
    assert torch.is_grad_enabled()


def test_a_refusal_leaves_all_as_it_was(parts):
    model, collator, examples = parts
    model = model.to(torch.bfloat16).train()
    model.lm_head.weight.data[7] = torch.nan
    weight = model.lm_head.weight.data_ptr()
    with pytest.raises(ValueError, match="by nan nats"):
        check_packed_forward(model, collator, examples)
    assert model.lm_head.weight.data_ptr() == weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(module.training for module in model.modules())
    assert model.get_decoder().config._attn_implementation == ATTENTION_NAME


def two_images(example):
    prompt = [{"role": "user", "content": [{"type": "image"}, *example["prompt"][0]["content"]]}]
    return example | {"images": example["images"] * 2, "prompt": prompt}


@pytest.mark.parametrize(
    ("options", "examples"),
    [
        ({"responses": ("chosen",)}, make_examples()),
        ({"token_budget": 40}, make_examples()),
        ({"max_length": 16}, make_examples(seed=2)),
        ({}, make_examples(1)),
        ({}, make_examples(7)),
        ({}, [two_images(example) for example in make_examples()]),
    ],
    ids=["SFT", "token budget", "cut answers", "one example", "many examples", "two images"],
)
def test_every_form_of_batch_passes(parts, options, examples):
    model, collator, _ = parts
    assert check_packed_forward(model, replace(collator, **options), examples) < 1e-6


def test_prompts_without_images_pass(parts):
    model, collator, examples = parts
    text = [{"role": "user", "content": [{"type": "text", "text": "w1 w2 w3"}]}]
    examples = [example | {"prompt": text, "images": []} for example in examples]
    assert check_packed_forward(model, collator, examples) < 1e-6


def shifted(packing):
    return packing.position_ids + 1 * (packing.position_ids > packing.prefix_lengths[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_position_is_seen(parts, monkeypatch, dtype):
    model, collator, examples = parts
    right = packed_forward._packed_forward

    def wrong(model, packing, *args):
        object.__setattr__(packing, "position_ids", shifted(packing))
        return right(model, packing, *args)

    check_packed_forward(model.to(dtype), collator, examples)
    monkeypatch.setattr(packed_forward, "_packed_forward", wrong)
    with pytest.raises(ValueError, match=r"found LlavaForConditionalGeneration over LlamaModel, whose log-probs on"):
        check_packed_forward(model, collator, examples)


def test_images_in_the_wrong_order_are_seen(parts, monkeypatch):
    model, collator, examples = parts
    monkeypatch.setattr(start_check, "image_features", lambda *args: packed_forward.image_features(*args).flip(0))
    with pytest.raises(ValueError, match="nats a token on average"):
        check_packed_forward(model, collator, examples)


def test_the_model_is_compared_with_the_attention_it_was_loaded_with(parts):
    model, collator, examples = parts
    model.get_decoder().set_attn_implementation("eager")
    assert check_packed_forward(model, collator, examples) < 1e-6
    sharp, _ = llava()
    sharp.get_decoder().set_attn_implementation("sharp")
    with pytest.raises(ValueError, match="nats a token on average"):
        check_packed_forward(sharp, collator, examples)


@pytest.mark.parametrize("error", [AttributeError, TypeError, RuntimeError, KeyError, ValueError])
@pytest.mark.parametrize("method", ["get_image_features", "_unpacked_forward"])
def test_a_forward_that_crashes_is_a_sentence(parts, monkeypatch, method, error):
    model, collator, examples = parts
    packed_forward.enable_packed_forward(model)

    def crash(*args, **kwargs):
        raise error("no 3-D positions\nand more.")

    monkeypatch.setattr(model, method, crash)
    what = "forward on packed sequences" if method == "get_image_features" else "own forward"
    with pytest.raises(ValueError, match=f"over LlamaModel, whose {what} fails .{error.__name__}: .*no 3-D positions"):
        check_packed_forward(model, collator, examples)


def test_memory_that_runs_out_is_not_blamed_on_the_family(parts, monkeypatch):
    model, collator, examples = parts

    def crash(**kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(model, "get_image_features", crash)
    with pytest.raises(torch.OutOfMemoryError):
        check_packed_forward(model, collator, examples)


def test_a_window_shorter_than_the_prompt_is_refused_with_the_class():
    model, processor = llava("MistralConfig", sliding_window=6)
    with pytest.raises(
        ValueError, match=r"over MistralModel, whose .* fails .ValueError: sliding_window: found 6, exp"
    ):
        check_packed_forward(model, PreferenceCollator(processor, 4), make_examples())


def test_a_large_model_is_judged_in_its_own_precision(monkeypatch):
    make, *_ = REFUSED["Qwen2-VL"]
    model, processor = make()
    monkeypatch.setattr(start_check, "FLOAT32_BYTES", 0)
    with pytest.raises(ValueError, match="in bfloat16; use a family"):
        check_packed_forward(
            model.to(torch.bfloat16), PreferenceCollator(processor, model.config.image_token_id), make_examples()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_tolerance_grows_with_rounding_alone(dtype):
    eps = torch.finfo(dtype).eps
    assert tolerance(eps, 0) == 1e-6
    assert tolerance(eps, 2.5) / tolerance(eps, 1.0) == pytest.approx(2.5, rel=0.05)
    assert 12 * eps < tolerance(eps, 1.0) < 12 * eps + 1e-4
