"""The adapter: on the decoder's linears alone, exactly zero before training, everything else refused."""

import copy

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny_models import make_llava
from transformers import LlamaConfig, LlavaForConditionalGeneration

from bpo_fast.models.lora import adapter_disabled, check_gradients, restrict_to_decoder, with_fresh_adapter
from bpo_fast.models.packed_forward import enable_packed_forward
from bpo_fast.models.packing import Group, pack

DECODER = r"model\.language_model\..*q_proj"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapted(model):
    """Paths of the linears with an adapter, in the base model."""
    return {
        name.removeprefix("base_model.model.").split(".lora_A")[0]
        for name, _ in model.named_parameters()
        if ".lora_A." in name
    }


def in_layers(names, layers=(0, 1)):
    place = {name: "self_attn" if name[0] in "qkvo" else "mlp" for name in LINEARS}
    return {f"model.language_model.layers.{n}.{place[name]}.{name}" for n in layers for name in names}


def own(adapter_name="default", **options):
    """A user's own PeftModel."""
    config = LoraConfig(**{"r": 2, "target_modules": DECODER} | options)
    return get_peft_model(make_llava(), config, adapter_name=adapter_name)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, in_layers(LINEARS)),
        ({"target_modules": ["q_proj", "up_proj"]}, in_layers(["q_proj", "up_proj"])),
        ({"target_modules": "all-linear"}, in_layers(LINEARS)),
        ({"target_modules": DECODER}, in_layers(["q_proj"])),
        ({"target_modules": ".*[qk]_proj", "exclude_modules": ".*vision.*"}, in_layers(["q_proj", "k_proj"])),
        ({"target_modules": ["layers.1.mlp.up_proj"]}, in_layers(["up_proj"], [1])),
        ({"target_modules": ["model.language_model.layers.0.self_attn.o_proj"]}, in_layers(["o_proj"], [0])),
        ({"exclude_modules": ["mlp.gate_proj", "q_proj"]}, in_layers(set(LINEARS) - {"gate_proj", "q_proj"})),
        ({"exclude_modules": r".*layers\.0\..*"}, in_layers(LINEARS, [1])),
        ({"layers_to_transform": [1]}, in_layers(LINEARS, [1])),
        ({"layers_to_transform": 0, "layers_pattern": "layers"}, in_layers(LINEARS, [0])),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 1]}, in_layers(["q_proj"])),
        ({"modules_to_save": ["language_model.layers.0.mlp"]}, in_layers(LINEARS) - in_layers(LINEARS[4:], [0])),
    ],
)
def test_the_adapter_is_on_just_what_the_options_name_in_the_decoder(options, expected, tmp_path):
    model = with_fresh_adapter(make_llava(), LoraConfig(r=2, **options))
    assert adapted(model) == expected
    # PEFT finds the same places from the saved configuration.
    config = model.peft_config["default"]
    config.save_pretrained(tmp_path)
    assert adapted(get_peft_model(make_llava(), LoraConfig.from_pretrained(tmp_path))) == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"init_lora_weights": "gaussian"},
        {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {r"layers\.0\..*": 3}},
        {"modules_to_save": ["language_model.norm", "input_layernorm"]},
        {"lora_dropout": 0.3},
    ],
)
def test_a_fresh_adapter_adds_exactly_zero_trains_and_gives_the_base_back(options):
    model = make_llava()
    enable_packed_forward(model)
    packing = pack([Group([7, 8, 9, 10], [[11, 12, 13], [14, 15]])])
    base = model(packing=packing).token_logps.detach()
    model = with_fresh_adapter(model, LoraConfig(r=2, **options)).eval()
    assert torch.equal(model(packing=packing).token_logps, base)
    model(packing=packing).token_logps.sum().backward()
    check_gradients(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.optim.SGD(trainable, lr=0.1).step()
    assert (model(packing=packing).token_logps - base).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(packing=packing).token_logps, base)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["language_model.norm", "input_layernorm"]}])
