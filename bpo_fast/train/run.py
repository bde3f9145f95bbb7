"""A training run in a folder of its own: from pairs to an adapter, resumable, and done once.

The folder holds `run.json` (settings, and how it ended), the trainer's checkpoints, and in the end the adapter.
"""

import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from bpo_fast.data.pairs import dataset_fingerprint, load_preference_dataset
from bpo_fast.models.load import load_model, load_processor
from bpo_fast.models.weights import weights_fingerprint
from bpo_fast.runs.files import write_json
from bpo_fast.runs.folder import locked_folder, read_run
from bpo_fast.runs.interrupts import Interrupted
from bpo_fast.train.card import public_name, write_card
from bpo_fast.train.checkpoints import check_checkpoint, last_complete_checkpoint, not_written
from bpo_fast.train.collator import PreferenceCollator
from bpo_fast.train.config import BPOConfig
from bpo_fast.train.distributed import end_processes
from bpo_fast.train.settings import deciding_settings, differences
from bpo_fast.train.stopping import StopOnSignal
from bpo_fast.train.trainer import BPOTrainer

RECORD_FILE = "run.json"


@dataclass(frozen=True)
class Trained:
    """How a run ended: pairs trained on, update steps, and whether it had ended before this call."""

    num_pairs: int
    num_steps: int
    was_finished: bool


def train(
    config: BPOConfig,
    model: str,
    dataset: str | os.PathLike,
    peft_config: LoraConfig,
    *,
    image_folder: str | os.PathLike | None = None,
    eval_dataset: str | os.PathLike | None = None,
    eval_fraction: float | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
    forecast: Callable[[list[tuple[int, int, int]]], str] | None = None,
) -> Trained:
    """Train an adapter into `config.output_dir`, or go on with the run there.

    Args:
        config: training arguments.
        model: path or id of the model.
        dataset: path of the pairs, see `load_preference_dataset`.
        peft_config: the adapter.
        image_folder: folder that the image paths of both data sets start from.
        eval_dataset: path of pairs to evaluate on.
        eval_fraction: share of the pairs that is held out to evaluate on, drawn by `config.seed`.
        model_init_kwargs: further arguments of `load_model`.
        forecast: on a GPU, called before the model is loaded, with the tokens of prefix, chosen and rejected of the
            first batch; what it returns is printed, and what the device held at most is printed at the end.

    Raises:
        ValueError: the folder holds a run that other settings would change, or whatever `forecast` or `BPOTrainer`
            refuses.
        Interrupted: SIGTERM or Ctrl-C; a checkpoint of the step at hand is on disk.
    """
    model_init_kwargs = model_init_kwargs or {}
    pairs = load_preference_dataset(dataset, image_folder=image_folder)
    held_out = None if eval_dataset is None else load_preference_dataset(eval_dataset, image_folder=image_folder)
    settings = {
        "model": weights_fingerprint(model),
        "dataset": dataset_fingerprint(pairs),
        "eval_fraction": eval_fraction,
        **{name: value for name, value in model_init_kwargs.items() if name != "trust_remote_code"},
        **_lora_settings(peft_config),
        **deciding_settings(config),
    }
    if eval_fraction is not None:
        pairs, held_out = _split(pairs, eval_fraction, config.seed)
    folder = Path(config.output_dir)
    is_main = config.process_index == 0
    with locked_folder(folder) if is_main else nullcontext():
        # Looked for once: its files are read whole.
        last = last_complete_checkpoint(folder, report=_say if is_main else None)
        num_steps = _finished_steps(folder, settings, has_checkpoint=last is not None)
        if num_steps is not None:
            return Trained(len(pairs), num_steps, was_finished=True)
        processor = load_processor(model, trust_remote_code=bool(model_init_kwargs.get("trust_remote_code")))
        on_gpu = config.device.type == "cuda"
        if forecast is not None and on_gpu and is_main and (lengths := _first_lengths(config, processor, pairs)):
            _say(forecast(lengths))
        trainer = BPOTrainer(
            model=load_model(
                model, device=config.device, float16_as=torch.bfloat16 if config.bf16 else None, **model_init_kwargs
            ),
            args=config,
            train_dataset=pairs,
            eval_dataset=held_out,
            processing_class=processor,
            peft_config=peft_config,
        )
        checkpoint = config.resume_from_checkpoint or last
        if config.resume_from_checkpoint:
            check_checkpoint(checkpoint)
        if is_main:
            write_json(folder / RECORD_FILE, {"settings": settings})
            if checkpoint:
                _say(f"resuming from {checkpoint}")
        with StopOnSignal() as stop:
            trainer.add_callback(stop)
            trainer.train_from(checkpoint)
        num_pairs, num_steps = len(trainer.train_dataset), trainer.state.global_step
        if on_gpu and is_main:
            held, taken = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            _say(f"Held on the GPU at most: {held / 2**30:.2f} GiB of tensors, {taken / 2**30:.2f} with free blocks.")
        end_processes(trainer)
        if stop.signal is not None and num_steps < trainer.state.max_steps:
            where = f"a checkpoint of step {num_steps:,} is in {folder}; the same command resumes there."
            raise Interrupted(stop.signal, where)
        if is_main:
            made_of = {"name": public_name(dataset), "fingerprint": settings["dataset"], "pairs": num_pairs}
            shown = {name: settings[name] for name in _ON_CARD if settings.get(name) is not None}
            _save_adapter(trainer, folder, {"base_model": model, "settings": shown, "dataset": made_of})
            write_json(folder / RECORD_FILE, {"settings": settings, "num_steps": num_steps})
    return Trained(num_pairs, num_steps, was_finished=False)


