"""Loading: one sentence for each kind of damage, and nothing left as it was initialised."""

import json
import pickle
import shutil

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_families import EXACT
from tiny_models import make_llava, make_processor
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from bpo_fast.models.load import load_model, load_processor

DECODER = r".*language_model.*q_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, an adapter of it, and one of a model with more layers; not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    make_llava().save_pretrained(folder / "model")
    make_processor().save_pretrained(folder / "model")
    config = LoraConfig(r=2, target_modules=DECODER, init_lora_weights=False)
    for name, layers in [("adapter", 2), ("deeper", 3)]:
        get_peft_model(make_llava(num_hidden_layers=layers), config).save_pretrained(folder / name)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to change."""
    return shutil.copytree(saved, tmp_path, dirs_exist_ok=True)


def edit(file, **changes):
    """Change a JSON object; a value of None takes the key away."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def tensors(file, change):
    """Rewrite a file of weights with what `change` makes of them."""
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def without(part):
    return lambda weights: {name: weight for name, weight in weights.items() if part not in name}


def renamed(old, new):
    return lambda weights: {name.replace(old, new): weight for name, weight in weights.items()}


def resized(part):
    return lambda weights: {name: weight[:-1].clone() if part in name else weight for name, weight in weights.items()}


def pickled(file):
    with file.with_suffix(".bin").open("wb") as opened:
        pickle.dump({}, opened)
    file.unlink()


def with_adapter(folder, name="adapter"):
    return load_model(folder / "model", adapter=folder / name, device="cpu")


MODEL, ADAPTER = "model/model.safetensors", "adapter/adapter_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda to: shutil.rmtree(to / "model"), r"model: found no folder '.*/model', expected one, or a model id"),
        (
            lambda to: (to / "model/config.json").unlink(),
            r"model: found no config.json in '.*/model', expected a folder",
        ),
        (lambda to: (to / "model/config.json").write_text('{"a"'), r"config.json: found what is not JSON \(.*\), exp"),
        (
            lambda to: (to / "model/config.json").write_text("[]"),
            r"config.json: found a JSON list, expected an object",
        ),
        (
            lambda to: edit(to / "model/config.json", model_type="none"),
            r"model: found none that loads in '.*', expected",
        ),
        (lambda to: edit(to / "model/config.json", text_config=3), r"model: found none that loads in '.*', expected"),
        (
            lambda to: edit(to / "model/config.json", auto_map={"AutoConfig": "a.B"}),
            r"found code of its own \(auto_map\)",
        ),
        (lambda to: (to / MODEL).unlink(), r"model: found no weights in '.*/model', expected model.safetensors"),
        (
            lambda to: pickled(to / MODEL),
            r"model: found pickled weights \(model.bin\) in '.*', expected model.safetens",
        ),
        (lambda to: (to / MODEL).write_bytes(b""), r"model.safetensors: found an empty file, expected a whole"),
        (lambda to: tensors(to / MODEL, without("lm_head")), r"found 1 tensors missing or of another shape .*lm_head"),
        (
            lambda to: tensors(to / MODEL, renamed("up_proj", "up")),
            r"found 2 tensors missing or of another shape in '.*",
        ),
        (lambda to: tensors(to / MODEL, resized("lm_head")), r"found 1 tensors missing or of another shape .*lm_head"),
        (
            lambda to: shutil.copy(to / "adapter/adapter_config.json", to / "model"),
            r"model: found an adapter in '.*/mod",
        ),
    ],
)
def test_a_model_that_is_not_whole_is_told_in_a_sentence(folder, damage, sentence):
    damage(folder)
    with pytest.raises(ValueError, match=rf"{sentence}.*\.$") as caught:
        load_model(folder / "model", device="cpu")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_with_more_layers_than_its_configuration_is_refused(folder):
    text = json.loads((folder / "model/config.json").read_text())["text_config"]
    edit(folder / "model/config.json", text_config=text | {"num_hidden_layers": 1, "layer_types": None})
    with pytest.raises(ValueError, match=r"model: found 9 tensors in '.*' without a place in the model .*layers\.1\."):
        load_model(folder / "model", device="cpu")


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_model_loads_as_it_was_saved_tied_or_not(tmp_path, tied):
    model = make_llava()
    if tied:
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
        model.tie_weights()
        assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    assert (len(load_file(tmp_path / "model.safetensors")) < len(model.state_dict())) is tied
    loaded = load_model(tmp_path, device="cpu")
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    # What a model has no use for is no damage: a checkpoint of a larger whole.
    tensors(tmp_path / "model.safetensors", lambda weights: weights | {"value_head.weight": torch.zeros(3)})
    assert torch.equal(load_model(tmp_path, device="cpu").lm_head.weight, model.lm_head.weight)


