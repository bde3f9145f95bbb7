"""What decides the result of a training, and what a resumed one may change."""

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from typing import Any

from bpo_fast.train.config import BPOConfig
from bpo_fast.train.options import REFUSED

# Fields of BPOConfig that do not change what a run ends with. All others are compared before a run is resumed, but for
# those that `options.REFUSED` holds to one value.
HARMLESS = frozenset(
    {
        # Where results, checkpoints and logs go, and how often.
        "output_dir",
        "resume_from_checkpoint",
        "logging_strategy",
        "logging_steps",
        "logging_first_step",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "disable_tqdm",
        "report_to",
        "run_name",
        "project",
        "trackio_space_id",
        "trackio_bucket_id",
        "trackio_static_space_id",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "save_on_each_node",
        # Evaluation on the way; `load_best_model_at_end`, by which it would choose the result, is compared.
        "eval_strategy",
        "eval_steps",
        "eval_delay",
        "eval_on_start",
        "per_device_eval_batch_size",
        "prediction_loss_only",
        # How examples reach the device.
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
        "dataloader_multiprocessing_context",
        # Memory against time, with the same result.
        "token_budget",
        "checkpointing",
        "precompute_ref_log_probs",
        "cache_image_features",
        "cache_dir",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "keep_dequantized",
        "torch_empty_cache_steps",
        "deterministic_attention",
        # Watching and waiting.
        "strict",
        "debug",
        "skip_memory_metrics",
        "ddp_timeout",
        "ddp_broadcast_buffers",
        "local_rank",
    }
)


def deciding_settings(config: BPOConfig) -> dict[str, Any]:
    """The fields of a configuration that decide its result, and the number of processes, as JSON values."""
    settings = {field.name: _plain(getattr(config, field.name)) for field in fields(config)}
    settings = {name: value for name, value in settings.items() if name not in HARMLESS and name not in REFUSED}
    return settings | {"num_processes": config.world_size}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs between the settings of a run on disk and of one to come, a phrase each.

    A name that only one side has is a setting that its release of the library knows; it differs unless it is unset.

    Example:
        >>> differences({"seed": 0, "beta": 0.1}, {"seed": 1, "beta": 0.1, "tf32": None})
        ['seed is 0 there and 1 here']
    """
    return [
        f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
        for name in here | there
        if there.get(name) != here.get(name)
    ]


def _plain(value):
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
