"""The packed forward against transformers' own forward: unshared, padded, with gradients; loading and LoRA targets."""

import pytest
import torch
from packed_models import IMAGE, apart_logps, gradients, packed_logps, padded_logps, random_groups, relative, with_lora
from tiny_models import VOCAB_SIZE, make_llava
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from bpo_fast.models.load import load_model, load_processor
from bpo_fast.models.packed_forward import enable_packed_forward
from bpo_fast.models.packing import Group, pack


@pytest.mark.parametrize("num_branches", [1, 2, 5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shared_equals_unshared_equals_padded(num_branches, seed):
    model, groups = with_lora(make_llava(seed)), random_groups(seed, num_branches)
    pixels = torch.randn(len(groups), 3, 16, 16)
    ours = packed_logps(model, groups, pixels)
    ours_grad = gradients(model, ours)
    for other in (
        padded_logps(model, groups, pixels),
        padded_logps(model, groups, pixels, side="left"),
        apart_logps(model, groups, pixels),
    ):
        assert relative(ours, other) < 1e-5
        assert relative(ours_grad, gradients(model, other)) < 1e-5


def test_groups_may_come_in_any_order():
    model, groups = with_lora(make_llava()), random_groups(3, 2, count=4)
    pixels = torch.randn(4, 3, 16, 16)
    order = [2, 0, 3, 1]
    ours = packed_logps(model, groups, pixels).view(4, 2)
    moved = packed_logps(model, [groups[n] for n in order], pixels[order]).view(4, 2)
    assert relative(moved, ours[order]) < 1e-6


@pytest.mark.parametrize("text_config", [MistralConfig, Qwen2Config, Qwen3Config], ids=lambda c: c.model_type)
def test_other_language_models(text_config):
    config = make_llava().config
    config.text_config = text_config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model, groups = with_lora(LlavaForConditionalGeneration(config).eval()), random_groups(6, 2)
    pixels = torch.randn(len(groups), 3, 16, 16)
    assert relative(packed_logps(model, groups, pixels), padded_logps(model, groups, pixels)) < 1e-5


def test_checkpointed_activations_change_nothing():
    model, groups = with_lora(make_llava()).train(), random_groups(4, 2)
    pixels = torch.randn(3, 3, 16, 16)
    expected = gradients(model, packed_logps(model, groups, pixels))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert torch.equal(gradients(model, packed_logps(model, groups, pixels)), expected)


def test_a_text_model_needs_no_images():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    )
    enable_packed_forward(model)
    packing = pack([Group([1, 2, 3], [[4, 5], [6]])])
    ours = model(packing=packing).token_logps
    logps = [model(torch.tensor([ids])).logits[0].log_softmax(-1) for ids in ([1, 2, 3, 4], [1, 2, 3])]
    expected = torch.stack([logps[0][2, 4], logps[0][3, 5], logps[1][2, 6]])
    torch.testing.assert_close(ours, expected)


def test_generation_is_unchanged(tiny_llava):
    model, _ = tiny_llava
    inputs = {
        "input_ids": torch.tensor([[1, IMAGE, IMAGE, IMAGE, IMAGE, 9, 8]]),
        "attention_mask": torch.ones(1, 7, dtype=torch.long),
        "pixel_values": torch.randn(1, 3, 16, 16),
    }
    before = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    enable_packed_forward(model)
    enable_packed_forward(model)  # a second call finds it done
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), before)


def test_image_rows_that_do_not_match_are_named():
    model, groups = with_lora(make_llava()), random_groups(0, 2, count=1)
    with pytest.raises(ValueError, match=r"image_features: found 8 rows for 4 image tokens"):
        packed_logps(model, groups, torch.randn(2, 3, 16, 16))


def test_scaled_logits_are_refused(tiny_llava):
    model, _ = tiny_llava
    model.config.text_config.logit_scale = 0.5
    with pytest.raises(ValueError, match="logits scaled by its config's logit_scale"):
        enable_packed_forward(model)


def test_saved_and_loaded_again(tmp_path, tiny_llava):
    model, processor = tiny_llava
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    adapted = with_lora(model)
    adapted.save_pretrained(tmp_path / "adapter")
    groups, pixels = random_groups(5, 2), torch.randn(3, 3, 16, 16)
    expected = packed_logps(adapted, groups, pixels)
    loaded = load_model(tmp_path / "model", adapter=tmp_path / "adapter", device="cpu")
    enable_packed_forward(loaded.get_base_model())
    assert not loaded.training
    assert torch.equal(packed_logps(loaded, groups, pixels), expected)
    assert load_processor(tmp_path / "model").chat_template == processor.chat_template
