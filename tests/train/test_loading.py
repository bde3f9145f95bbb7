"""Batches from worker processes: the same training, and a sentence for what goes wrong in them."""

import multiprocessing
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from peft import LoraConfig
from tiny_models import make_llava, make_pairs, make_processor
from transformers import TrainerCallback

from bpo_fast import BPOConfig, BPOTrainer
from bpo_fast.train import loading
from bpo_fast.train.loading import Waiting, default_num_workers


def make_trainer(folder, pairs=None, callbacks=None, **options):
    options = {"max_steps": 6, "save_strategy": "no", "dataloader_num_workers": 0} | options
    return BPOTrainer(
        model=make_llava(),
        args=BPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **options,
        ),
        train_dataset=pairs or Dataset.from_list(make_pairs(4)),
        eval_dataset=Dataset.from_list(make_pairs(2, seed=5)),
        processing_class=make_processor(),
        callbacks=callbacks,
        peft_config=LoraConfig(r=2, lora_dropout=0.2),
    )


def adapter(trainer):
    return {name: x.detach().clone() for name, x in trainer.model.named_parameters() if x.requires_grad}


def assert_same(found, expected):
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


# Three epochs of two steps, with dropout: a random number drawn anywhere else would change what comes after it.
RANDOM = {"disable_dropout": False}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("none"), **RANDOM)
    trainer.train()
    return adapter(trainer)


@pytest.mark.parametrize(
    "options",
    [
        {"dataloader_num_workers": 1},
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": False},
        {"eval_strategy": "steps", "eval_steps": 1},
    ],
)
def test_neither_workers_nor_evaluations_change_a_training(tmp_path, expected, options):
    trainer = make_trainer(tmp_path, **RANDOM, **options)
    trainer.train()
    assert_same(adapter(trainer), expected)


def test_a_run_resumed_in_an_epoch_with_workers_is_the_one_without(tmp_path, expected):
    options = {**RANDOM, "save_strategy": "steps", "save_steps": 3}
    make_trainer(tmp_path, **options).train()
    trainer = make_trainer(tmp_path, **options, dataloader_num_workers=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(adapter(trainer), expected)


def test_workers_live_from_epoch_to_epoch_unless_told_otherwise(tmp_path):
    assert make_trainer(tmp_path).args.dataloader_persistent_workers is False
    trainer = make_trainer(tmp_path, dataloader_num_workers=1)
    loader = trainer.get_train_dataloader()
    assert loader.base_dataloader.persistent_workers
    assert not make_trainer(tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=False).args.to_dict()[
        "dataloader_persistent_workers"
    ]


@pytest.mark.parametrize(
    ("cores", "processes", "on_gpu", "workers"),
    [(2, 1, False, 0), (1, 1, True, 1), (2, 1, True, 1), (4, 1, True, 3), (64, 1, True, 4), (16, 8, True, 1)],
)
def test_default_numbers_of_workers(monkeypatch, cores, processes, on_gpu, workers):
    monkeypatch.setattr(loading, "available_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert default_num_workers(on_gpu) == workers


class AtStep(TrainerCallback):
    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def test_a_worker_that_is_killed_is_told_in_a_sentence(tmp_path):
    def kill():
        (worker,) = [process for process in multiprocessing.active_children() if process.name.startswith("Process-")]
        os.kill(worker.pid, signal.SIGKILL)

    trainer = make_trainer(
        tmp_path, callbacks=[AtStep(1, kill)], dataloader_num_workers=1, dataloader_prefetch_factor=1, max_steps=40
    )
    with pytest.raises(ChildProcessError, match="dataloader_num_workers: found that a worker process") as told:
        trainer.train()
    assert "killed by signal: Killed" in str(told.value) or "exited unexpectedly" in str(told.value)
    assert "\n" not in str(told.value)
    assert str(told.value).endswith("with fewer workers if memory ran out.")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_went_bad_after_the_check_names_its_row(tmp_path, num_workers):
    pairs = make_pairs(8)
    for number, pair in enumerate(pairs):
        pair["images"][0].save(tmp_path / f"{number}.png")
        pair["images"] = [str(tmp_path / f"{number}.png")]
    dataset = Dataset.from_list(pairs).cast_column("images", [ImageFeature()])
    trainer = make_trainer(
        tmp_path / "run",
        dataset,
        [AtStep(1, lambda: (tmp_path / "5.png").write_bytes(b"no image"))],
        dataloader_num_workers=num_workers,
        dataloader_prefetch_factor=1 if num_workers else None,
        max_steps=20,
    )
    with pytest.raises(
        ValueError, match=r"^row 5: found that it cannot be read any more \(UnidentifiedImageError: "
    ) as e:
        trainer.train()
    assert "\n" not in str(e.value)
    assert str(e.value).endswith("bring its image back, and the same command resumes.")


def test_the_share_of_time_that_is_waited_for_batches(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(loading.time, "perf_counter", lambda: clock.now)
    waiting = Waiting()
    for wait, compute in ((1.0, 2.0), (0.5, 0.5)):
        with waiting.waited():
            clock.now += wait
        clock.now += compute
    assert waiting.take() == (1.5, 4.0)
    clock.now += 2
    assert waiting.take() == (0.0, 2.0)


def test_it_is_logged_at_every_step(tmp_path, monkeypatch):
    monkeypatch.setattr(Waiting, "take", lambda self: (3.0, 4.0))
    trainer = make_trainer(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2)
    trainer.train()
    found = [entry.get("data_wait") for entry in trainer.state.log_history]
    assert found == [0.75, 0.75, None, None]  # two steps, an evaluation, the end