def test_shards_are_read_whole(folder):
    whole = load_model(folder / "model", device="cpu")
    whole.save_pretrained(folder / "shards", max_shard_size="40KB")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 1
    loaded = load_model(folder / "shards", device="cpu").state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in whole.state_dict().items())
    file = sorted((folder / "shards").glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{file.name}: found .* bytes of .*, expected a whole safetensors file"):
        load_model(folder / "shards", device="cpu")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda to: shutil.rmtree(to / "adapter"),
            r"adapter: found no folder '.*/adapter', expected one, or a model id",
        ),
        (lambda to: (to / "adapter/adapter_config.json").unlink(), r"adapter: found no adapter_config.json in '.*'"),
        (
            lambda to: (to / "adapter/adapter_config.json").write_text("{"),
            "adapter_config.json: found what is not JSON",
        ),
        (lambda to: edit(to / "adapter/adapter_config.json", peft_type="NEW"), "found peft_type 'NEW', expected one"),
        (lambda to: edit(to / "adapter/adapter_config.json", peft_type=None), "found peft_type None, expected one"),
        (lambda to: edit(to / "adapter/adapter_config.json", r="two"), "found r 'two', expected the adapter's rank"),
        (lambda to: edit(to / "adapter/adapter_config.json", r=0), "found r 0, expected the adapter's rank"),
        (lambda to: edit(to / "adapter/adapter_config.json", r=3), r"adapter: found none that loads .*size mismatch"),
        (
            lambda to: edit(to / "adapter/adapter_config.json", base_model_name_or_path=[]),
            r"base_model_name_or_path \[\]",
        ),
        (
            lambda to: edit(to / "adapter/adapter_config.json", auto_map={"a": "b"}),
            r"found code of its own \(auto_map\)",
        ),
        (
            lambda to: edit(to / "adapter/adapter_config.json", target_modules=["none"]),
            "adapter: found none that loads",
        ),
        (lambda to: edit(to / "adapter/adapter_config.json", lora_alpha="x"), "adapter: found none that loads in"),
        (
            lambda to: (to / ADAPTER).unlink(),
            r"adapter: found no weights in '.*/adapter', expected adapter_model.safe",
        ),
        (
            lambda to: pickled(to / ADAPTER),
            r"adapter: found pickled weights \(adapter_model.bin\) in '.*', expected ad",
        ),
        (
            lambda to: (to / ADAPTER).write_bytes(b"x"),
            "adapter_model.safetensors: found 1 bytes that are no safetensors",
        ),
        (lambda to: tensors(to / ADAPTER, without("layers.1")), "adapter: found 2 tensors missing in '.*' .*layers.1"),
        (lambda to: tensors(to / ADAPTER, resized("lora_B")), r"adapter: found none that loads in '.*size mismatch"),
        (
            lambda to: tensors(to / ADAPTER, renamed("language_model.", "")),
            r"found 4 tensors without a place in the mo",
        ),
        (lambda to: tensors(to / ADAPTER, without("")), r"adapter: found 4 tensors missing in '"),
        (
            lambda to: shutil.copytree(to / "deeper", to / "adapter", dirs_exist_ok=True),
            r"found 2 tensors without a pl",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_told_in_a_sentence(folder, damage, sentence):
    damage(folder)
    with pytest.raises(ValueError, match=rf"{sentence}.*\.$") as caught:
        with_adapter(folder)
    assert "\n" not in str(caught.value)


def test_an_adapter_with_a_whole_module_loads_and_lacks_no_tensor_of_it(folder):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=DECODER, modules_to_save=["language_model.norm"], init_lora_weights=False)
    model = get_peft_model(make_llava(), config)
    model.base_model.model.model.language_model.norm.modules_to_save["default"].weight.data.normal_()
    model.save_pretrained(folder / "norm")
    ids = torch.tensor([[7, 8, 9]])
    assert torch.equal(with_adapter(folder, "norm")(input_ids=ids).logits, model(input_ids=ids).logits)
    tensors(folder / "norm/adapter_model.safetensors", without("norm"))
    with pytest.raises(
        ValueError, match=r"adapter: found none that loads in '.*/norm', expected a saved one; KeyError"
    ):
        with_adapter(folder, "norm")


def test_other_kinds_of_adapters_load_for_evaluation(folder):
    config = IA3Config(target_modules=DECODER, feedforward_modules=[])
    model = get_peft_model(make_llava(), config)
    model.save_pretrained(folder / "ia3")
    loaded = with_adapter(folder, "ia3")
    assert isinstance(loaded, PeftModel)
    assert not loaded.training


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("processor_config.json", "{", r"processor_config.json: found what is not JSON \(Expecting"),
        ("tokenizer_config.json", '{"a": ', "tokenizer_config.json: found what is not JSON"),
        ("tokenizer.json", "", "tokenizer.json: found what is not JSON"),
        ("tokenizer.json", "{}", "processor: found none that loads in"),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["a.B", null]}}', "code of its own"),
        ("processor_config.json", '{"auto_map": {"AutoProcessor": "a.B"}}', "code of its own"),
        (
            "chat_template.jinja",
            "{% for message in messages %}",
            r"found a chat template in '.*' that is none \(Unexp",
        ),
        ("chat_template.jinja", "{{ messages | }}", r"that is none \(.*, line 1\), expected a Jinja template"),
    ],
)
def test_a_processor_that_is_not_whole_is_told_in_a_sentence(folder, file, content, sentence):
    (folder / "model" / file).write_text(content)
    with pytest.raises(ValueError, match=rf"{sentence}.*\.$") as caught:
        load_processor(folder / "model")
    assert "\n" not in str(caught.value)


