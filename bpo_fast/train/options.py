"""What the options of transformers' TrainingArguments may be here: ranges, and those that BPOTrainer does not have.

An option without effect is refused by name rather than ignored. One that changes nothing here, since what it asks for
is always so (`remove_unused_columns`, `prediction_loss_only`), is taken, for scripts that were written for TRL.
"""

import json
import math
import os
import re
from dataclasses import MISSING, fields
from inspect import Parameter, signature
from typing import Any, get_args, get_type_hints

from bpo_fast.runs.numbers import COUNT, NOT_NEGATIVE, POSITIVE, SEED, SHARE, Range, check_numbers

_EVERY = Range("a share of all steps below 1, or a whole number", lambda x: 0 < x < 1 or (x >= 1 and x == int(x)))

NUMBERS = {
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "num_train_epochs": POSITIVE,
    "max_steps": Range("a whole number of at least 1, or -1 for num_train_epochs", lambda x: x == -1 or x >= 1, True),
    "learning_rate": POSITIVE,
    "warmup_steps": Range("0, a share of all steps below 1, or a whole number", lambda x: x == 0 or _EVERY.holds(x)),
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": NOT_NEGATIVE,
    "max_grad_norm": Range("a number of at least 0, which switches clipping off", lambda x: x >= 0),
    "logging_steps": _EVERY,
    "eval_steps": _EVERY,
    "save_steps": _EVERY,
    "eval_delay": NOT_NEGATIVE,
    "save_total_limit": Range("a whole number of at least 1, or None for all", lambda x: x >= 1, True),
    "seed": SEED,
    "data_seed": SEED,
    "dataloader_num_workers": Range("a whole number of at least 0", lambda x: x >= 0, True),
    "dataloader_prefetch_factor": COUNT,
    "torch_empty_cache_steps": COUNT,
    "max_length": COUNT,
    "token_budget": COUNT,
    "noise_step": Range("a whole number of at least 0", lambda x: x >= 0, True),
}

_SCRIPT = "a flag for scripts, which no trainer reads; leave it out"
_COMPILED = "every packed sequence has another length, so every step would be compiled anew; leave it out"
_LIGER = "what Liger's kernels compute here is fixed, and its losses are not used; leave it out, see use_liger_kernel"
_METRICS = "packed sequences give no logits to make metrics of; read the logged metrics"
_HUB = "no command uploads; when it is done, use hf upload REPO OUTPUT_DIR"
_SHARDED = "the packed forward pass reads whole weights; start one process per GPU with torchrun"
_LENGTHS = "packing leaves nothing to pad, so lengths need no grouping; use 'random' or 'sequential'"
_PROJECTED = "it projects the gradients of full weights, and an adapter's are small already; use 'adamw_torch'"

CHECKPOINTING = {"use_reentrant": False}  # what gradient checkpointing is done with by default

# Option -> why it is refused where it differs from its default, and what to do instead.
REFUSED = {
    "label_smoothing_factor": "it smooths the token labels of a cross-entropy, which no loss here is; use "
    "label_smoothing",
    "do_train": _SCRIPT,
    "do_eval": "a flag for scripts, which no trainer reads; use eval_strategy",
    "do_predict": _SCRIPT,
    "average_tokens_across_devices": "losses are means over pairs, not over tokens; leave it out",
    "torch_compile": _COMPILED,
    "torch_compile_backend": _COMPILED,
    "torch_compile_mode": _COMPILED,
    "liger_kernel_config": _LIGER,
    "use_cache": "training reads no cache of keys and values; leave it out",
    "neftune_noise_alpha": "policy and reference would get different noise, scaled by the length of the packed "
    "sequence; leave it out",
    "auto_find_batch_size": "a smaller batch is another training; use token_budget, which takes less memory for the "
    "same result",
    "include_num_input_tokens_seen": "the Trainer finds no ids in packed sequences to count; num_tokens is logged",
    "eval_do_concat_batches": _METRICS,
    "eval_use_gather_object": _METRICS,
    "eval_accumulation_steps": _METRICS,
    "include_for_metrics": _METRICS,
    "batch_eval_metrics": _METRICS,
    "label_names": _METRICS,
    "logging_nan_inf_filter": "a loss that is not finite stops the run; leave it out",
    "save_only_model": "a checkpoint without its optimizer could not be resumed to the same result; leave it out",
    "enable_jit_checkpoint": "a stopped training would end as if it were complete; bpo-fast train saves a checkpoint "
    "when it is stopped",
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "ignore_data_skip": "a resumed run would see other pairs than one that was not stopped; leave it out",
    "dataloader_in_order": "the order of the batches would be chance; leave it out",
    "parallelism_config": _SHARDED,
    "fsdp": _SHARDED,
    "fsdp_config": _SHARDED,
    "deepspeed": _SHARDED,
    "optim_target_modules": _PROJECTED,
    "length_column_name": _LENGTHS,
}