def test_a_disabled_adapter_is_pefts_to_the_bit_and_comes_back(options):
    model = with_fresh_adapter(make_llava(), LoraConfig(r=2, init_lora_weights="gaussian", **options)).eval()
    ids = torch.tensor([[7, 8, 9, 10]])

    def logits():
        with torch.no_grad():
            return model(input_ids=ids).logits

    fresh = logits()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    trained = logits()
    with model.disable_adapter():
        theirs = logits()
    assert torch.equal(theirs, fresh)
    assert not torch.equal(theirs, trained)
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    with adapter_disabled(model):
        assert torch.equal(logits(), theirs)
        with adapter_disabled(model):
            assert torch.equal(logits(), theirs)
        assert torch.equal(logits(), theirs)
    assert torch.equal(logits(), trained)
    with pytest.raises(KeyError), adapter_disabled(model):
        raise KeyError
    assert torch.equal(logits(), trained)
    with model.disable_adapter():
        with adapter_disabled(model):
            pass
        assert torch.equal(logits(), theirs)
    assert trainable == [parameter.requires_grad for parameter in model.parameters()]
    assert not any("_disable_adapters" in name for name in model.state_dict())


def test_a_copy_and_an_adapter_that_is_added_are_disabled_too():
    model = own(target_modules=DECODER, init_lora_weights=False).eval()
    ids = torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad(), adapter_disabled(model):
        base = model(input_ids=ids).logits
    other = LoraConfig(r=2, target_modules=DECODER.replace("q_proj", "up_proj"), init_lora_weights=False)
    model.add_adapter("other", other)
    model.set_adapter("other")
    for each in (model, copy.deepcopy(model)):
        with torch.no_grad():
            assert not torch.equal(each(input_ids=ids).logits, base)
            with adapter_disabled(each):
                assert torch.equal(each(input_ids=ids).logits, base)


