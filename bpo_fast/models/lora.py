"""Where a LoRA adapter goes: on linears of the language model alone."""

from __future__ import annotations

import copy
import re

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

LORA_TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def restrict_to_decoder(peft_config: LoraConfig, model: PreTrainedModel) -> LoraConfig:
    """A copy of a LoRA configuration whose targets are linears of the language model alone.

    Names such as `q_proj` match the vision tower's linears too, and "all-linear" takes every one of them; a regular
    expression is the user's own word and is left as it is.

    Args:
        peft_config: `target_modules` None stands for the seven linears of a decoder layer.
        model: the model that the adapter will be put on.

    Raises:
        ValueError: no linear of the language model matches.
    """
    decoder = model.get_decoder()
    path = next(name for name, module in model.named_modules() if module is decoder)
    targets = peft_config.target_modules
    if targets == "all-linear":
        targets = {
            name.rsplit(".", 1)[-1] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)
        }
    elif isinstance(targets, str):
        return peft_config
    names = sorted(targets or LORA_TARGET_MODULES)
    prefix = rf"(.*\.)?{re.escape(path)}\." if path else ""
    pattern = rf"{prefix}(.*\.)?({'|'.join(map(re.escape, names))})"
    if not any(re.fullmatch(pattern, name) for name, _ in model.named_modules()):
        raise ValueError(
            f"target_modules: {names} match no module of the language model ({type(decoder).__name__}); name its "
            "linears, e.g. 'q_proj'."
        )
    restricted = copy.deepcopy(peft_config)
    restricted.target_modules = pattern
    return restricted
