"""The real training step on fake tensors: `BPOTrainer`'s own loss, backward pass and optimizer at true shapes.

Nothing is computed and nothing is held, so a step of 13 billion weights is counted on a laptop.
"""

import copy
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from datasets import Dataset
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from bpo_fast.losses.preference import Batch
from bpo_fast.models.packing import Group, Packing, pack, plan_sequences
from bpo_fast.models.weakened_roots import second_root
from bpo_fast.plan.fakes import Faker, meta_model, scales_of
from bpo_fast.plan.meter import KEPT, Meter, Metered
from bpo_fast.plan.operations import HeadMemory
from bpo_fast.train.collator import PackedSequence
from bpo_fast.train.config import BPOConfig
from bpo_fast.train.trainer import BPOTrainer

# Terms that last through a step, beside those of `plan.meter`.
WEIGHTS, TABLES, VISION = "language model", "embeddings and head", "vision part"
ADAPTER, GRADIENTS, OPTIMIZER = "adapter", "gradients", "optimizer state"
INPUTS = "packed sequences"

# Decoders whose layers are alike, and the fewest of them that stand for all: the first and the last have neighbours.
ALIKE = ("llama", "mistral", "qwen2")
LEAST_LAYERS = 3


@dataclass(frozen=True)
class Run:
    """What decides a step beside the model.

    Attributes:
        config: the training's; it says `use_cpu`, as the fake tensors say that they are on one.
        lora: the adapter.
        dtype: of the model's weights, those that are not quantised.
        quantization: "nf4" or None.
        head: what the head takes of a device's memory.
    """

    config: BPOConfig
    lora: LoraConfig
    dtype: torch.dtype
    quantization: str | None
    head: HeadMemory


@dataclass(frozen=True)
class Step:
    """A counted step.

    Attributes:
        loss: its forward and backward passes, over all packed sequences.
        update: its optimizer's update.
        sequence_lengths: tokens of the packed sequences.
        num_pairs: in the step.
    """

    loss: Metered
    update: Metered
    sequence_lengths: tuple[int, ...]
    num_pairs: int

    @property
    def peak(self) -> Metered:
        """Whichever of both holds more at once."""
        return max(self.loss, self.update, key=lambda part: part.peak_bytes)

    @property
    def flops(self) -> int:
        return self.loss.total_flops


class _Planned(BPOTrainer):
    """A trainer of a model that has no weights: it is made on the meta device and never moved."""

    meter: Meter | None = None

    def _move_model_to_device(self, model, device):
        pass

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self.meter is not None:
            self.meter.keep()
        return loss


def count_step(model_config: PreTrainedConfig, run: Run, sequences: Sequence[PackedSequence]) -> Step:
    """Run one step on fake tensors, gradients of an earlier batch in place, and count it.

    Where all layers of the decoder are alike, two models of few layers are run, and each figure goes on by as much a
    layer as it grew between them.

    Args:
        model_config: of the model.
        run: what decides the step.
        sequences: the packed sequences of one batch, with what caches keep where the configuration asks for them.

    Raises:
        ValueError: whatever `BPOTrainer` refuses, or a pair does not fit the token budget.
        ImportError: a quantised model without bitsandbytes.
    """
    mode = run.config.checkpointing_mode
    return by_few_layers(model_config, mode, lambda config: _count(config, run, sequences))


