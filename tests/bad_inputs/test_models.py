"""Bad models, processors, adapters and adapter options: one sentence, and nothing on disk."""

import json
import pickle
import shutil

import pytest
from bad_input import Bad, check, table
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import make_llava
from tiny_world import edit

MODEL, ADAPTER = "model/model.safetensors", "adapter/adapter_model.safetensors"
WITH_ADAPTER = "evaluate --adapter adapter"


@pytest.fixture
def world(world):
    """With a trained adapter beside the model."""
    config = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    get_peft_model(make_llava(), config).save_pretrained(world / "adapter")
    return world


def nothing(world):
    """The mistake is in the command."""


def unlink(name):
    return lambda world: (world / name).unlink()


def write(name, content):
    return lambda world: (world / name).write_bytes(content)


def cut(name, at):
    def prepare(world):
        (world / name).write_bytes((world / name).read_bytes()[:at])

    return prepare


def pickled(name):
    def prepare(world):
        (world / name).unlink()
        (world / name).with_suffix(".bin").write_bytes(pickle.dumps({}))

    return prepare


def weights(name, change):
    """Rewrite a file of weights with what `change` makes of each name; None leaves the tensor out."""

    def prepare(world):
        found = {change(key): tensor for key, tensor in load_file(world / name).items()}
        found.pop(None, None)
        save_file(found, world / name, metadata={"format": "pt"})

    return prepare


def config(name, **changes):
    return lambda world: edit(world / name, lambda content: content | changes)


def copied(source, target):
    return lambda world: shutil.copytree(world / source, world / target, dirs_exist_ok=True)


def without(part):
    return lambda key: None if part in key else key


def with_one_layer(world):
    text = json.loads((world / "model/config.json").read_text())["text_config"]
    text = {key: value for key, value in text.items() if key != "layer_types"} | {"num_hidden_layers": 1}
    config("model/config.json", text_config=text)(world)