def test_a_merged_adapter_is_taken_out_of_the_weights_where_it_is_disabled():
    model = own(init_lora_weights=False).eval()
    ids = torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad(), adapter_disabled(model):
        base = model(input_ids=ids).logits
    model.merge_adapter()
    with torch.no_grad(), adapter_disabled(model):
        torch.testing.assert_close(model(input_ids=ids).logits, base)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"target_modules": ["q_proj", "q_porj"]}, "target_modules: found 'q_porj', expected names of linears"),
        ({"target_modules": ["q_proj", "linear_1"]}, "target_modules: found 'linear_1'"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules: found 'lm_head'"),
        ({"target_modules": ["embed_tokens"]}, "target_modules: found 'embed_tokens'"),
        ({"target_modules": ["mlp"]}, "target_modules: found 'mlp'"),
        ({"target_modules": []}, r"target_modules: found \[\]"),
        (
            {"target_modules": ".*q_proj"},
            r"target_modules: found '.\*q_proj', which matches model.vision_tower.encoder",
        ),
        ({"target_modules": ".*linear_1|" + DECODER}, "which matches model.multi_modal_projector.linear_1, expected"),
        ({"target_modules": "lm_head|" + DECODER}, "which matches lm_head, expected linears in the layers"),
        ({"target_modules": ".*embed_tokens|" + DECODER}, "which matches model.language_model.embed_tokens, expected"),
        ({"target_modules": r".*language_model\.layers\.0"}, "which matches model.language_model.layers.0, expected"),
        ({"target_modules": "nothing"}, "target_modules: found 'nothing', expected names of modules of the model"),
        ({"target_modules": "("}, r"target_modules: found '\(', expected a regular expression; missing \)"),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
            r"found \['q_proj'\], of which exclude_modules",
        ),
        ({"exclude_modules": ["vision_towr"]}, "exclude_modules: found 'vision_towr', expected names of modules"),
        (
            {"modules_to_save": ["lm_head"]},
            "modules_to_save: found 'lm_head', expected names of modules in the layers",
        ),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save: found 'embed_tokens'"),
        ({"modules_to_save": ["multi_modal_projector"]}, "modules_to_save: found 'multi_modal_projector'"),
        ({"modules_to_save": ["norm"]}, r"modules_to_save: found \['norm'\], which matches model.vision_tower"),
        ({"modules_to_save": "norm"}, "modules_to_save: found 'norm', expected a list of names"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices: found \[3\], expected None"),
        ({"target_parameters": ["q_proj.weight"]}, "target_parameters: found .*, expected None"),
        ({"layers_to_transform": [0, 2]}, "layers_to_transform: found 2, expected numbers of layers"),
        ({"layers_to_transform": [0], "layers_pattern": "h"}, "layers_to_transform: found 0, expected"),
        ({"rank_pattern": {"q_porj": 4}}, "rank_pattern: found 'q_porj', expected the end of a target's name"),
        ({"alpha_pattern": {"lm_head": 4}}, "alpha_pattern: found 'lm_head', expected"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]: found 0, expected an integer of at least 1"),
        ({"r": 0}, "r: found 0, expected an integer of at least 1"),
        ({"lora_alpha": 0}, "lora_alpha: found 0, expected a finite number above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha: found nan"),
        ({"lora_dropout": 1.5}, "lora_dropout: found 1.5, expected a number of at least 0 and below 1"),
        ({"bias": "all"}, "bias: found 'all', expected 'none'"),
        ({"lora_bias": True}, "lora_bias: found True, expected False"),
        ({"use_dora": True}, "use_dora: found True, expected False"),
        ({"layer_replication": [(0, 2)]}, "layer_replication: found"),
        ({"task_type": "SEQ_CLS"}, "task_type: found 'SEQ_CLS', expected 'CAUSAL_LM' or None"),
        ({"inference_mode": True}, "model: found no trainable parameter"),
        *(
            ({"init_lora_weights": init}, f"init_lora_weights: found '?{init}'?, expected True or 'gaussian'")
            for init in (False, "pissa", "pissa_niter_4", "olora", "eva", "orthogonal", "mica")
        ),
    ],
)
def test_what_is_not_trained_exactly_is_refused_by_name(options, sentence):
    model = make_llava()
    config = LoraConfig(**{"r": 2} | options)
    before = [(name, weight.clone()) for name, weight in model.named_parameters()]
    with pytest.raises(ValueError, match=sentence):
        with_fresh_adapter(model, config)
    if options != {"inference_mode": True}:
        # The model is as it was: a corrected call can follow.
        assert [name for name, _ in before] == [name for name, _ in model.named_parameters()]
        assert all(torch.equal(weight, model.get_parameter(name)) for name, weight in before)


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, num_layers=2, token_dim=32),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        LoHaConfig(target_modules=["q_proj"]),
        {"r": 4},
    ],
)
def test_other_adapters_than_lora_are_refused(config):
    with pytest.raises(ValueError, match=rf"peft_config: found {type(config).__name__}, expected a LoraConfig"):
        with_fresh_adapter(make_llava(), config)


def test_a_users_own_prompt_tuning_is_refused():
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, num_layers=2, token_dim=32, num_attention_heads=4
    )
    with pytest.raises(ValueError, match="peft_config: found PromptTuningConfig, expected a LoraConfig"):
        with_fresh_adapter(get_peft_model(make_llava(), config), None)


@pytest.mark.parametrize("name", ["default", "another"])
def test_a_users_own_fresh_adapter_is_taken_and_a_trained_one_refused_whatever_its_name(name):
    model = own(name)
    assert with_fresh_adapter(model, None) is model
    next(weight for path, weight in model.named_parameters() if ".lora_B." in path).data.view(-1)[-1] = 1e-30
    with pytest.raises(ValueError, match=r"model: found an adapter that is trained already \(on .*q_proj\)"):
        with_fresh_adapter(model, None)


def test_a_whole_module_that_is_trained_already_is_refused():
    model = own(modules_to_save=["language_model.norm"])
    next(weight for path, weight in model.named_parameters() if ".modules_to_save." in path).data[0] += 1e-6
    with pytest.raises(ValueError, match=r"trained already \(on model.language_model.norm\)"):
        with_fresh_adapter(model, None)


