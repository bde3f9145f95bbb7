"""Caches of image features and reference log-probs: the same training, and no image or reference in a step."""

import pytest
from datasets import Dataset, Image
from peft import LoraConfig
from tiny_models import make_llava, make_pairs, make_processor
from transformers import TrainerCallback

from bpo_fast import BPOConfig, BPOTrainer

TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
BOTH = {"cache_image_features": True, "precompute_ref_log_probs": True}
LOGGED = ("loss", "rewards/margins", "logps/chosen", "logps/rejected", "entropy", "grad_norm")


def make_trainer(folder, pairs=None, model=None, processor=None, eval_pairs=None, **options):
    settings = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 7,
    } | options
    return BPOTrainer(
        model=model or make_llava(),
        args=BPOConfig(**settings),
        train_dataset=pairs or Dataset.from_list(make_pairs(24)),
        eval_dataset=eval_pairs,
        processing_class=processor or make_processor(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS),
    )


def train(folder, **options):
    trainer = make_trainer(folder, **options)
    trainer.train()
    return trainer


def history(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(
    "options",
    [
        BOTH,
        {"cache_image_features": True, "token_budget": 40},
        {"precompute_ref_log_probs": True, "max_length": 12},
        BOTH | {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.3, "dataloader_num_workers": 2},
        {"cache_image_features": True, "loss_type": "sft"},
    ],
    ids=["both", "features", "reference", "workers", "sft"],
)
def test_the_same_training_as_without(tmp_path, options):
    """50 steps with each cache, in fp32: losses and all else that is logged within 1e-5 of a sum of log-probs."""
    steps = 50 if options == BOTH else 6
    live = {name: value for name, value in options.items() if name not in (*BOTH, "dataloader_num_workers")}
    expected = train(tmp_path, max_steps=steps, **live)
    kept = train(tmp_path, max_steps=steps, cache_dir=str(tmp_path / "cache"), **options)
    assert len(history(kept, "loss")) == steps
    assert history(kept, "loss") == pytest.approx(history(expected, "loss"), abs=1e-5)
    for name in LOGGED:
        assert history(kept, name) == pytest.approx(history(expected, name), abs=1e-4, rel=1e-5), name


class Forbid(TrainerCallback):
    """From the first step on, whatever is kept may not be computed."""

    def __init__(self, trainer, monkeypatch):
        self.trainer, self.monkeypatch = trainer, monkeypatch

    def on_train_begin(self, *args, **kwargs):
        def never(*args, **kwargs):
            raise AssertionError("it was kept")

        trainer = self.trainer
        self.monkeypatch.setattr(trainer.model.get_base_model(), "get_image_features", never)
        self.monkeypatch.setattr(trainer, "_reference", never)
        self.monkeypatch.setattr(trainer.processing_class.image_processor, "preprocess", never)
        self.monkeypatch.setattr(Image, "decode_example", never)  # of datasets


def test_a_step_runs_neither_the_vision_part_nor_the_reference_and_decodes_no_image(tmp_path, monkeypatch):
    for pairs in (Dataset.from_list(make_pairs(10)), make_pairs(10)):
        more = {"first": make_pairs(3, seed=1), "second": Dataset.from_list(make_pairs(3, seed=2))}
        evaluating = {"eval_strategy": "steps", "eval_steps": 2, "cache_dir": str(tmp_path / "cache")}
        trainer = make_trainer(tmp_path, pairs=pairs, eval_pairs=more, **evaluating, **BOTH)
        with monkeypatch.context() as patches:
            trainer.add_callback(Forbid(trainer, patches))
            trainer.train()
        assert len(history(trainer, "eval_first_loss")) == len(history(trainer, "eval_second_loss")) == 2
        # Examples of which nothing is kept are computed as ever.
        assert trainer.evaluate(make_pairs(3, seed=1))["eval_loss"] == pytest.approx(
            history(trainer, "eval_first_loss")[-1], abs=1e-5
        )


def test_losses_that_read_no_reference_refuse_to_keep_it(tmp_path):
    with pytest.raises(ValueError, match="precompute_ref_log_probs: found True with loss_type"):
        BPOConfig(output_dir=str(tmp_path), use_cpu=True, loss_type="simpo", precompute_ref_log_probs=True)
