"""What a resumed training may change, and what it may not."""

from dataclasses import fields

import pytest

from bpo_fast import BPOConfig
from bpo_fast.train.options import REFUSED
from bpo_fast.train.settings import HARMLESS, deciding_settings, differences


def config(**options):
    return BPOConfig(output_dir="unused", use_cpu=True, **options)


@pytest.mark.parametrize(
    ("option", "value", "shown"),
    [
        ("adam_beta1", 0.8, "adam_beta1 is 0.9 there and 0.8 here"),
        ("adam_beta2", 0.95, "adam_beta2 is 0.999 there and 0.95 here"),
        ("adam_epsilon", 1e-6, "adam_epsilon is 1e-08 there and 1e-06 here"),
        ("optim", "adafactor", "optim is 'adamw_torch_fused' there and 'adafactor' here"),
        ("max_grad_norm", 0.5, "max_grad_norm is 1.0 there and 0.5 here"),
        ("seed", 1, "seed is 42 there and 1 here"),
        ("data_seed", 1, "data_seed is None there and 1 here"),
        ("bf16", True, "bf16 is False there and True here"),
        ("lr_scheduler_type", "cosine", "lr_scheduler_type is 'linear' there and 'cosine' here"),
        ("lr_scheduler_kwargs", {}, "lr_scheduler_kwargs is None there and {} here"),
        ("warmup_steps", 3, "warmup_steps is 0 there and 3 here"),
        ("learning_rate", 1e-5, "learning_rate is 1e-06 there and 1e-05 here"),
        ("weight_decay", 0.1, "weight_decay is 0.0 there and 0.1 here"),
        ("beta", 0.2, "beta is 0.1 there and 0.2 here"),
        ("loss_type", ["hinge"], "loss_type is ['sigmoid'] there and ['hinge'] here"),
        ("max_length", 512, "max_length is 1024 there and 512 here"),
        ("num_train_epochs", 1, "num_train_epochs is 3.0 there and 1 here"),
        ("max_steps", 7, "max_steps is -1 there and 7 here"),
        ("per_device_train_batch_size", 4, "per_device_train_batch_size is 8 there and 4 here"),
        ("gradient_accumulation_steps", 4, "gradient_accumulation_steps is 1 there and 4 here"),
        ("disable_dropout", False, "disable_dropout is True there and False here"),
        ("dataloader_drop_last", True, "dataloader_drop_last is False there and True here"),
        ("full_determinism", True, "full_determinism is False there and True here"),
    ],
)
def test_what_changes_the_result_is_named_with_both_values(option, value, shown):
    found = differences(deciding_settings(config()), deciding_settings(config(**{option: value})))
    # Some options bring others with them.
    assert shown in found
    assert all(option in phrase or "accelerator_config" in phrase for phrase in found)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("logging_steps", 3),
        ("logging_strategy", "no"),
        ("disable_tqdm", True),
        ("report_to", "none"),
        ("run_name", "b"),
        ("save_steps", 7),
        ("save_strategy", "epoch"),
        ("save_total_limit", 1),
        ("dataloader_num_workers", 2),
        ("token_budget", 4096),
        ("gradient_checkpointing", False),
        ("checkpointing", "selective"),
        ("eval_strategy", "epoch"),
        ("per_device_eval_batch_size", 1),
    ],
)
def test_what_does_not_may_differ(option, value):
    assert differences(deciding_settings(config()), deciding_settings(config(**{option: value}))) == []


def test_every_harmless_name_is_an_option():
    assert set(HARMLESS) <= {field.name for field in fields(BPOConfig)}
    assert HARMLESS.isdisjoint(REFUSED)
