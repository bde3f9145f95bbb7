"""Every layer of a decoder must compute with the packing, as far as its windows and positions reach."""

import pytest
import torch
from tiny_families import REFUSED, llava

from bpo_fast.models.packed_forward import PackingNotSeenError, enable_packed_forward, unpacked_forward
from bpo_fast.models.packing import Group, pack

PACKING = pack([Group([1, 9, 8, 7], [[10, 11], [12]]), Group([1, 9], [[13, 14]])])


def packed(model):
    enable_packed_forward(model)
    return model(packing=PACKING).token_logps


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("LLaVA over StableLM", "StableLmModel, whose attention was called 2 times without the packing"),
        ("LLaVA over Nemotron", "NemotronModel, whose attention was called 2 times without the packing"),
        ("LLaVA over Lfm2", "Lfm2Model, which called attention 1 times in 2 layers"),
        ("Qwen3.5", "Qwen3_5TextModel, which called attention 1 times in 2 layers"),
        ("LLaVA over GPT-OSS", "GptOssModel, whose attention takes s_aux, which packed attention does not compute"),
    ],
)
def test_layers_without_the_packing_are_refused(family, reason):
    model, _ = REFUSED[family][0]()
    with pytest.raises(
        PackingNotSeenError, match=f"model: found {reason}, expected the packing in every layer"
    ) as seen:
        packed(model)
    assert seen.value.token_logps.shape == (5,)


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_are_computed_again_in_the_backward_pass_are_counted_once(reentrant):
    model, _ = llava()
    model.train().enable_input_require_grads()
    expected = packed(model)
    expected.sum().backward()
    gradient = model.lm_head.weight.grad.clone()
    weight = model.get_decoder().layers[0].self_attn.q_proj.weight
    first = weight.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for _ in range(2):
        model.zero_grad()
        logps = packed(model)
        assert torch.equal(logps, expected)
        logps.sum().backward()
    assert torch.equal(model.lm_head.weight.grad, gradient)
    torch.testing.assert_close(weight.grad, first)


def rotary(kind, **more):
    return {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0} | more


@pytest.mark.parametrize(
    ("text", "options", "name"),
    [
        ("MistralConfig", {"sliding_window": 5}, "sliding_window"),
        # The window of these is in the mask alone.
        ("PhimoeConfig", {"sliding_window": 5, "num_local_experts": 2}, "sliding_window"),
        ("LlamaConfig", {"layer_types": ["full_attention", "chunked_attention"]}, "attention_chunk_size"),
        (
            "LlamaConfig",
            {"rope_parameters": rotary("dynamic"), "max_position_embeddings": 5},
            "max_position_embeddings",
        ),
        (
            "LlamaConfig",
            {
                "rope_parameters": rotary(
                    "longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=5
                )
            },
            "original_max_position_embeddings",
        ),
    ],
)
def test_sequences_beyond_a_reach_are_refused(text, options, name):
    model, _ = llava(text, **options)
    if name == "attention_chunk_size":
        model.get_decoder().config.attention_chunk_size = 5
    with pytest.raises(ValueError, match=f"^{name}: found 5, expected None or at least the 6 positions"):
        packed(model)


def test_a_window_that_no_layer_has_is_no_bound():
    model, _ = llava("Qwen2Config", layer_types=["full_attention"] * 2)
    model.get_decoder().config.sliding_window = 3
    assert packed(model).shape == (5,)


def test_the_unpacked_forward_has_the_attention_that_the_model_was_loaded_with():
    model, _ = llava()
    model.get_decoder().set_attn_implementation("eager")
    ids = torch.tensor([[1, 9, 8, 7]])
    expected = model(ids, output_attentions=True)
    enable_packed_forward(model)
    with unpacked_forward(model) as forward:
        found = forward(ids, output_attentions=True)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(torch.stack(found.attentions), torch.stack(expected.attentions))
    assert model.get_decoder().config._attn_implementation == "bpo_fast_packed"
