"""What is known of a model before its weights are read: its configuration, from a preset or a config.json."""

import difflib
import json
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_LLAMA = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_SIZES = {
    "llava-1.5-7b": {"hidden_size": 4096, "intermediate_size": 11008, "layers": 32, "heads": 32},
    "llava-1.5-13b": {"hidden_size": 5120, "intermediate_size": 13824, "layers": 40, "heads": 40},
}
PRESETS = tuple(_SIZES)


def preset_name(model: str) -> str:
    """The name of a preset, for its id on the Hub too; another model's is left as it is.

    Example:
        >>> preset_name("llava-hf/llava-1.5-13b-hf")
        'llava-1.5-13b'
    """
    return model.removeprefix("llava-hf/").removesuffix("-hf")


def find_config(model: str) -> PreTrainedConfig:
    """The configuration of a model, without the network.

    Args:
        model: "llava-1.5-7b", "llava-1.5-13b" or their ids on the Hub; a folder with a config.json, or that file.

    Raises:
        FileNotFoundError: neither a preset nor a file.
        ValueError: no configuration of a vision-language model.
    """
    name = preset_name(model)
    if name in _SIZES:
        return _preset(name)
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; download the model and name its folder."
        raise FileNotFoundError(
            f"model: found no preset and no config.json '{model}', expected {', '.join(PRESETS)}, a folder with a "
            f"config.json or that file{hint}"
        )
    try:
        values = json.loads(file.read_text())
        kind = values["model_type"]
        config = AutoConfig.for_model(**values)
    except (ValueError, KeyError, TypeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"model: found '{file}', expected a transformers config.json; {_reason(error)}.") from None
    if not hasattr(config, "vision_config"):
        raise ValueError(
            f"model: found a configuration of '{kind}' without vision_config in '{file}', expected a vision-language "
            "model's; name e.g. llava-1.5-13b."
        )
    return config


def _reason(error):
    lines = str(error).strip().splitlines() or ["it cannot be read"]
    return f"no {lines[0]}" if isinstance(error, KeyError) else lines[0].rstrip(".")


def _preset(name):
    size = dict(_SIZES[name])
    layers, heads = size.pop("layers"), size.pop("heads")
    text = _LLAMA | size | {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads}
    return AutoConfig.for_model(
        "llava",
        text_config=text,
        vision_config=_VISION,
        image_token_index=32000,
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )


def image_tokens(config: PreTrainedConfig) -> int:
    """Tokens of one image in the prompt: what the configuration says, or the patches of one picture of its size."""
    if length := getattr(config, "image_seq_length", None):
        return length
    vision = config.vision_config
    side, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if not isinstance(side, int) or not isinstance(patch, int):
        raise ValueError(
            f"model: found a '{config.model_type}' whose images have no one number of tokens, expected "
            "image_seq_length or image_size and patch_size in its config.json."
        )
    return (side // patch) ** 2
