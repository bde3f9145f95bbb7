"""What a card holds: the fastest choice that fits, forecasts before a training, and the recipes' head comments."""

import functools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from peft import LoraConfig

from bpo_fast.cli.options import TrainArguments
from bpo_fast.cli.recipe import parse_arguments
from bpo_fast.plan import before, recipes
from bpo_fast.plan.cards import CARDS, GIB, find_card
from bpo_fast.plan.fit import fit
from bpo_fast.plan.forecast import Forecast
from bpo_fast.plan.lengths import PAPER_MIX, read_lengths
from bpo_fast.plan.run import Plan, Planned
from bpo_fast.plan.shapes import find_config
from bpo_fast.plan.step import OPTIMIZER
from bpo_fast.train.config import BPOConfig

# GiB of tensors by checkpointing and token budget, and of the optimizer's state.
HELD = {"none": 60, "selective": 20, "full": 10, "offload": 8}
STATE = {"adamw_torch_fused": 2.0, "adamw_bnb_8bit": 0.5}


@pytest.fixture
def planned(tmp_path):
    config = BPOConfig(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4)
    lora = LoraConfig(r=8, task_type="CAUSAL_LM")
    return Planned("llava-1.5-13b", find_config("llava-1.5-13b"), config, lora, "auto", "nf4", PAPER_MIX)


def made(planned, card):
    """A plan whose memory is the tables' above; a budget halves what is held beside the state."""
    config = planned.config
    held = HELD[config.checkpointing] * (0.5 if config.token_budget else 1)
    terms = {"activations": int(held * GIB), OPTIMIZER: int(STATE[str(config.optim)] * GIB)}
    return Plan(None, Forecast(card, terms, 1.0, None, None))


@pytest.mark.parametrize(
    ("memory_gib", "expected"),
    [
        (80, ("none", "adamw_torch_fused", None)),
        (61, ("none", "adamw_bnb_8bit", None)),
        (44, ("selective", "adamw_torch_fused", None)),
        (12, ("full", "adamw_torch_fused", None)),
        (10.6, ("full", "adamw_bnb_8bit", None)),
        (9, ("offload", "adamw_bnb_8bit", None)),
        (5, ("offload", "adamw_bnb_8bit", 842)),
    ],
)
def test_the_fastest_choice_that_fits(planned, memory_gib, expected):
    longest = 576 + max(map(sum, PAPER_MIX.pairs(4)))
    chosen, found = fit(planned, replace(CARDS["a40"], memory_gib=memory_gib), made)
    config = chosen.config
    assert (config.checkpointing, config.optim) == expected[:2]
    assert config.token_budget == (None if expected[2] is None else longest)
    assert config.precompute_ref_log_probs
    assert config.cache_image_features
    assert found.forecast.fits
    assert planned.config.checkpointing is None


def test_a_card_that_holds_nothing_is_refused(planned):
    with pytest.raises(ValueError, match=r"gpu: found 3\.0 GiB on a40, expected at least 4\.5 for llava-1\.5-13b"):
        fit(planned, replace(CARDS["a40"], memory_gib=3.0), made)


@pytest.fixture
def answers(monkeypatch):
    """What `bpo-fast plan` answers in the place of a process; the commands that asked."""
    commands, found = [], {}

    def run(command):
        commands.append(command)
        return found["fit" if "--fit" in command else "plan"]

    monkeypatch.setattr(before, "_run", run)
    return commands, found


def test_the_forecast_of_a_training(answers):
    commands, found = answers
    found["plan"] = {"peak_gib": 12.5, "tensors_gib": 11.5, "flops_per_pair": 7.38e13, "seconds_per_pair": 1.77}
    said = before.forecast_of(["--lora_r", "8"], [(631, 100, 120)], CARDS["a40"])
    assert said == (
        "Forecast: 12.5 of 44.3 GiB on a40 with the lengths of the first batch; 73.8 TFLOP a pair, 1.77 s a pair "
        "(assumed rates)."
    )
    (command,) = commands
    assert command[:3] == ["plan", "--lora_r", "8"]
    assert command[command.index("--batch_lengths") + 1] == "631,100,120"