# Option -> value -> the same.
REFUSED_VALUES = {
    "train_sampling_strategy": dict.fromkeys(("group_by_length", "batch_rebalance"), _LENGTHS),
    "optim": {
        **dict.fromkeys(
            ("lomo", "adalomo"), "it updates in the backward pass, of which a step has several; use 'adamw_torch'"
        ),
        **{
            optim + layerwise: _PROJECTED
            for optim in ("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "apollo_adamw")
            for layerwise in ("", "_layerwise")
        },
    },
}

# A default by its other name: "no" is false to transformers' parser, which reads text for this option and flags.
_NORMALISED = {"include_num_input_tokens_seen": False}


def check_options(config: Any) -> None:
    """Check a `BPOConfig`, its enumerations as text or as such, before `TrainingArguments` reads it.

    Raises:
        TypeError: a flag that is not True or False.
        ValueError: an option that is refused, out of its range, or at odds with another.
    """
    _check_flags(config)
    defaults = {item.name: _default(item) for item in fields(config)}
    for name, why in REFUSED.items():
        # Fields that an older or newer transformers does not have are not there to be set.
        if name not in defaults or (value := getattr(config, name)) in (defaults[name], _NORMALISED.get(name)):
            continue
        if name == "do_eval" and config.eval_strategy != "no":
            continue  # TrainingArguments sets it itself
        raise ValueError(f"{name}: found {value!r}, expected {defaults[name]!r}: {why}.")
    for name, values in REFUSED_VALUES.items():
        value = _text(getattr(config, name, None))
        if why := values.get(value):
            raise ValueError(f"{name}: found {value!r}, expected another value: {why}.")
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):  # what accelerate launch says of its own options
        if os.environ.get(name, "").lower() in ("1", "true", "yes"):
            raise ValueError(f"{name}: found {os.environ[name]!r}, expected it unset: {_SHARDED}.")
    check_numbers(config, {name: allowed for name, allowed in NUMBERS.items() if name in defaults})
    _check_scheduler(config)
    _check_checkpointing(config)
    _check_accelerator(config)
    _check_reports(config)
    _check_together(config)
    _check_caches(config)


def check_devices(config: Any) -> None:
    """Refuse several GPUs in one process, which transformers would scatter a batch over.

    Raises:
        ValueError: with the line to type instead.
    """
    if config.n_gpu > 1:
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES: found {config.n_gpu} GPUs in one process, expected one a process, since packed "
            f"sequences cannot be scattered; start it by 'torchrun --nproc_per_node {config.n_gpu} -m bpo_fast train "
            "...', or set CUDA_VISIBLE_DEVICES=0."
        )


def check_processes(config: Any) -> None:
    """Refuse processes that a launcher has started together and that would each train alone.

    Raises:
        ValueError: with what to add.
    """
    launched = os.environ.get("WORLD_SIZE", "1")
    if launched != "1" and config.world_size == 1:
        raise ValueError(
            f"use_cpu: found {config.use_cpu} in one of {launched} processes on {config.device.type}, expected True "
            "where there is no GPU, or each of them would train alone; add --use_cpu, or start one process."
        )


def check_batch(config: Any, num_examples: int) -> None:
    """Refuse a batch that so many examples never fill, where only whole ones are trained on.

    Raises:
        ValueError: no step would be trained.
    """
    batch = config.per_device_train_batch_size * config.world_size
    if config.dataloader_drop_last and num_examples < batch:
        raise ValueError(
            f"per_device_train_batch_size: found batches of {batch} for {num_examples} pairs, expected at least one "
            "whole batch with dataloader_drop_last; lower it, or leave dataloader_drop_last out."
        )


