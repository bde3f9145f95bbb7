"""BPOTrainer: parity with TRL's DPOTrainer, resuming after a kill, SFT, token budget, mistakes."""

import copy
import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import make_llava, make_pairs, make_processor
from transformers import Trainer, TrainerCallback

from bpo_fast import BPOConfig, BPOTrainer
from bpo_fast.train.checkpoints import last_complete_checkpoint

TESTS = str(Path(__file__).resolve().parents[1])
TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
TRL_METRICS = (
    "loss",
    "logps/chosen",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "num_tokens",
)
# Means over tokens. Of accumulated batches TRL takes the mean of their means, here it is the mean over all tokens.
TRL_TOKEN_METRICS = ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")


def settings(output_dir, **options):
    return {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-2,
        "max_steps": 20,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 7,
    } | options


def run(output_dir, pairs=None, trainer_class=BPOTrainer, config_class=BPOConfig, model=None, **options):
    trainer = trainer_class(
        model=model or make_llava(),
        args=config_class(**settings(output_dir, **options)),
        train_dataset=pairs or Dataset.from_list(make_pairs(24)),
        processing_class=make_processor(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS),
    )
    trainer.train()
    return trainer


def history(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid"]},
        {"loss_type": ["sigmoid"], "gradient_accumulation_steps": 2, "max_steps": 6},
        {"loss_type": ["hinge"], "max_steps": 6, "gradient_checkpointing": False},
        {"loss_type": ["ipo"], "max_steps": 6, "beta": 0.5},
        {"loss_type": ["sft"], "max_steps": 6},
        {
            "loss_type": ["sigmoid", "bco_pair", "sft"],
            "loss_weights": [0.8, 0.2, 1.0],
            "ld_alpha": 0.3,
            "max_steps": 6,
        },
        {"loss_type": ["sigmoid_norm"], "f_divergence_type": "js_divergence", "beta": 0.5, "max_steps": 6},
        {"loss_type": ["aot"], "label_smoothing": 0.1, "max_steps": 6},
        {"loss_type": ["sigmoid"], "use_weighting": True, "ld_alpha": 0.5, "max_steps": 6},
    ],
    ids=lambda options: "+".join(options["loss_type"]),
)
def test_parity_with_trl(tmp_path, options):
    """The same script with other import lines: the same batches, losses, rewards, and in the end the same adapter."""
    from trl import DPOConfig, DPOTrainer

    ours = run(tmp_path / "ours", **options)
    theirs = run(tmp_path / "theirs", trainer_class=DPOTrainer, config_class=DPOConfig, **options)
    names = ("loss",) if options["loss_type"] == ["sft"] else TRL_METRICS
    if options["loss_type"] != ["sft"] and "gradient_accumulation_steps" not in options:
        names += TRL_TOKEN_METRICS
    for name in names:
        expected = history(theirs, name)
        assert len(expected) == options.get("max_steps", 20)
        # TRL sums log-probs to about -50 in fp32; rewards are differences of such sums, logged to four digits.
        tolerance = 1e-3 if name.startswith("logps") else 1e-4
        assert history(ours, name) == pytest.approx(expected, abs=tolerance, rel=2e-5), name
    moved = max(abs(margin) for margin in history(theirs, "rewards/margins"))
    assert moved > 0.01, "the run must go somewhere for the comparison to mean anything"


def test_the_first_step_is_ln_2_with_margins_of_zero(tmp_path):
    model = make_llava()
    # A decoder with dropout of its own; an adapter's does nothing as long as the adapter adds zero.
    model.get_decoder().norm = torch.nn.Sequential(model.get_decoder().norm, torch.nn.Dropout(0.5))
    trainer = run(tmp_path, model=model, max_steps=2)
    assert history(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-7)
    assert history(trainer, "rewards/margins")[0] == 0.0
    assert history(trainer, "rewards/margins")[1] != 0.0


