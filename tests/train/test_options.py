"""Every option of transformers' TrainingArguments is taken, or refused with a sentence."""

import re
from dataclasses import fields, replace
from enum import Enum
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments

from bpo_fast import BPOConfig
from bpo_fast.train.options import NUMBERS, REFUSED, REFUSED_VALUES, check_processes

# Taken, with transformers' own meaning and checks. A field of a newer transformers is in none of these lists: find out
# what BPOTrainer makes of it, and put it into one.
TAKEN = {
    *("output_dir", "lr_scheduler_type", "lr_scheduler_kwargs", "optim_args"),
    *("bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32"),
    *("activation_checkpointing", "activation_checkpointing_kwargs"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
    *("logging_strategy", "logging_first_step", "log_on_each_node"),
    *("log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name", "project"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("eval_strategy", "prediction_loss_only", "eval_on_start"),
    *("save_strategy", "save_on_each_node"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("restore_callback_states_from_checkpoint", "full_determinism", "use_cpu", "accelerator_config"),
    *("dataloader_drop_last", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_multiprocessing_context", "remove_unused_columns", "use_liger_kernel"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
    *("ddp_backend", "ddp_timeout", "debug", "skip_memory_metrics", "resume_from_checkpoint", "local_rank"),
}
FIELDS = {item.name: item for item in fields(TrainingArguments) if item.init}

# A value other than the default for each option that is refused.
OTHER = {
    **dict.fromkeys(REFUSED, True),
    "label_smoothing_factor": 0.1,
    "average_tokens_across_devices": False,
    "torch_compile_backend": "eager",
    "torch_compile_mode": "default",
    "liger_kernel_config": {"rope": True},
    "logging_nan_inf_filter": True,
    "neftune_noise_alpha": 5.0,
    "include_num_input_tokens_seen": "all",
    "eval_do_concat_batches": False,
    "eval_accumulation_steps": 2,
    "include_for_metrics": ["loss"],
    "label_names": ["labels"],
    "hub_token": "x",
    "hub_model_id": "x",
    "hub_strategy": "end",
    "hub_revision": "x",
    "dataloader_in_order": False,
    "parallelism_config": object(),
    "fsdp_config": {"version": 2},
    "deepspeed": {"zero_optimization": {"stage": 3}},
    "optim_target_modules": "all-linear",
    "length_column_name": "n",
}


def config(**options):
    return BPOConfig(**{"use_cpu": True, "report_to": "none"} | options)


def test_every_option_was_looked_at():
    lists = [TAKEN, set(REFUSED), set(REFUSED_VALUES), set(NUMBERS) - {"max_length", "token_budget", "noise_step"}]
    assert sum(map(len, lists)) == len(set().union(*lists)), "an option in two lists"
    assert set().union(*lists) == set(FIELDS)


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_without_effect_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"^{name}: found .*, expected .*: .*\.$") as caught:
        config(**{name: OTHER[name]})
    assert REFUSED[name] in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in REFUSED_VALUES for value in REFUSED_VALUES[name]]
)
def test_a_value_without_effect_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: found '{value}', expected another value: .*\.$"):
        config(**{name: value})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eval_strategy": "steps", "eval_steps": 5},
        {"activation_checkpointing": False},
        {"gradient_checkpointing_kwargs": {"every_n_layers": 2}},
        {"eval_strategy": "epoch", "load_best_model_at_end": True, "save_strategy": "epoch"},
        {"eval_strategy": "epoch", "save_strategy": "best", "metric_for_best_model": "rewards/margins"},
        {"eval_strategy": "epoch", "lr_scheduler_type": "reduce_lr_on_plateau"},
        {"gradient_checkpointing": False, "save_steps": 0.1, "warmup_steps": 0.03, "max_steps": 7},
    ],
)
def test_a_copy_of_a_configuration_is_taken(options):
    first = config(**options)
    second = replace(first)
    for name in FIELDS:
        if name != "accelerator_config":
            assert getattr(first, name) == getattr(second, name), name


def test_what_a_script_for_trl_sets_is_taken():
    assert config(remove_unused_columns=False, prediction_loss_only=True, max_steps=-1).max_steps == -1
    assert config(report_to=None).report_to == []
    assert config(save_strategy="no", eval_strategy="no", logging_steps=1.0).logging_steps == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -2, "3", True])