def test_a_template_that_refuses_a_conversation_is_loaded(folder):
    (folder / "model/chat_template.jinja").write_text("{{ raise_exception('only with an image') }}")
    assert load_processor(folder / "model").chat_template == "{{ raise_exception('only with an image') }}"


def test_code_of_its_own_runs_only_when_asked(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (folder / "model/own.py").write_text(
        "from pathlib import Path\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "import transformers\n"
        "class LlavaForConditionalGeneration(transformers.LlavaForConditionalGeneration):\n    own = True\n"
    )
    edit(folder / "model/config.json", auto_map={"AutoModelForImageTextToText": "own.LlavaForConditionalGeneration"})
    with pytest.raises(ValueError, match=r"config.json: found code of its own \(auto_map\), expected a model whose"):
        load_model(folder / "model", device="cpu")
    assert not (tmp_path / "ran").exists()
    # transformers does not translate old names for such a class: its head would be a random one.
    with pytest.raises(ValueError, match=r"model: found 1 tensors missing or of another shape .*lm_head"):
        load_model(folder / "model", device="cpu", trust_remote_code=True)
    tensors(folder / MODEL, lambda _: make_llava().state_dict())
    model = load_model(folder / "model", device="cpu", trust_remote_code=True)
    assert model.own
    assert (tmp_path / "ran").exists()


def test_other_mistakes_are_named(folder):
    with pytest.raises(ValueError, match=r"processor: found no folder '.*', expected one, or a model id"):
        load_processor(folder / "nothing")
    with pytest.raises(ValueError, match="quantization: found 'int3', expected 'nf4' or None"):
        load_model(folder / "model", quantization="int3")
    with pytest.raises(ValueError, match=r"model: found an adapter in '.*/adapter', .*\(--adapter\)"):
        load_model(folder / "adapter")
    with pytest.raises(ValueError, match=r"adapter: found no adapter_config.json in '.*/model', expected a folder"):
        with_adapter(folder, "model")
    with pytest.raises(
        ValueError, match=r"model: found none that loads in 'no-such-owner/none', expected a saved one"
    ):
        load_model("no-such-owner/none")


# Parts of a family's model beside its decoder that hold linears.
OUTSIDE = {
    "LLaVA over Llama": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    "LLaVA over Qwen2": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    "InternVL": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    "Idefics3": ["model.vision_model", "model.connector", "lm_head"],
}


@pytest.mark.parametrize("family", OUTSIDE)
def test_nf4_holds_the_language_models_linears_in_4_bits_and_no_others(family, tmp_path):
    model, _ = EXACT[family]()
    model.save_pretrained(tmp_path)
    quantised = load_model(tmp_path, device="cpu", quantization="nf4", dtype=torch.bfloat16)
    decoder = [part for part in model.get_decoder().modules() if type(part) is nn.Linear]
    skipped = quantised.config.quantization_config.llm_int8_skip_modules
    for name, part in model.named_modules():
        if type(part) is not nn.Linear:
            continue
        assert should_convert_module(name, skipped) == (part in decoder), name
        there = quantised.get_submodule(name)
        assert isinstance(there, Linear4bit) == (part in decoder), name
        if part not in decoder:
            assert name.startswith(tuple(OUTSIDE[family])), name
            assert torch.equal(there.weight, part.weight.bfloat16()), name


@pytest.mark.parametrize(
    ("changes", "options", "loaded"),
    [
        ({}, {}, torch.float16),
        ({}, {"float16_as": torch.bfloat16}, torch.bfloat16),
        (
            {"dtype": None, "torch_dtype": "float16"},
            {"float16_as": torch.bfloat16},
            torch.bfloat16,
        ),  # as of older ones
        ({}, {"float16_as": torch.bfloat16, "dtype": torch.float16}, torch.float16),
        ({"dtype": "float32"}, {"float16_as": torch.bfloat16}, torch.float32),
    ],
)
def test_a_float16_checkpoint_is_loaded_as_asked(folder, changes, options, loaded):
    tensors(folder / MODEL, lambda weights: {name: weight.half() for name, weight in weights.items()})
    edit(folder / "model/config.json", **{"dtype": "float16"} | changes)
    model = load_model(folder / "model", device="cpu", **options)
    assert {parameter.dtype for parameter in model.parameters()} == {loaded}
    (head,) = (weight for name, weight in load_file(folder / MODEL).items() if name.endswith("lm_head.weight"))
    assert torch.equal(model.get_output_embeddings().weight, head.to(loaded))


def test_a_float16_checkpoint_in_4_bits_computes_as_asked(folder):
    tensors(folder / MODEL, lambda weights: {name: weight.half() for name, weight in weights.items()})
    edit(folder / "model/config.json", dtype="float16")
    model = load_model(folder / "model", device="cpu", quantization="nf4", float16_as=torch.bfloat16)
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14
    assert {(layer.compute_dtype, layer.weight.quant_state.dtype) for layer in layers} == {(torch.bfloat16,) * 2}