def by_few_layers(
    model_config: PreTrainedConfig, checkpointing: str | None, count: Callable[[PreTrainedConfig], Step]
) -> Step:
    """What `count` makes of a model; of two with few of its layers, where those are alike.

    Args:
        model_config: of the model.
        checkpointing: mode, see `models.checkpointing`; None where it is not one of those.
        count: a configuration -> its step.
    """
    layers = model_config.get_text_config().num_hidden_layers
    few = _few_layers(model_config.get_text_config(), checkpointing)
    if few is not None:
        first, second = (count(_with_layers(model_config, each)) for each in few)
        # What is kept grows by layers; where it does not, the most is held in the vision part, which may change.
        if second.loss.at_peak.get(KEPT, 0) > first.loss.at_peak.get(KEPT, 0):
            return _gone_on(first, second, (layers - few[0]) // (few[1] - few[0]))
    return count(model_config)


def _few_layers(text_config, checkpointing):
    """Two numbers of layers from which the whole number follows; None where the model is to be run as it is."""
    if text_config.model_type not in ALIKE or checkpointing is None:
        return None
    layers = text_config.num_hidden_layers
    period = int(checkpointing.removeprefix("every_")) if checkpointing.startswith("every_") else 1
    first = layers % period + period
    while first < LEAST_LAYERS:
        first += period
    return (first, first + period) if 2 * first + period < layers else None


def _with_layers(model_config, layers):
    config = copy.deepcopy(model_config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


def _gone_on(first, second, times):
    """What a figure is after so many times the difference of two steps."""

    def number(a, b):
        return a + (b - a) * times

    def metered(a, b):
        flops = Counter({name: number(a.flops[name], b.flops[name]) for name in b.flops})
        at_peak = {name: number(a.at_peak.get(name, 0), size) for name, size in b.at_peak.items()}
        others = (
            number(getattr(a, name), getattr(b, name)) for name in ("product_bytes", "other_bytes", "peak_bytes")
        )
        return Metered(flops, *others, at_peak)

    return replace(second, loss=metered(first.loss, second.loss), update=metered(first.update, second.update))


def _count(model_config, run, sequences):
    model = meta_model(model_config, run.dtype, run.quantization)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with tempfile.TemporaryDirectory() as folder:
        run.config.output_dir = folder
        trainer = _trainer(model, run)
    faker = Faker(mode)
    faker.model(trainer.model)
    meter = Meter(run.head)
    for kind, tensor in _lasting(trainer.model):
        if kind != VISION or not run.config.cache_image_features:  # then it waits in the host's memory
            meter.know(tensor, kind)
    with warnings.catch_warnings():  # it looks for embeddings by their addresses, which fake ones do not have
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor", UserWarning)
        trainer.create_optimizer()
    sequences = [sequence._map(mode.from_tensor) for sequence in sequences]
    for sequence in sequences:
        meter.know(sequence.image_rows, INPUTS)
    with mode:
        model = trainer.accelerator.prepare_model(trainer.model, device_placement=False)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
                meter.know(parameter.grad, GRADIENTS)
        trainer.optimizer.step()  # which makes its state
        for state in trainer.optimizer.state.values():
            for value in filter(torch.is_tensor, state.values()):
                meter.know(value, OPTIMIZER)
        trainer.meter = meter
        with meter:
            trainer.training_step(model, {"sequences": sequences})
        loss, meter.metered = meter.metered, Metered()
        with meter:
            trainer.accelerator.clip_grad_norm_(model.parameters(), run.config.max_grad_norm)
            trainer.optimizer.step()
    lengths = tuple(len(sequence.packing.input_ids) for sequence in sequences)
    return Step(loss, meter.metered, lengths, sequences[0].batch.num_pairs)


def _trainer(model, run):
    examples = [{"images": [], "prompt": "", "chosen": "", "rejected": ""}]
    with torch.device("meta"):
        trainer = _Planned(
            model=model,
            args=run.config,
            train_dataset=Dataset.from_list(examples),
            processing_class=object(),
            peft_config=run.lora,
        )
    trainer.current_gradient_accumulation_steps = run.config.gradient_accumulation_steps
    return trainer


def _lasting(model):
    """(term, tensor) of every weight."""
    base = model.get_base_model()
    decoder = set(base.get_decoder().modules())
    tables = {base.get_input_embeddings(), base.get_output_embeddings()}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                place = TABLES if module in tables else WEIGHTS if module in decoder else VISION
                yield ADAPTER if tensor.requires_grad else place, tensor
    yield from ((WEIGHTS, tensor) for _, tensor in scales_of(model))


def packed_sequences(
    model_config: PreTrainedConfig, run: Run, groups: Sequence[Group], image_tokens: int
) -> list[PackedSequence]:
    """The packed sequences that the collator makes of a batch, with pixels or with what caches keep.

    Args:
        model_config: of the model.
        run: what decides the step.
        groups: the pairs of one batch, an image each.
        image_tokens: of one image; they stand at the end of the prompt.

    Raises:
        ValueError: a pair does not fit the token budget.
    """
    if run.config.loss_config().loss_types == ("sft",):
        groups = [Group(group.prefix, group.branches[:1]) for group in groups]
    batch = Batch(len(groups), sum(len(group.branches[0]) for group in groups))
    weakens = run.config.loss_config().reads_weakened
    roots = [[group, second_root(group)] if weakens else [group] for group in groups]
    side, sequences = model_config.vision_config.image_size, []
    for members in plan_sequences([sum(map(len, each)) for each in roots], run.config.token_budget):
        packing = pack([root for of_root in zip(*(roots[n] for n in members), strict=True) for root in of_root])
        rows = torch.cat([torch.arange(end - image_tokens, end) for end in _prefix_ends(packing)])
        sequence = PackedSequence(packing, {"pixel_values": torch.empty(len(members), 3, side, side)}, rows, batch)
        if weakens:
            noise = {"noise_ids": torch.arange(len(members)), "num_image_rows": (image_tokens,) * len(members)}
            sequence = replace(sequence, **noise)
        sequences.append(as_cached(model_config, run, sequence))
    return sequences


def as_cached(model_config: PreTrainedConfig, run: Run, sequence: PackedSequence) -> PackedSequence:
    """A sequence as the collator makes it where the configuration's caches are filled."""
    if run.config.cache_image_features and len(sequence.image_rows):
        width = model_config.get_text_config().hidden_size
        num_rows = sum(sequence.num_image_rows) or len(sequence.image_rows)
        features = torch.empty(num_rows, width, dtype=run.dtype)
        sequence = replace(sequence, image_inputs={}, image_features=features)
    if run.config.precompute_ref_log_probs:
        sequence = replace(sequence, ref_token_logps=torch.zeros(len(sequence.packing.targets)))
    return sequence


def _prefix_ends(packing: Packing):
    start = 0
    for prefix, branches in zip(packing.prefix_lengths, packing.branch_lengths, strict=True):
        yield start + prefix
        start += prefix + sum(branches)