@table(
    # Wrong in silence: a random head, a model of fewer layers, an adapter without effect.
    Bad("a model without its head", weights(MODEL, without("lm_head")), "evaluate", "found 1 tensors missing or of"),
    Bad("a model of other names", weights(MODEL, lambda key: f"x.{key}"), "evaluate", "tensors missing or of another"),
    Bad(
        "a model of fewer layers than its weights", with_one_layer, "evaluate", "tensors in 'model' without a place in"
    ),
    Bad(
        "an adapter of other names",
        weights(ADAPTER, lambda key: key.replace("language_model", "text_model")),
        WITH_ADAPTER,
        "adapter: found 4 tensors without a place in the model in 'adapter'",
    ),
    Bad(
        "an adapter of half the tensors", weights(ADAPTER, without("lora_B")), WITH_ADAPTER, "found 2 tensors missing"
    ),
    Bad("an adapter of another shape", config("adapter/adapter_config.json", r=3), WITH_ADAPTER, "size mismatch for"),
    Bad(
        "an adapter given as the model",
        nothing,
        "evaluate --model_name_or_path adapter",
        "model: found an adapter in 'adapter', expected the model that it was trained on; name that as the model",
    ),
    Bad(
        "a model given as the adapter", nothing, "evaluate --adapter model", "found no adapter_config.json in 'model'"
    ),
    # Stack traces and riddles.
    Bad(
        "an empty weight file",
        write(MODEL, b""),
        "evaluate",
        "model.safetensors: found an empty file, expected a whole",
    ),
    Bad(
        "a cut weight file",
        cut(MODEL, -9),
        "evaluate",
        "expected a whole safetensors file; copy or download it again.",
    ),
    Bad("a weight file of garbage", write(MODEL, b"\xff" * 99), "evaluate", "found 99 bytes that are no safetensors"),
    Bad("no weights", unlink(MODEL), "evaluate", "model: found no weights in 'model', expected model.safetensors"),
    Bad(
        "pickled weights", pickled(MODEL), "evaluate", "model: found pickled weights (model.bin) in 'model', expected"
    ),
    Bad("a cut config.json", cut("model/config.json", 30), "evaluate", "model/config.json: found what is not JSON"),
    Bad("no config.json", unlink("model/config.json"), "evaluate", "model: found no config.json in 'model'"),
    Bad(
        "a model type that nobody knows", config("model/config.json", model_type="no"), "evaluate", "model: found none"
    ),
    Bad("code with a model", config("model/config.json", auto_map={"AutoModel": "a.B"}), "evaluate", "(auto_map)"),
    Bad(
        "code with a processor",
        config("model/tokenizer_config.json", auto_map={}),
        "evaluate",
        "of its own (auto_map)",
    ),
    Bad(
        "a cut tokenizer", cut("model/tokenizer.json", 99), "evaluate", "model/tokenizer.json: found what is not JSON"
    ),
    Bad("a cut processor", cut("model/processor_config.json", 9), "bootstrap", "found what is not JSON"),
    Bad(
        "no processor",
        lambda world: [file.unlink() for file in (world / "model").glob("*token*")],
        "evaluate",
        "process",
    ),
    Bad(
        "a chat template that does not compile",
        write("model/chat_template.jinja", b"{% if messages %}"),
        "evaluate",
        "processor: found a chat template in 'model' that is none (Unexpected end of template",
    ),
    Bad("an empty adapter file", write(ADAPTER, b""), WITH_ADAPTER, "adapter_model.safetensors: found an empty file"),
    Bad("a cut adapter file", cut(ADAPTER, -1), WITH_ADAPTER, "expected a whole safetensors file; copy or download"),
    Bad(
        "an adapter without weights", unlink(ADAPTER), WITH_ADAPTER, "adapter: found no weights in 'adapter', expected"
    ),
    Bad("a pickled adapter", pickled(ADAPTER), WITH_ADAPTER, "adapter: found pickled weights (adapter_model.bin) in"),
    Bad("an adapter of no known type", config("adapter/adapter_config.json", peft_type="X"), WITH_ADAPTER, "type 'X'"),
    Bad(
        "an adapter of no rank", config("adapter/adapter_config.json", r=None), WITH_ADAPTER, "found r None, expected"
    ),
    Bad(
        "code with an adapter",
        config("adapter/adapter_config.json", auto_map={}),
        WITH_ADAPTER,
        "of its own (auto_map)",
    ),
    Bad("a cut adapter configuration", cut("adapter/adapter_config.json", 9), WITH_ADAPTER, "what is not JSON"),
    Bad(
        "a mistyped model", nothing, "evaluate --model_name_or_path modle", "found no folder 'modle', expected one, or"
    ),
    Bad(
        "a mistyped path",
        nothing,
        "evaluate --model_name_or_path ./a/b",
        "found no folder './a/b', expected one, or a",
    ),
    Bad(
        "a mistyped adapter",
        nothing,
        "evaluate --adapter runs/1/bpo",
        "adapter: found no folder 'runs/1/bpo', expected",
    ),
    Bad("a weight file as the model", nothing, f"evaluate --model_name_or_path {MODEL}", f"found the file '{MODEL}'"),
)
def test_bad_models(bad, world, capsys):
    check(bad, world, capsys)


def option(name, options, sentence):
    return Bad(name, nothing, f"train {options}", sentence)


@table(
    option(
        "a target that is nowhere", "--lora_target_modules q_proj q_porj", "found 'q_porj', expected names of linears"
    ),
    option(
        "a target in the projector", "--lora_target_modules q_proj linear_1", "found 'linear_1', expected names of"
    ),
    option("a target that is the head", "--lora_target_modules q_proj lm_head", "found 'lm_head', expected names of"),
    option("no scale", "--lora_alpha 0", "lora_alpha: found 0, expected a whole number of at least 1"),
    option("no rank", "--lora_r 0", "lora_r: found 0, expected a whole number of at least 1"),
    option("a dropout of everything", "--lora_dropout 1", "lora_dropout: found 1.0, expected a number in [0, 1)"),
    option("a mistyped model", "--model_name_or_path modle", "found no folder 'modle', expected one, or a model id"),
)
def test_bad_adapter_options(bad, world, capsys):
    check(bad, world, capsys)
