"""What `bpo-fast train --help` shows, under which headings, and in which words where transformers' are long."""

from dataclasses import fields

from bpo_fast.cli.options import PlanArguments, TrainArguments

_OWN = [item.name for item in fields(TrainArguments)]
_ADAPTER = [name for name in _OWN if name.startswith("lora_")]
_EVALUATION = [name for name in _OWN if name.startswith("eval_")]

_PLANNED = [item.name for item in fields(PlanArguments) if item.name not in _OWN]
PLAN_GROUPS = {
    "plan": dict.fromkeys(["help", "help_all", "config", *_PLANNED]),
    "training": {
        **dict.fromkeys(["quantization", "dtype", "lora_r", "token_budget", "checkpointing"]),
        **dict.fromkeys(["precompute_ref_log_probs", "cache_image_features"]),
        "optim": "Optimizer: adamw_bnb_8bit, adamw_torch_fused, ...",
        "gradient_accumulation_steps": "Batches in an update step.",
    },
}


def train_groups(loss_options: list[str]) -> dict[str, dict[str, str | None]]:
    """Heading -> option -> its help, None for the one that it has.

    Args:
        loss_options: names of the loss's options.
    """
    return {
        "model, data, output": {
            **dict.fromkeys(["help", "help_all", "config"]),
            **dict.fromkeys(name for name in _OWN if name not in (*_ADAPTER, *_EVALUATION)),
            "strict": None,
            "output_dir": "Output folder for checkpoints and adapter; an interrupted run resumes in it.",
        },
        "adapter": dict.fromkeys(_ADAPTER),
        "loss": dict.fromkeys([*loss_options, "noise_step", "noise_target", "noise_schedule"]),
        "training": {
            "learning_rate": None,
            "lr_scheduler_type": "Course of the learning rate after its warmup.",
            "warmup_steps": "Steps of rising learning rate; below 1, a share of all steps.",
            "weight_decay": "Weight decay of the optimizer.",
            "max_grad_norm": "Largest norm of a step's gradient, which is clipped there; 0 does not clip.",
            "num_train_epochs": "Passes over the pairs.",
            "max_steps": "Update steps, in place of num_train_epochs; -1 for those.",
            "per_device_train_batch_size": "Pairs in a batch on each device.",
            "gradient_accumulation_steps": "Batches in an update step.",
            "max_length": None,
            "token_budget": None,
            "disable_dropout": None,
            "gradient_checkpointing": None,
            "checkpointing": None,
            "bf16": None,
            "deterministic_attention": None,
            "use_cpu": "Train on the CPU even where there is a GPU.",
            "seed": "Random seed of the order of pairs, the adapter's first weights and dropout.",
            "dataloader_num_workers": "Processes that prepare batches; 0 does it between steps.",
        },
        "evaluation during training": {
            "eval_strategy": "When to evaluate: at every eval_steps steps, every epoch, or never.",
            "eval_steps": "Update steps between two evaluations; below 1, a share of all; null for logging_steps.",
            **dict.fromkeys(_EVALUATION),
            "per_device_eval_batch_size": "Pairs in a batch of an evaluation.",
        },
        "checkpoints and logs": {
            "save_strategy": "When to save a checkpoint.",
            "save_steps": "Update steps between two checkpoints; below 1, a share of all.",
            "save_total_limit": "Checkpoints to keep, the newest; null keeps all.",
            "resume_from_checkpoint": "Checkpoint to go on from; null takes the newest complete one in output_dir.",
            "logging_steps": None,
            "report_to": "Where metrics go besides the screen: tensorboard, wandb, ..., all or none.",
            "run_name": "Name of the run in those.",
            "disable_tqdm": "Show no progress bars.",
        },
    }
