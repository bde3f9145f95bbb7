"""The LoRA adapter that is trained: fresh, and on linears of the language model alone.

Of PEFT's adapters, LoRA is trained here, plain or rank-stabilised (`use_rslora`), with rank and alpha patterns, chosen
layers, and modules of the decoder trained whole (`modules_to_save`, such as its norms). Everything else is refused:
what does not add exactly zero before training (DoRA in 16 bits, too: it divides by a norm that is rounded) or does not
give the base back when it is disabled has no reference, and what lies outside the decoder's layers (vision tower,
projector, embeddings, output head) is not trained by the packed forward.
"""

import copy
import dataclasses
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, get_pattern_key
from torch import nn
from transformers import PreTrainedModel

from bpo_fast.models.four_bits import keep_training_layout
from bpo_fast.models.weights import adapter_parameters

LORA_TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Fields of LoraConfig that may differ from their defaults; any other one makes another kind of adapter.
_FREE_FIELDS = {
    *("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "task_type"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("inference_mode", "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config"),
}


def check_config(peft_config: PeftConfig) -> None:
    """Refuse an adapter that is not LoRA, changes the base, or does not start at exactly zero.

    Raises:
        ValueError: with the option's name.
    """
    if not isinstance(peft_config, LoraConfig) or peft_config.peft_type != "LORA":
        raise ValueError(
            f"peft_config: found {type(peft_config).__name__}, expected a LoraConfig, the one adapter that is trained "
            "here; pass e.g. LoraConfig(r=64)."
        )
    init = peft_config.init_lora_weights
    if init is not True and init != "gaussian":
        raise ValueError(
            f"init_lora_weights: found {init!r}, expected True or 'gaussian'; others change the model's weights or do "
            "not start at zero, and the reference would not be the model that was given."
        )
    for field in dataclasses.fields(peft_config):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        found = getattr(peft_config, field.name)
        # An empty list, like None, asks for nothing.
        if field.name not in _FREE_FIELDS and (found or None) != (default or None):
            raise ValueError(
                f"{field.name}: found {found!r}, expected {default!r}; only LoRA on linears is trained here, which "
                "adds exactly zero before training and leaves the model as it was when it is disabled."
            )
    if peft_config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(f"task_type: found {peft_config.task_type!r}, expected 'CAUSAL_LM' or None.")
    ranks = {"r": peft_config.r} | {f"rank_pattern[{key!r}]": r for key, r in (peft_config.rank_pattern or {}).items()}
    for name, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"{name}: found {rank!r}, expected an integer of at least 1, the adapter's rank.")
    patterns = (peft_config.alpha_pattern or {}).items()
    for name, alpha in [("lora_alpha", peft_config.lora_alpha)] + [(f"alpha_pattern[{k!r}]", v) for k, v in patterns]:
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
            raise ValueError(
                f"{name}: found {alpha!r}, expected a finite number above 0, the factor of the adapter's output."
            )
    if isinstance(peft_config.modules_to_save, str):
        raise ValueError(f"modules_to_save: found {peft_config.modules_to_save!r}, expected a list of names, or None.")
    dropout = peft_config.lora_dropout
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout: found {dropout!r}, expected a number of at least 0 and below 1.")


