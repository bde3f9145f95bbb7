"""The fingerprint of a loaded model: every value counts, an adapter and a device do not."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from tiny_models import make_llava

from bpo_fast.models.load import load_model
from bpo_fast.models.tensors import tensors_fingerprint
from bpo_fast.models.weights import model_fingerprint


def changed(name, number):
    model = make_llava()
    values = model.get_parameter(name).data.view(-1)
    values[number] = torch.nextafter(values[number], values.new_tensor(9.0))
    return model


def test_the_last_bit_of_any_value_counts():
    expected = tensors_fingerprint(make_llava())
    assert tensors_fingerprint(make_llava()) == expected
    seen = {expected}
    for name in ("lm_head.weight", "model.vision_tower.encoder.layers.1.mlp.fc1.weight"):
        for number in (0, 1, 7, 301, 767):
            seen.add(tensors_fingerprint(changed(name, number)))
    assert len(seen) == 11
    # Sampled values, by which runs tell models apart, do not show such a change.
    assert model_fingerprint(changed("lm_head.weight", 301)) == model_fingerprint(make_llava())


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.half(),
        lambda model: setattr(model.config.text_config, "rms_norm_eps", 1e-3),
        lambda model: setattr(model.config, "vision_feature_layer", -1),
        lambda model: model.model.language_model.rotary_emb.inv_freq.mul_(2),
        lambda model: model.get_decoder().register_buffer("more", torch.zeros(1)),
    ],
    ids=["type", "configuration", "vision layer", "buffer", "another buffer"],
)
def test_types_configuration_and_buffers_count(change):
    model = make_llava()
    change(model)
    assert tensors_fingerprint(model) != tensors_fingerprint(make_llava())


def test_an_adapter_does_not_count_whatever_it_holds_until_it_is_merged():
    expected = tensors_fingerprint(make_llava())
    for seed, options in [
        (0, {}),
        (1, {"r": 2, "target_modules": ["q_proj", "up_proj"], "modules_to_save": ["norm"]}),
    ]:
        torch.manual_seed(seed)
        config = LoraConfig(**{"r": 4, "target_modules": r".*language_model.*(q|v)_proj"} | options)
        model = get_peft_model(make_llava(), config)
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.data.normal_()
        assert tensors_fingerprint(model) == expected
        assert tensors_fingerprint(model.merge_and_unload()) != expected


def test_where_a_model_lies_and_what_a_trainer_sets_do_not_count(tmp_path):
    model = make_llava()
    model.save_pretrained(tmp_path / "a")
    loaded = load_model(tmp_path / "a", device="cpu")
    loaded.config.use_cache, loaded.config.pad_token_id = False, 5
    assert tensors_fingerprint(loaded) == tensors_fingerprint(model)


def test_the_scales_of_4_bit_weights_count(tmp_path):
    make_llava(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)

    def quantised():
        return load_model(tmp_path, device="cpu", quantization="nf4", dtype=torch.bfloat16)

    expected = tensors_fingerprint(quantised())
    assert tensors_fingerprint(quantised()) == expected
    model = quantised()
    (linear, *_) = [part for part in model.modules() if isinstance(part, Linear4bit)]
    linear.weight.quant_state.absmax[0] += 1
    assert tensors_fingerprint(model) != expected