def test_a_training_that_cannot_fit_is_refused_with_what_would(answers):
    _, found = answers
    found["plan"] = {"peak_gib": 46.0, "tensors_gib": 45.0, "flops_per_pair": 1.0, "seconds_per_pair": None}
    settings = {"checkpointing": "full", "optim": "adamw_bnb_8bit", "token_budget": None, "cache_image_features": True}
    found["fit"] = {"peak_gib": 12.5, "settings": settings}
    with pytest.raises(
        ValueError, match=r"found a step of 45\.0 GiB of tensors of 44\.3 GiB on a40.*--checkpointing full"
    ):
        before.forecast_of([], [(631, 100, 120)], CARDS["a40"])


def test_what_cannot_be_planned_is_trained_all_the_same(answers):
    _, found = answers
    found["plan"] = "model: found no preset."
    assert before.forecast_of([], [(9, 1, 1)], CARDS["a40"]) == "Forecast: none (model: found no preset.)"


def test_the_process_plans_what_was_trained(tmp_path, monkeypatch):
    # One of several processes asks; the plan's is by itself, and would wait for them for ever.
    launched = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(before, "_SECONDS", 60)
    values = find_config("llava-1.5-7b").to_dict()
    values["text_config"] |= {"num_hidden_layers": 1}
    values["vision_config"] |= {"num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(values))
    said = before.forecast_of(["--model_name_or_path", str(tmp_path)], [(631, 10, 12)], find_card("mine:8"))
    assert said.startswith("Forecast: ")
    assert " of 8.0 GiB on mine with the lengths of the first batch; " in said


@pytest.mark.parametrize("text", ["631,100", "a,b,c", "576,1,1", "631,0,1"])
def test_lengths_that_are_none(text):
    with pytest.raises(ValueError, match=rf"batch_lengths: found '{text}', expected"):
        read_lengths([text], 576)


def test_a_card_of_a_given_size():
    assert find_card("a40:16").memory_gib == 16
    assert find_card("a40:16").rate == CARDS["a40"].rate
    assert find_card("mine:16").rate is None
    for name in ("a40:", "a40:x", "a40:-1", "a40:nan"):
        with pytest.raises(ValueError, match="expected GiB behind the colon"):
            find_card(name)


def test_a_recipe_says_what_is_forecast(tmp_path, capsys, monkeypatch):
    pytest.importorskip("bitsandbytes")
    once = functools.cache(lambda _: recipes_plan(*given[0]))
    given = []

    def plan(*arguments):
        given.append(arguments)
        return once(0)

    recipes_plan = recipes.plan
    monkeypatch.setattr(recipes, "plan", plan)
    packaged = Path(recipes.__file__).parents[1] / "recipes/llava15-7b-16gb.yaml"
    copy = tmp_path / packaged.name
    copy.write_text(packaged.read_text())
    assert recipes.main(["--check"], tmp_path) == 0, capsys.readouterr().out
    found = re.search(r"Forecast: ([0-9.]+) of 15[.]6 GiB on rtx4080", packaged.read_text())
    copy.write_text(packaged.read_text().replace(f"Forecast: {found[1]} of", "Forecast: 1.0 of"))
    assert recipes.main(["--check"], tmp_path) == 1
    assert "llava15-7b-16gb.yaml: behind the plan" in capsys.readouterr().out
    assert "Forecast: 1.0 of" in copy.read_text()
    assert recipes.main([], tmp_path) == 0
    assert float(re.search(r"Forecast: ([0-9.]+) of", copy.read_text())[1]) == pytest.approx(float(found[1]), rel=0.05)


@pytest.mark.parametrize("name", ["llava15-13b-a40", "llava15-13b-24gb", "llava15-7b-16gb"])
def test_recipes_of_cards_have_the_papers_settings(name):
    argv = ["--config", name, "--dataset", "pairs", "--use_cpu", "true"]
    arguments, config = parse_arguments([TrainArguments, BPOConfig], argv, command="train")
    assert arguments.quantization == "nf4"
    assert arguments.lora_r == 64
    assert (config.learning_rate, config.num_train_epochs, config.beta) == (2e-6, 2, 0.1)
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 32
    assert recipes.card_of(name).memory_gib <= {"a40": 48, "24gb": 24, "16gb": 16}[name.rsplit("-", 1)[-1]]