@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_is_infinite_negative_or_text(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: found {re.escape(repr(value))}, expected .*\.$"):
        config(**{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"gradient_accumulation_steps": 0},
            "gradient_accumulation_steps: found 0, expected a whole number of at leas",
        ),
        (
            {"per_device_train_batch_size": 0},
            "per_device_train_batch_size: found 0, expected a whole number of at lea",
        ),
        (
            {"per_device_train_batch_size": 2.0},
            "per_device_train_batch_size: found 2.0, expected a whole number of at",
        ),
        ({"max_steps": 0}, "max_steps: found 0, expected a whole number of at least 1, or -1 for num_train_epochs."),
        ({"num_train_epochs": 0}, "num_train_epochs: found 0, expected a positive number."),
        ({"learning_rate": 0.0}, "learning_rate: found 0.0, expected a positive number."),
        ({"save_steps": 0}, "save_steps: found 0, expected a share of all steps below 1, or a whole number."),
        ({"save_steps": 1.5}, "save_steps: found 1.5, expected a share of all steps below 1, or a whole number."),
        (
            {"warmup_steps": 1.5},
            "warmup_steps: found 1.5, expected 0, a share of all steps below 1, or a whole number.",
        ),
        (
            {"save_total_limit": 0},
            "save_total_limit: found 0, expected a whole number of at least 1, or None for all.",
        ),
        ({"adam_beta2": 1.0}, "adam_beta2: found 1.0, expected a number in [0, 1)."),
        ({"seed": 2**32}, "seed: found 4294967296, expected a whole number from 0 to 2**32 - 1."),
        ({"token_budget": 0}, "token_budget: found 0, expected a whole number of at least 1."),
        ({"average_logps": "no"}, "average_logps: found 'no', expected True or False."),
        ({"disable_dropout": "false"}, "disable_dropout: found 'false', expected True or False."),
        ({"bf16": 1}, "bf16: found 1, expected True or False."),
        ({"lr_scheduler_kwargs": {"min_lr": 1}}, "lr_scheduler_kwargs: found 'min_lr', expected nothing for lr_sched"),
        ({"lr_scheduler_kwargs": "{min_lr"}, "lr_scheduler_kwargs: found '{min_lr', expected a map from names to"),
        ({"gradient_checkpointing_kwargs": "{a"}, "gradient_checkpointing_kwargs: found '{a', expected a map from na"),
        ({"activation_checkpointing_kwargs": "3"}, "activation_checkpointing_kwargs: found 3, expected a map from"),
        ({"accelerator_config": {"a": 1}}, "accelerator_config: found 'a', expected one of split_batches, "),
        ({"accelerator_config": '{"a": 1}'}, "accelerator_config: found 'a', expected one of split_batches, "),
        (
            {"accelerator_config": "none.json"},
            "accelerator_config: found no file 'none.json', expected a JSON file or",
        ),
        ({"gradient_checkpointing_kwargs": {"foo": 1}}, "gradient_checkpointing_kwargs: found 'foo', expected one"),
        (
            {"gradient_checkpointing_kwargs": {"every_n_layers": 2}, "gradient_checkpointing": False},
            "gradient_checkpointing_kwargs: found {'every_n_layers': 2} without gradient_checkpointing, expected",
        ),
        ({"keep_dequantized": True, "fused_lora": False}, "keep_dequantized: found True without fused_lora"),
        (
            {"keep_dequantized": True, "checkpointing": "selective"},
            "keep_dequantized: found True without fused_lora or",
        ),
        (
            {"keep_dequantized": True, "gradient_checkpointing": False},
            "keep_dequantized: found True without fused_lor",
        ),
        (
            {"checkpointing": "half"},
            "checkpointing: found 'half', expected one of none, selective, every_N, full, offl",
        ),
        ({"checkpointing": "every_1"}, "checkpointing: found 'every_1', expected one of none, selective, every_N, f"),
        ({"checkpointing": "every_N"}, "checkpointing: found 'every_N', expected one of none, selective, every_N, f"),
        (
            {"gradient_checkpointing_kwargs": {"every_n_layers": 2}, "checkpointing": "full"},
            "gradient_checkpointing_kwargs: found {'every_n_layers': 2} with checkpointing 'full', expected None;",
        ),
        ({"report_to": "nothing"}, "report_to: found 'nothing', expected one of "),
        ({"report_to": ["none", "wandb"]}, "report_to: found 'wandb', expected one of "),
        ({"fp16": True}, "fp16: found True on a CPU, expected False; set bf16 to true, or leave both out."),
        ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor: found 2 without workers, expected None;"),
        ({"lr_scheduler_kwargs": "[1]"}, "lr_scheduler_kwargs: found [1], expected a map from names to values."),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr": "1e-7"}'},
            "lr_scheduler_kwargs: found the text '1e-7' for min_lr, expected a number; take the quotes off.",
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": float("nan")}},
            "lr_scheduler_kwargs: found nan for min_lr, expected a finite number.",
        ),
        (
            {"lr_scheduler_type": "constant", "warmup_steps": 3},
            "warmup_steps: found 3 with lr_scheduler_type 'constant', expected 0, since it has no warmup; use 'consta",
        ),
        ({"optim_args": "a=1"}, "optim_args: found 'a=1' with optim 'adamw_torch"),
        ({"optim": "sgd", "optim_args": "momentum"}, "optim_args: found 'momentum', expected name=value,name=value."),
        (
            {"eval_steps": 3},
            "eval_steps: found 3 with eval_strategy 'no', expected None; set eval_strategy to 'steps'.",
        ),
        (
            {"save_strategy": "best"},
            "save_strategy: found 'best' without eval_strategy and metric_for_best_model, exp",
        ),
        (
            {"save_strategy": "best", "eval_strategy": "epoch"},
            "save_strategy: found 'best' without eval_strategy and metric_for_best_model, expected both; set them.",
        ),
        ({"load_best_model_at_end": True, "save_strategy": "no"}, "load_best_model_at_end: found True without evalua"),
        ({"eval_delay": 3}, "eval_delay: found 3 without evaluations; set eval_strategy."),
        (
            {"metric_for_best_model": "loss"},
            "metric_for_best_model: found 'loss' and nothing that asks for the best, ",
        ),
        (
            {"greater_is_better": True},
            "greater_is_better: found True and nothing that asks for the best, expected Non",
        ),
        (
            {"dataloader_persistent_workers": True},
            "dataloader_persistent_workers: found True without workers, expecte",
        ),
        (
            {"accelerator_config": {"split_batches": True}},
            "accelerator_config: found split_batches=True, expected Fal",
        ),
        (
            {"bf16": True, "use_cpu": False},
            "bf16: found True and no GPU that computes in it, expected False; set bf16",
        ),
    ],
    ids=str,
)
def test_a_mistake_is_named(options, message, monkeypatch):
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["trackio"])
    monkeypatch.setattr("transformers.utils.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as caught:
        config(**options)
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launcher_that_shards_the_model_is_refused(name, monkeypatch):
    monkeypatch.setenv(name, "true")
    with pytest.raises(ValueError, match=rf"^{name}: found 'true', expected it unset: .*torchrun\.$"):
        config()


def test_scheduler_arguments_arrive_as_numbers():
    options = {"lr_scheduler_type": "cosine_with_min_lr"}
    for kwargs in ({"min_lr": 1e-7}, '{"min_lr": 1e-7}'):
        assert config(**options, lr_scheduler_kwargs=kwargs).lr_scheduler_kwargs == {"min_lr": 1e-7}


def test_refused_options_say_why_in_one_sentence():
    for why in [*REFUSED.values(), *(why for values in REFUSED_VALUES.values() for why in values.values())]:
        assert why[0].islower()
        assert not why.endswith(".")
    assert not isinstance(config().save_strategy, Enum) or config().save_strategy == "steps"


def test_processes_that_would_each_train_alone_are_refused(monkeypatch):
    # Without a GPU transformers takes several processes for one training only where it is told to use the CPU.
    found = {"use_cpu": False, "device": torch.device("cpu"), "world_size": 1}
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    check_processes(SimpleNamespace(**found))
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_processes(SimpleNamespace(**found | {"world_size": 2}))
    with pytest.raises(ValueError, match="use_cpu: found False in one of 2 processes on cpu, expected True"):
        check_processes(SimpleNamespace(**found))