def test_a_token_budget_changes_nothing_but_the_sequences(tmp_path):
    losses = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2], "ld_alpha": 0.5}
    whole = run(tmp_path / "a", max_steps=5, **losses)
    parted = run(tmp_path / "b", max_steps=5, token_budget=40, **losses)
    batch = next(iter(parted.get_train_dataloader()))
    assert len(batch["sequences"]) > 1
    for name in TRL_METRICS + TRL_TOKEN_METRICS:
        assert history(parted, name) == pytest.approx(history(whole, name), rel=1e-4, abs=1e-5), name


def test_sft_raises_the_chosen_answers(tmp_path):
    trainer = run(tmp_path, loss_type="sft", max_steps=30)
    chosen = history(trainer, "logps/chosen")
    assert sum(chosen[-5:]) > sum(chosen[:5]) + 5
    assert "rewards/margins" not in trainer.state.log_history[0]


def test_losses_without_a_reference_never_run_it(tmp_path, monkeypatch):
    monkeypatch.setattr("bpo_fast.train.trainer.adapter_disabled", None)
    trainer = run(tmp_path, loss_type=["simpo", "sft"], loss_weights=[1.0, 0.1], beta=2.0, max_steps=12)
    losses = history(trainer, "loss")
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.5
    entry = trainer.state.log_history[0]
    assert entry["rewards/chosen"] == pytest.approx(2.0 * entry["logps/chosen"], rel=1e-4)


def test_sft_needs_no_rejected_column(tmp_path):
    pairs = Dataset.from_list([{k: v for k, v in pair.items() if k != "rejected"} for pair in make_pairs(4)])
    assert len(history(run(tmp_path, pairs, loss_type="sft", max_steps=1), "loss")) == 1


def test_evaluation_gives_the_metrics_of_the_whole_set(tmp_path):
    pairs = Dataset.from_list(make_pairs(5, seed=3))
    trainer = BPOTrainer(
        model=make_llava(),
        args=BPOConfig(**settings(tmp_path, per_device_eval_batch_size=2)),
        train_dataset=pairs,
        eval_dataset=pairs,
        processing_class=make_processor(),
        peft_config=LoraConfig(r=4),
    )
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    logged = trainer.state.log_history[-1]
    assert logged["eval_rewards/margins"] == 0.0
    alone = [BPOTrainer.evaluate(trainer, pairs.select([n])) and trainer.state.log_history[-1] for n in range(5)]
    mean = sum(entry["eval_logps/chosen"] for entry in alone) / 5
    assert logged["eval_logps/chosen"] == pytest.approx(mean, rel=1e-5)


RUN = """
import sys
sys.path[:0] = [{tests!r}, {tests!r} + "/train"]
from test_trainer import resumable
resumable({folder!r}, pause=0.2)
"""


def resumable(folder, pause=0.0):
    """Train with dropout, so that the random state matters too, and save at every second step."""
    options = settings(folder, max_steps=14, save_strategy="steps", save_steps=2, save_total_limit=2)
    trainer = BPOTrainer(
        model=make_llava(),
        args=BPOConfig(**options, lr_scheduler_type="cosine", disable_dropout=False),
        train_dataset=Dataset.from_list(make_pairs(24)),
        processing_class=make_processor(),
        callbacks=[_Slowly(pause)],
        peft_config=LoraConfig(r=4, lora_dropout=0.2),
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    trainer.save_model()


class _Slowly(TrainerCallback):
    def __init__(self, pause):
        self.pause = pause

    def on_step_end(self, args, state, control, **kwargs):
        print(state.global_step, flush=True)
        time.sleep(self.pause)


def _start(folder):
    code = textwrap.dedent(RUN).format(tests=TESTS, folder=str(folder))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def test_killed_and_resumed_gives_the_same_bits(tmp_path):
    resumable(tmp_path / "alone")
    expected = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    folder = tmp_path / "killed"
    rng = random.Random(time.time_ns())
    process = _start(folder)
    stop_after = rng.randint(3, 10)
    for line in process.stdout:
        if line.strip() == str(stop_after):
            time.sleep(rng.uniform(0, 0.5))  # in this step's saving, the next step, or the one after it
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "adapter_model.safetensors").exists()
    resumable(folder)
    ours = load_file(folder / "adapter_model.safetensors")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected), f"killed after step {stop_after}"