def _default(item):
    return item.default if item.default_factory is MISSING else item.default_factory()


def _check_flags(config):
    """Any text is true to Python, "no" too."""
    for name, hint in get_type_hints(type(config)).items():
        kinds = set(get_args(hint) or (hint,))
        value = getattr(config, name, None)
        if bool in kinds <= {bool, type(None)} and not isinstance(value, bool | None):
            raise TypeError(f"{name}: found {value!r}, expected True or False.")


def _check_scheduler(config):
    """The scheduler is made after the model was loaded; its arguments are looked at here."""
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
    from transformers.trainer_utils import SchedulerType

    scheduler = SchedulerType(config.lr_scheduler_type)
    if config.warmup_steps and scheduler.value in ("constant", "reduce_lr_on_plateau", "greedy"):
        instead = "; use 'constant_with_warmup'" if scheduler.value == "constant" else ""
        raise ValueError(
            f"warmup_steps: found {config.warmup_steps} with lr_scheduler_type '{scheduler.value}', expected 0, since "
            f"it has no warmup{instead}."
        )
    kwargs = _read_map(config, "lr_scheduler_kwargs")
    parameters = signature(TYPE_TO_SCHEDULER_FUNCTION[scheduler]).parameters
    known = set(parameters) - {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    any_name = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values())
    for name, value in kwargs.items():
        if name not in known and not any_name:
            raise ValueError(
                f"lr_scheduler_kwargs: found {name!r}, expected {' or '.join(map(repr, sorted(known))) or 'nothing'} "
                f"for lr_scheduler_type '{scheduler.value}'."
            )
        if isinstance(value, str) and _is_number(value):
            raise ValueError(
                f"lr_scheduler_kwargs: found the text {value!r} for {name}, expected a number; take the quotes off."
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"lr_scheduler_kwargs: found {value!r} for {name}, expected a finite number.")


def _read_map(config, option):
    """The map of an option that may be JSON on the command line; empty for None."""
    value = getattr(config, option, None)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(
                f'{option}: found {value!r}, expected a map from names to values, as JSON {{"name": value}}.'
            ) from None
    if not isinstance(value, dict | None):
        raise TypeError(f"{option}: found {value!r}, expected a map from names to values.")
    return value or {}


def _check_checkpointing(config):
    from torch.utils.checkpoint import checkpoint

    # Two names each: transformers' older one, and the newer, which decides where it is set.
    newer = getattr(config, "activation_checkpointing", None)
    on = config.gradient_checkpointing if newer is None else newer
    parameters = signature(checkpoint).parameters.values()
    known = {parameter.name for parameter in parameters if parameter.kind is Parameter.KEYWORD_ONLY}
    known |= {"preserve_rng_state", "every_n_layers", "offload"}
    for option in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        for name in (given := _read_map(config, option)):
            if name not in known:
                raise ValueError(f"{option}: found {name!r}, expected one of {', '.join(sorted(known))}.")
        if given not in ({}, CHECKPOINTING) and not on:
            raise ValueError(f"{option}: found {given} without gradient_checkpointing, expected None; leave it out.")
        if given not in ({}, CHECKPOINTING) and config.checkpointing is not None:
            raise ValueError(
                f"{option}: found {given} with checkpointing {config.checkpointing!r}, expected None; leave one out."
            )
    if config.checkpointing is not None:
        from bpo_fast.models.checkpointing import check_mode

        check_mode(config.checkpointing)


def _check_accelerator(config):
    from transformers.trainer_pt_utils import AcceleratorConfig

    value = config.accelerator_config
    if isinstance(value, str) and not value.startswith("{"):
        if not os.path.isfile(value):
            raise FileNotFoundError(f"accelerator_config: found no file '{value}', expected a JSON file or a map.")
    elif isinstance(value, str | dict):
        known = [item.name for item in fields(AcceleratorConfig)]
        for name in _read_map(config, "accelerator_config"):
            if name not in known:
                raise ValueError(f"accelerator_config: found {name!r}, expected one of {', '.join(known)}.")