def _first_lengths(config, processor, pairs):
    """Tokens of prefix, chosen and rejected of the first batch; None where it cannot be collated as it is."""
    with_rejected = config.loss_config().loss_types != ("sft",)
    collator = PreferenceCollator(processor, image_token_id=-1, max_length=config.max_length)
    if not with_rejected:
        collator.responses = ("chosen",)
    count = min(config.per_device_train_batch_size, len(pairs))
    try:
        (sequence,) = collator([pairs[number] for number in range(count)])["sequences"]
    except (ValueError, OSError):
        return None  # such pairs are told of, and left out, when all are checked
    packing = sequence.packing
    branches = (each if with_rejected else each * 2 for each in packing.branch_lengths)
    return [(prefix, *both) for prefix, both in zip(packing.prefix_lengths, branches, strict=True)]


def _finished_steps(folder, settings, has_checkpoint):
    """The steps of the finished run in `folder`, None where there is none or it goes on; refuses another run's.

    Until its first checkpoint a run has nothing to lose, and any setting and any pair may change.
    """
    record = read_run(folder, record=RECORD_FILE)
    num_steps = None if record is None else record.get("num_steps")
    if record is None or (num_steps is None and not has_checkpoint):
        return None
    found = [_WHOLE.get(phrase.partition(" ")[0], phrase) for phrase in differences(record["settings"], settings)]
    if found:
        raise ValueError(
            f"output_dir: found a run with other settings in '{folder}' ({'; '.join(found)}), expected the same, "
            "since it has a checkpoint already; give the earlier values, or choose another output_dir."
        )
    try:
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt"):
            return num_steps
    except (OSError, SafetensorError):
        return None


# What the adapter's card says of the training.
_ON_CARD = (
    *("loss_type", "loss_weights", "beta", "label_smoothing", "ld_alpha", "lora_r", "lora_alpha", "lora_use_rslora"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps", "seed", "max_length"),
    *("noise_step", "noise_target", "noise_schedule"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_processes", "bf16", "quantization"),
)

# Settings of which only a fingerprint is kept.
_WHOLE = {
    "model": "the model's weights are others",
    "dataset": "the pairs are others: none may be changed, added or left out after the first checkpoint",
}


def _lora_settings(peft_config):
    unsaid = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
    values = {name: value for name, value in peft_config.to_dict().items() if name not in unsaid}
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
    return {name if name.startswith("lora_") else f"lora_{name}": value for name, value in values.items()}


def _split(pairs, eval_fraction, seed):
    num_held_out = round(eval_fraction * len(pairs))
    if not 0 < num_held_out < len(pairs):
        raise ValueError(
            f"eval_fraction: found {eval_fraction} of {len(pairs)} pairs, expected at least one pair held out and one "
            "to train on."
        )
    parts = pairs.train_test_split(test_size=num_held_out, seed=seed)
    return parts["train"], parts["test"]


def _save_adapter(trainer, folder, card):
    """Adapter, processor and card, written apart and moved in, the weights last."""
    parts = folder / ".adapter"
    shutil.rmtree(parts, ignore_errors=True)
    try:
        trainer.model.save_pretrained(parts)
        trainer.processing_class.save_pretrained(parts)
        write_card(parts, **card)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(parts, ignore_errors=True)
        raise OSError(
            f"{folder}: found that the adapter cannot be written ({not_written(error)}), expected room and "
            "leave to write there; the same command writes it from the last checkpoint."
        ) from error
    for path in sorted(parts.iterdir(), key=lambda path: path.name == SAFETENSORS_WEIGHTS_NAME):
        if (folder / path.name).is_dir():
            shutil.rmtree(folder / path.name)
        os.replace(path, folder / path.name)
    parts.rmdir()


def _say(sentence):
    print(sentence, flush=True)