RANK = """
import json, sys
from pathlib import Path
import torch
from bpo_fast.train.distributed import end_processes
sys.path[:0] = [{tests!r}, {tests!r} + "/train"]
from test_trainer import BPOTrainer, history, run

class Counting(BPOTrainer):
    counts = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.counts.append(len(inputs["sequences"]))
        return super().training_step(model, inputs, num_items_in_batch)

options = dict(max_steps=5, per_device_train_batch_size=2, token_budget={token_budget}, checkpointing={mode!r})
if {token_budget}:
    options |= dict(cache_image_features=True, precompute_ref_log_probs=True, cache_dir={folder!r} + "-cache")
    options |= dict(loss_type="mdpo", noise_target="projected")
trainer = run({folder!r}, trainer_class=Counting, **options)
counts = [None, None]
torch.distributed.all_gather_object(counts, Counting.counts)
end_processes(trainer)
threads = [comm.read_text() for comm in Path("/proc/self/task").glob("*/comm")]
assert not [name for name in threads if "gloo" in name], threads
if trainer.is_world_process_zero():
    values = [history(trainer, name) for name in ("loss", "grad_norm", "rewards/margins")]
    json.dump([counts, values], open({answer!r}, "w"))
"""


@pytest.mark.parametrize("token_budget", [None, 80])
def test_two_processes_train_as_one(tmp_path, token_budget):
    """A budget gives the ranks different numbers of packed sequences, and gradients are exchanged once a step.

    With it they keep image features and the reference's log-probs, too, which they make together, and their pairs
    have second roots. Their layers run again in other ways than those of the process alone.
    """
    options = {} if token_budget is None else {"loss_type": "mdpo", "noise_target": "projected"}
    alone = run(tmp_path / "alone", max_steps=5, per_device_train_batch_size=4, **options)
    script = tmp_path / "rank.py"
    places = {"tests": TESTS, "folder": str(tmp_path / "two"), "answer": str(tmp_path / "answer")}
    places |= {"token_budget": token_budget, "mode": "offload" if token_budget is None else "selective"}
    script.write_text(RANK.format(**places))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    finished = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert finished.returncode == 0, finished.stderr
    names = ("loss", "grad_norm", "rewards/margins")
    (first, second), histories = json.loads((tmp_path / "answer").read_text())
    assert (first != second) == (token_budget is not None)
    for name, values in zip(names, histories, strict=True):
        assert values == pytest.approx(history(alone, name), rel=1e-4, abs=1e-5), name
    kept = [len(load_file(path)) for path in (tmp_path / "two-cache").glob("*/*/*.safetensors")]
    assert sum(kept) == (24 * 3 if token_budget else 0)  # each once: features, ids of the prompt, log-probs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dpo"}, "loss_type: found 'dpo', expected one of sigmoid, "),
        (
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]},
            "loss_weights: found \\[1.0\\], expected a finite number for each",
        ),
        ({"beta": 0.0}, "beta: found 0.0, expected a positive number"),
        ({"loss_type": "aot", "token_budget": 100}, "token_budget: found 100 with loss_type"),
    ],
)
def test_bad_settings_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        BPOConfig(**settings(tmp_path, **options))