def _check_reports(config):
    """transformers looks at these after the model was loaded."""
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    chosen = [config.report_to] if isinstance(config.report_to, str) else list(config.report_to)
    here = [*get_available_reporting_integrations(), "flyte", "all", "none"]  # nothing tells whether there is flyte
    for name in chosen:
        if name not in here:
            remedy = f"; pip install {name.replace('_', '-')}" if name in INTEGRATION_TO_CALLBACK else ""
            raise ValueError(f"report_to: found {name!r}, expected one of {', '.join(here)}{remedy}.")


def _is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_together(config):
    from transformers.utils import is_torch_bf16_gpu_available

    if config.bf16 and not config.use_cpu and not is_torch_bf16_gpu_available():
        raise ValueError(
            "bf16: found True and no GPU that computes in it, expected False; set bf16 to false, or use_cpu to true."
        )
    if config.keep_dequantized and (not config.fused_lora or config.checkpointing_mode in ("none", "selective")):
        raise ValueError(
            "keep_dequantized: found True without fused_lora or with a checkpointing that runs no linear again, "
            "expected False; set fused_lora to true and checkpointing to full, offload or every_N."
        )
    evaluates = config.eval_strategy != "no"
    if config.eval_steps is not None and config.eval_strategy != "steps":
        # TrainingArguments fills eval_steps in for "steps" alone, so a copy has it only there.
        raise ValueError(
            f"eval_steps: found {config.eval_steps} with eval_strategy '{_text(config.eval_strategy)}', expected "
            "None; set eval_strategy to 'steps'."
        )
    if config.save_strategy == "best" and not (evaluates and config.metric_for_best_model):
        raise ValueError(
            "save_strategy: found 'best' without eval_strategy and metric_for_best_model, expected both; set them."
        )
    for name in ("load_best_model_at_end", "eval_delay"):
        if getattr(config, name) and not evaluates:
            raise ValueError(f"{name}: found {getattr(config, name)!r} without evaluations; set eval_strategy.")
    chooses = config.load_best_model_at_end or config.save_strategy == "best"
    chooses = chooses or _text(config.lr_scheduler_type) in ("reduce_lr_on_plateau", "greedy")
    for name in ("metric_for_best_model", "greater_is_better"):
        if getattr(config, name) is not None and not chooses:
            raise ValueError(
                f"{name}: found {getattr(config, name)!r} and nothing that asks for the best, expected None; set "
                "load_best_model_at_end."
            )
    optim = _text(config.optim)
    if config.optim_args and (optim == "adafactor" or re.fullmatch("adamw_torch(_fused|_xla|_npu_fused)?", optim)):
        raise ValueError(
            f"optim_args: found {config.optim_args!r} with optim '{optim}', expected None, since it does not read "
            "them; use adam_beta1, adam_beta2, adam_epsilon and weight_decay."
        )
    if config.optim_args and not re.fullmatch(r"[^=,]+=[^=,]+(,[^=,]+=[^=,]+)*", config.optim_args):
        raise ValueError(f"optim_args: found {config.optim_args!r}, expected name=value,name=value.")
    if not config.dataloader_num_workers:
        for name in ("persistent_workers", "multiprocessing_context", "prefetch_factor"):
            name = f"dataloader_{name}"
            if getattr(config, name, None):
                raise ValueError(
                    f"{name}: found {getattr(config, name)!r} without workers, expected None; set "
                    "dataloader_num_workers."
                )


def _check_caches(config):
    if config.cache_dir is None:
        return
    if not isinstance(config.cache_dir, str | os.PathLike):
        raise TypeError(f"cache_dir: found {config.cache_dir!r}, expected the path of a folder.")
    if not (config.precompute_ref_log_probs or config.cache_image_features):
        raise ValueError(
            f"cache_dir: found '{config.cache_dir}' and nothing to cache, expected None; set precompute_ref_log_probs "
            "or cache_image_features."
        )


def _text(value):
    """The text of an enumeration's member, or the text itself."""
    return getattr(value, "value", value)
