"""A loss or a gradient that is not finite stops the run, names step and rows, and reaches no checkpoint."""

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_models import make_llava, make_pairs, make_processor
from transformers import TrainerCallback

from bpo_fast import BPOConfig, BPOTrainer
from bpo_fast.train.finite import FiniteGuard


def test_finite_steps_pass():
    guard = FiniteGuard()
    guard.add_loss([3, 4], torch.tensor(0.5))
    guard.end_step(1, torch.tensor(2.0))
    guard.end_step(2, torch.tensor(math.nan))  # no loss, no step
    guard.check()


def test_the_part_whose_loss_failed_is_named():
    guard = FiniteGuard()
    guard.add_loss([3, 4], torch.tensor(0.5))
    guard.add_loss([9, 7], torch.tensor(math.inf))
    with pytest.raises(ValueError, match=r"loss: found inf at step 5 \(rows 7, 9 of the training data\), expected"):
        guard.end_step(5, torch.tensor(1.0))


def test_a_gradient_that_is_not_finite_names_all_rows_of_its_step():
    guard = FiniteGuard()
    guard.add_loss([2], torch.tensor(0.5))
    guard.add_loss([0], torch.tensor(0.5))
    with pytest.raises(ValueError, match=r"gradient: found a norm of nan at step 1 \(rows 0, 2 of"):
        guard.end_step(1, torch.tensor(math.nan))


class _Poison(TrainerCallback):
    """Makes a weight of the adapter NaN before a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            next(p for p in model.parameters() if p.requires_grad).data[0, 0] = math.nan


def test_a_run_stops_at_the_step_and_keeps_the_good_checkpoints(tmp_path):
    trainer = BPOTrainer(
        model=make_llava(),
        args=BPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            max_steps=8,
            save_steps=1,
            save_total_limit=2,
            learning_rate=1e-2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(make_pairs(6)),
        processing_class=make_processor(),
        peft_config=LoraConfig(r=2),
        callbacks=[_Poison(5)],
    )
    with pytest.raises(ValueError, match=r"loss: found nan at step 5 \(rows \d, \d of the training data\)"):
        trainer.train()
    kept = sorted(folder.name for folder in Path(tmp_path).glob("checkpoint-*"))
    assert kept == ["checkpoint-3", "checkpoint-4"]
    weights = load_file(tmp_path / "checkpoint-4/adapter_model.safetensors")
    assert all(bool(weight.isfinite().all()) for weight in weights.values())
