"""A plan: a model, a training's settings and a card to what it will hold and how long it will take."""

from dataclasses import dataclass

import torch
from peft import LoraConfig
from transformers import PreTrainedConfig

from bpo_fast.models.weakened_roots import second_root
from bpo_fast.plan.cards import Card
from bpo_fast.plan.forecast import Forecast, forecast
from bpo_fast.plan.lengths import GivenLengths, LengthMix, groups_of
from bpo_fast.plan.operations import on_card
from bpo_fast.plan.shapes import image_tokens
from bpo_fast.plan.step import Run, Step, count_step, packed_sequences
from bpo_fast.train.config import BPOConfig


@dataclass(frozen=True)
class Planned:
    """A training that is planned.

    Attributes:
        name: of the model.
        model: its configuration.
        config: of the training, with `use_cpu`.
        lora: the adapter.
        dtype: of the weights that are not quantised, by name; "auto" is bfloat16.
        quantization: "nf4" or None.
        mix: lengths of its pairs.
    """

    name: str
    model: PreTrainedConfig
    config: BPOConfig
    lora: LoraConfig
    dtype: str
    quantization: str | None
    mix: LengthMix | GivenLengths


@dataclass(frozen=True)
class Plan:
    """A counted step and its forecast."""

    step: Step
    forecast: Forecast


def pair_tokens(planned: Planned) -> list[int]:
    """Tokens of the pairs of a batch, image, prompt and both answers, and of their second roots if they have any."""
    groups = groups_of(planned.mix.pairs(planned.config.per_device_train_batch_size), image_tokens(planned.model))
    weakens = planned.config.loss_config().reads_weakened
    return [len(group) + (len(second_root(group)) if weakens else 0) for group in groups]


def plan(planned: Planned, card: Card) -> Plan:
    """Count a step of `per_device_train_batch_size` pairs of the mix, and forecast it on a card.

    Raises:
        ValueError: whatever `BPOTrainer` refuses, or a model whose images have no one number of tokens.
        ImportError: "nf4" without bitsandbytes.
    """
    tokens = image_tokens(planned.model)
    groups = groups_of(planned.mix.pairs(planned.config.per_device_train_batch_size), tokens)
    dtype = torch.bfloat16 if planned.dtype == "auto" else getattr(torch, planned.dtype)
    run = Run(planned.config, planned.lora, dtype, planned.quantization, on_card(card.memory_bytes))
    step = count_step(planned.model, run, packed_sequences(planned.model, run, groups, tokens))
    return Plan(step, forecast(step, card))
