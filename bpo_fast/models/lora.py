"""The LoRA adapter that is trained: fresh, and on linears of the language model alone."""

import copy
import re

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
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
        targets = {name.rsplit(".", 1)[-1] for name, part in decoder.named_modules() if isinstance(part, nn.Linear)}
    elif isinstance(targets, str):
        return peft_config
    names = sorted(targets or LORA_TARGET_MODULES)
    prefix = rf"(.*\.)?{re.escape(path)}\." if path else ""
    pattern = rf"{prefix}(.*\.)?({'|'.join(map(re.escape, names))})"
    if not any(re.fullmatch(pattern, name) for name, _ in model.named_modules()):
        raise ValueError(
            f"target_modules: found {names}, expected names of modules in the language model "
            f"({type(decoder).__name__}); name its linears, e.g. 'q_proj'."
        )
    restricted = copy.deepcopy(peft_config)
    restricted.target_modules = pattern
    return restricted


def with_fresh_adapter(model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None) -> PeftModel:
    """The model with an adapter that adds exactly zero, so that the model without it is the reference.

    Args:
        model: with a fresh adapter, or without one.
        peft_config: the adapter to put on a model without one.

    Raises:
        ValueError: there is no adapter to train, there are two, or it is trained already.
    """
    if not isinstance(model, PeftModel):
        if peft_config is None:
            raise ValueError(
                "peft_config: found None for a model without an adapter, expected a LoraConfig; the reference is the "
                "model with its adapter disabled, so pass peft_config=LoraConfig(r=64)."
            )
        return get_peft_model(model, restrict_to_decoder(peft_config, model))
    if peft_config is not None:
        raise ValueError(
            "peft_config: found one for a model that has an adapter already, expected one or the other; merge the "
            "adapter first with model.merge_and_unload()."
        )
    if any(name.endswith("lora_B.default.weight") and bool(p.any()) for name, p in model.named_parameters()):
        raise ValueError(
            "model: found an adapter that is trained already, expected a fresh one, since the reference is the model "
            "with the adapter disabled; merge it first with model.merge_and_unload() and pass a peft_config."
        )
    return model