def restrict_to_decoder(peft_config: LoraConfig, model: PreTrainedModel) -> LoraConfig:
    """A copy of a LoRA configuration whose targets are linears of the language model alone.

    Names such as `q_proj` match the vision tower's linears too, and "all-linear" takes every one of them: here they
    stand for those of the decoder. A regular expression is the user's own word; it is left as it is, and refused when
    it matches anything outside the decoder.

    Args:
        peft_config: `target_modules` None stands for those of a decoder layer's usual seven linears that the model
            has; a warning names the others.
        model: the model that the adapter will be put on.

    Raises:
        ValueError: the configuration is of another kind of adapter (see `check_config`), a name matches nothing in the
            language model, or something outside it is named.
    """
    check_config(peft_config)
    decoder = model.get_decoder()
    inside = _trainable_paths(model)
    # Quantised linears are no nn.Linear, and have the two sizes of one.
    linears = [name for name, part in inside.items() if hasattr(part, "in_features") and hasattr(part, "out_features")]
    everywhere = [name for name, _ in model.named_modules() if name]
    where = f"the layers of the language model ({type(decoder).__name__})"
    targets, saved = peft_config.target_modules, peft_config.modules_to_save or ()
    _check_names("exclude_modules", peft_config.exclude_modules, everywhere, "modules of the model")
    _check_names("modules_to_save", saved, inside, f"modules in {where}")
    # PEFT saves whole what only ends in such a name: "norm" is a "post_layernorm", too.
    _check_inside(
        "modules_to_save", sorted(saved), [path for path in everywhere if path.endswith(tuple(saved))], inside
    )
    restricted = copy.deepcopy(peft_config)
    if isinstance(targets, str) and targets != "all-linear":
        _check_names("target_modules", targets, everywhere, "modules of the model")
        chosen = [name for name in everywhere if check_target_module_exists(peft_config, name)]
        _check_inside("target_modules", targets, chosen, linears)
        _check_patterns(peft_config, chosen)
        return restricted
    if targets == "all-linear":
        names = {name.rsplit(".", 1)[-1] for name in linears}
    elif targets is None:
        names = {name for name in LORA_TARGET_MODULES if _matching(name, linears)}
        missing = [name for name in LORA_TARGET_MODULES if name not in names]
        if names and missing:
            warnings.warn(
                f"target_modules: found no {', '.join(missing)} in {where}, whose other linears get no adapter; name "
                "its linears, or pass 'all-linear'.",
                stacklevel=2,
            )
        names = names or set(LORA_TARGET_MODULES)
    else:
        names = set(targets)
    _check_names("target_modules", names, linears, f"linears in {where}")
    restricted.target_modules = names
    _check_layers(restricted, linears)
    chosen = [name for name in linears if check_target_module_exists(restricted, name)]
    if not chosen:
        raise ValueError(
            f"target_modules: found {sorted(names)}, of which exclude_modules, layers_to_transform and "
            f"modules_to_save leave no linear in {where}, expected at least one; leave some of these options out."
        )
    _check_patterns(peft_config, chosen)
    if peft_config.layers_to_transform not in (None, []):
        # PEFT reads the layers for names only, and not for a regular expression.
        restricted.target_modules, restricted.layers_to_transform, restricted.layers_pattern = set(chosen), None, None
    else:
        path = _path_of(decoder, model)
        # A regular expression stays short in the saved configuration; the look-ahead keeps it in the decoder.
        inside_decoder = f"(?={re.escape(path)}[.])" if path else ""
        restricted.target_modules = rf"{inside_decoder}(.*\.)?({'|'.join(map(re.escape, sorted(names)))})"
    return restricted