def test_bad_arguments_are_named(tmp_path):
    pairs, args = Dataset.from_list(make_pairs(2)), BPOConfig(**settings(tmp_path))

    def make(model=None, dataset=pairs, peft_config=None):
        return BPOTrainer(
            model or make_llava(), args, dataset, processing_class=make_processor(), peft_config=peft_config
        )

    lora = LoraConfig(r=2)
    with pytest.raises(ValueError, match="peft_config: found None for a model without an adapter"):
        make()
    with pytest.raises(ValueError, match=r"train_dataset: found columns .*, expected \['rejected'\] too"):
        make(dataset=pairs.remove_columns("rejected"), peft_config=lora)
    with pytest.raises(ValueError, match="train_dataset: found None"):
        make(dataset=None, peft_config=lora)
    adapted = get_peft_model(make_llava(), LoraConfig(r=2, target_modules=TARGETS))
    with pytest.raises(ValueError, match="peft_config: found one for a model that has an adapter"):
        make(model=adapted, peft_config=lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    with pytest.raises(ValueError, match="found an adapter that is trained already"):
        make(model=adapted)


def test_several_gpus_in_one_process_are_refused_with_the_line_to_type(tmp_path):
    args = BPOConfig(**settings(tmp_path))
    args._n_gpu = 2
    with pytest.raises(
        ValueError, match=r"found 2 GPUs in one process.*torchrun --nproc_per_node 2 -m bpo_fast train"
    ):
        BPOTrainer(make_llava(), args, Dataset.from_list(make_pairs(2)), processing_class=make_processor())


def test_examples_that_cannot_be_trained_on_are_named(tmp_path):
    def first_batch(change, **options):
        pairs = copy.deepcopy(make_pairs(1))
        change(pairs[0])
        trainer = BPOTrainer(
            make_llava(),
            BPOConfig(**settings(tmp_path, **options)),
            Dataset.from_list(pairs),
            processing_class=make_processor(),
            peft_config=LoraConfig(r=2),
        )
        return next(iter(trainer.get_train_dataloader()))

    with pytest.raises(ValueError, match=r"prompt: found 1 image placeholders for 2 images"):
        first_batch(lambda pair: pair["images"].extend(pair["images"]))
    with pytest.raises(ValueError, match=r"max_length: found 5, expected more than the \d+ tokens of the prompt "):
        first_batch(lambda pair: None, max_length=5)


def test_long_responses_are_cut_at_max_length(tmp_path):
    pairs = make_pairs(1)
    pairs[0]["chosen"][0]["content"][0]["text"] = " ".join(["w1"] * 30)
    trainer = BPOTrainer(
        make_llava(),
        BPOConfig(**settings(tmp_path, max_length=25)),
        Dataset.from_list(pairs),
        processing_class=make_processor(),
        peft_config=LoraConfig(r=2),
    )
    (sequence,) = next(iter(trainer.get_train_dataloader()))["sequences"]
    assert sequence.packing.prefix_lengths[0] + sequence.packing.branch_lengths[0][0] == 25


def test_every_way_of_checkpointing_ends_with_the_same_adapter(tmp_path):
    def trained(**options):
        args = {"max_steps": 3, "token_budget": 60} | options
        trainer = run(tmp_path, model=make_llava(num_hidden_layers=3), **args)
        return {name: x for name, x in trainer.model.named_parameters() if x.requires_grad}

    expected = trained(gradient_checkpointing=False)
    for options in ({}, *({"checkpointing": mode} for mode in ("selective", "every_2", "offload"))):
        found = trained(**options)
        assert all(torch.equal(found[name], expected[name]) for name in expected), options


@pytest.mark.parametrize(
    ("options", "layers_run"), [({}, 2 + 2), ({"checkpointing": "none"}, 2), ({"checkpointing": "every_2"}, 2 + 1)]
)
def test_layers_run_again_as_often_as_was_asked(tmp_path, options, layers_run):
    model, runs = make_llava(), []
    for layer in model.model.language_model.layers:
        layer.self_attn.register_forward_hook(lambda module, *_: runs.append(torch.is_grad_enabled()))
    run(tmp_path, model=model, loss_type=["sft"], max_steps=1, **options)
    assert sum(runs) == layers_run
    # Vision layers run once, without gradients, and are left alone.
    assert not any(layer.gradient_checkpointing for layer in model.model.vision_tower.encoder.layers)


def test_training_reads_nothing_that_the_oldest_transformers_lacks(tmp_path, monkeypatch):
    def private(trainer):
        # transformers' own, of newer ones: 5.17 has none.
        assert not sys._getframe(1).f_globals["__name__"].startswith("bpo_fast")
        return vars(trainer)["step before"]

    def keep(trainer, step):
        vars(trainer)["step before"] = step

    monkeypatch.setattr(Trainer, "_initial_global_step", property(private, keep), raising=False)
    assert run(tmp_path, max_steps=1).state.global_step == 1