def second_adapter(model):
    model.add_adapter("second", LoraConfig(r=2, target_modules=DECODER))


def thaw(model):
    model.get_base_model().lm_head.weight.requires_grad_(True)


def scale(model):
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] = 0.0


@pytest.mark.parametrize(
    ("options", "change", "sentence"),
    [
        (
            {"target_modules": ["q_proj"]},
            None,
            "found an adapter on model.vision_tower.encoder.layers.0.self_attn.q_proj",
        ),
        ({"target_modules": "lm_head|" + DECODER}, None, "found an adapter on lm_head, expected it on parts"),
        ({"target_modules": ".*embed_tokens"}, None, "found an adapter on model.language_model.embed_tokens"),
        ({"modules_to_save": ["multi_modal_projector"]}, None, "found an adapter on model.multi_modal_projector"),
        ({"modules_to_save": ["embed_tokens"]}, None, "found an adapter on model.language_model.embed_tokens"),
        ({"init_lora_weights": "pissa"}, None, "init_lora_weights: found 'pissa'"),
        ({"bias": "all"}, None, "bias: found 'all', expected 'none'"),
        (
            {"inference_mode": True},
            None,
            "found no trainable parameter, expected the adapter's; load it with is_trainable",
        ),
        ({}, second_adapter, r"model: found 2 adapters \(default, second\), expected one"),
        ({}, thaw, r"found 1 trainable parameters beside the adapter's \(base_model.model.lm_head.weight\)"),
        ({}, scale, r"the adapter on model.language_model.layers.0.self_attn.q_proj scaled by 0.0"),
        ({}, lambda model: model.base_model.disable_adapter_layers(), "model: found its adapter disabled or merged"),
        ({}, lambda model: model.merge_adapter(), "model: found its adapter disabled or merged"),
    ],
)
def test_a_users_own_adapter_that_reaches_further_is_refused(options, change, sentence):
    model = own(**options)
    if change is not None:
        change(model)
    with pytest.raises(ValueError, match=sentence):
        with_fresh_adapter(model, None)


def test_adapter_layers_without_peft_model_around_them_are_refused():
    model = make_llava()
    model.add_adapter(LoraConfig(r=2, target_modules=DECODER))
    with pytest.raises(ValueError, match=r"model: found adapter layers \(model.language_model.* in a LlavaForCond"):
        with_fresh_adapter(model, LoraConfig(r=2))


def test_default_targets_that_a_model_lacks_are_told(monkeypatch):
    model = make_llava()
    for layer in model.model.language_model.layers:
        layer.mlp.gate_up_proj = layer.mlp.gate_proj
        del layer.mlp.gate_proj
    with pytest.warns(UserWarning, match="target_modules: found no gate_proj in the layers of the language model"):
        restricted = restrict_to_decoder(LoraConfig(r=2), model)
    assert restricted.target_modules.endswith("(down_proj|k_proj|o_proj|q_proj|up_proj|v_proj)")


def test_a_parameter_that_no_gradient_reaches_is_named():
    model = with_fresh_adapter(make_llava(), LoraConfig(r=2, target_modules=["q_proj"]))
    named = dict(model.named_parameters())
    names = [name for name in named if "lora" in name]
    for name in names[1:]:
        named[name].grad = torch.zeros_like(named[name])
    with pytest.raises(ValueError, match=rf"found 1 trainable parameters without a gradient \({names[0]}\)"):
        check_gradients(model)


def test_tied_embeddings_are_refused_too():
    config = make_llava().config
    config.text_config = LlamaConfig(**config.text_config.to_dict() | {"tie_word_embeddings": True})
    config.tie_word_embeddings = True
    model = LlavaForConditionalGeneration(config)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    for targets in ("lm_head", ".*embed_tokens"):
        with pytest.raises(ValueError, match=r"target_modules: found .*, which matches"):
            with_fresh_adapter(model, LoraConfig(r=2, target_modules=f"{targets}|{DECODER}"))