def with_fresh_adapter(model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None) -> PeftModel:
    """The model with an adapter that adds exactly zero, so that the model without it is the reference.

    Args:
        model: with a fresh adapter, or without one.
        peft_config: the adapter to put on a model without one.

    Raises:
        ValueError: there is no adapter to train, there are two, it is trained already, or a part of it would not be
            trained or not be seen by the packed forward.
    """
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise ValueError(
                "peft_config: found one for a model that has an adapter already, expected one or the other; merge the "
                "adapter first with model.merge_and_unload()."
            )
    else:
        layers = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
        if layers:
            raise ValueError(
                f"model: found adapter layers ({layers[0]}) in a {type(model).__name__}, expected a PeftModel or a "
                "model without any; make the adapter with peft.get_peft_model, or merge it first."
            )
        if peft_config is None:
            raise ValueError(
                "peft_config: found None for a model without an adapter, expected a LoraConfig; the reference is the "
                "model with its adapter disabled, so pass peft_config=LoraConfig(r=64)."
            )
        model = get_peft_model(model, restrict_to_decoder(peft_config, model))
    _check_adapter(model)
    keep_training_layout(model)
    return model


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """The model without its adapter inside this block, as by PEFT's `disable_adapter()`, to the same bits.

    PEFT walks every module of the model twice and sets every parameter's `requires_grad`: about 30 ms of host time for
    280 linears. Here the layers that hold an adapter are found once for a model, and a flag of each is set. Blocks may
    be nested, and leave every layer as they found it, also when an exception ends them.

    Args:
        model: a `PeftModel`, or any model with layers of PEFT's in it.
    """
    # Adapters are added to a model by name, and then may be on more of its modules.
    names = tuple(getattr(model, "peft_config", ()))
    found = _SWITCHES.get(model)
    if found is None or found[0] != names:
        switches = [part for part in model.modules() if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        # `disable_adapters` of such a layer reads it there; `nn.Module.__setattr__` looks for parameters first.
        found = _SWITCHES[model] = names, [switch.__dict__ for switch in switches]
    switches = found[1]
    before = [switch.get("_disable_adapters", False) for switch in switches]
    try:
        for switch in switches:
            switch["_disable_adapters"] = True
        yield
    finally:
        for switch, disabled in zip(switches, before, strict=True):
            switch["_disable_adapters"] = disabled


# Model -> names of its adapters, and the attributes of the layers that hold them.
_SWITCHES: WeakKeyDictionary[nn.Module, tuple[tuple[str, ...], list[dict]]] = WeakKeyDictionary()


def check_gradients(model: nn.Module) -> None:
    """Refuse a model with trainable parameters that a backward pass did not reach: call it after the first one.

    Raises:
        ValueError: with the names of such parameters.
    """
    missing = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    if missing:
        raise ValueError(
            f"model: found {len(missing)} trainable parameters without a gradient ({_some(missing)}), expected one "
            "for each; take them out of the adapter's target_modules or modules_to_save, or freeze them."
        )


def _check_adapter(model: PeftModel) -> None:
    """Refuse an adapter that is not the only one, not fresh, not active, or reaches out of the decoder."""
    if len(model.peft_config) != 1:
        raise ValueError(
            f"model: found {len(model.peft_config)} adapters ({', '.join(model.peft_config)}), expected one; delete "
            "the others with model.delete_adapter(name), or merge them first."
        )
    ((adapter, config),) = model.peft_config.items()
    check_config(config)
    inside = _trainable_paths(model.get_base_model())
    prefix = next(path for path, module in model.named_modules() if module is model.get_base_model())
    layers = {}
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            layers[path.removeprefix(f"{prefix}.")] = module
    outside = [path for path in layers if path not in inside]
    if outside:
        raise ValueError(
            f"model: found an adapter on {_some(outside)}, expected it on parts of the language model's layers alone "
            f"({type(model.get_base_model().get_decoder()).__name__}), which are what is trained here; name the "
            "target_modules or modules_to_save by paths in it."
        )
    if any(module.disable_adapters or module.merged_adapters for module in layers.values()):
        raise ValueError(
            "model: found its adapter disabled or merged, expected it active; enable or unmerge it first."
        )
    for path, module in layers.items():
        if isinstance(module, LoraLayer) and not 0 < abs(module.scaling[adapter]) < math.inf:
            raise ValueError(
                f"model: found the adapter on {path} scaled by {module.scaling[adapter]}, expected not 0."
            )
        if not _adds_zero(module, adapter):
            raise ValueError(
                f"model: found an adapter that is trained already (on {path}), expected a fresh one, since the "
                "reference is the model with the adapter disabled; merge it first with model.merge_and_unload() and "
                "pass a peft_config."
            )
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError(
            "model: found no trainable parameter, expected the adapter's; load it with is_trainable=True, or pass a "
            "LoraConfig without inference_mode."
        )
    foreign = sorted(trainable - adapter_parameters(model).keys())
    if foreign:
        raise ValueError(
            f"model: found {len(foreign)} trainable parameters beside the adapter's ({_some(foreign)}), expected "
            "none, since the reference shares them; freeze them with requires_grad_(False)."
        )


@torch.no_grad()
def _adds_zero(module: nn.Module, adapter: str) -> bool:
    if isinstance(module, ModulesToSaveWrapper):
        saved, original = module.modules_to_save[adapter].state_dict(), module.original_module.state_dict()
        return all(torch.equal(saved[name], original[name]) for name in original)
    if not isinstance(module, LoraLayer):
        return False
    weight = module.lora_B[adapter].weight
    return weight.is_meta or not weight.any()  # a model that is only planned holds no numbers


def _path_of(decoder: nn.Module, model: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is decoder)


def _trainable_paths(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The decoder's modules by their paths in the model, without the embeddings, the head and the decoder itself."""
    decoder = model.get_decoder()
    path = _path_of(decoder, model)
    tables = [table for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table is not None]
    apart = {part for table in tables for part in table.modules()}
    parts = {f"{path}.{name}" if path else name: part for name, part in decoder.named_modules() if name}
    return {
        name: part
        for name, part in parts.items()
        # A wrapper of an adapter around a table holds the table itself.
        if part not in apart and not apart & set(part.modules())
    }


def _matching(name: str, paths: Iterable[str]) -> list[str]:
    """The paths that PEFT takes a name of a list for."""
    return [path for path in paths if path == name or path.endswith(f".{name}")]


def _check_names(option: str, names: str | Iterable[str] | None, paths: Iterable[str], where: str) -> None:
    """Refuse a name, or a regular expression, that matches none of `paths`."""
    if isinstance(names, str):
        try:
            unmatched = [] if any(re.fullmatch(names, path) for path in paths) else [names]
        except re.error as error:
            raise ValueError(f"{option}: found {names!r}, expected a regular expression; {error}.") from None
    else:
        unmatched = [name for name in sorted(names or ()) if not _matching(name, paths)]
    if unmatched:
        ends = sorted({path.rsplit(".", 1)[-1] for path in paths if not path.rsplit(".", 1)[-1].isdigit()})
        raise ValueError(
            f"{option}: found {', '.join(map(repr, unmatched))}, expected names of {where}; there are e.g. "
            f"{_some(ends, 8)}."
        )


def _check_inside(option: str, found: object, matched: Iterable[str], inside: Iterable[str]) -> None:
    """Refuse what an option matches beside what can be trained."""
    outside = [path for path in matched if path not in inside]
    if outside:
        parts = "linears" if option == "target_modules" else "modules"
        raise ValueError(
            f"{option}: found {found!r}, which matches {_some(outside)}, expected {parts} in the layers of the "
            "language model alone, since nothing else is trained here; name them by longer paths."
        )


def _check_layers(config: LoraConfig, linears: list[str]) -> None:
    wanted = config.layers_to_transform
    for layer in [wanted] if isinstance(wanted, int) else wanted or ():
        one = copy.copy(config)
        one.layers_to_transform = layer
        if not any(check_target_module_exists(one, name) for name in linears):
            raise ValueError(f"layers_to_transform: found {layer}, expected numbers of layers that hold a target.")


def _check_patterns(config: LoraConfig, chosen: list[str]) -> None:
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, option) or {}:
            # PEFT gives the name back where the pattern does not match it.
            if not any(get_pattern_key([pattern], name) == pattern for name in chosen):
                raise ValueError(
                    f"{option}: found {pattern!r}, expected the end of a target's name, e.g. "
                    f"{chosen[0].rsplit('.', 1)[-1]!r}; mind the spelling, or leave it out."
                )


def _some(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
