"""Ours as throughput.py measures it: what its caches cost, its floor, and two ideas that no option switches off."""

import time

import torch
from products import floor_seconds

from bpo_fast import BPOConfig
from bpo_fast.models.packing import Group, pack
from bpo_fast.plan.cards import find_card
from bpo_fast.plan.forecast import forecast
from bpo_fast.plan.operations import on_card
from bpo_fast.plan.step import Run, count_step, packed_sequences
from bpo_fast.train import collator, trainer

# Of a layer's forward products, the part that a mode of checkpointing computes again.
RECOMPUTED = {"none": 0.0, "selective": 0.0, "full": 1.0, "offload": 1.0}


def unshared_pack(groups):
    """`pack` with a prefix of its own for each branch."""
    return pack([Group(group.prefix, [branch]) for group in groups for branch in group.branches])


def our_trainer(base, switches, said):
    """A trainer without the ideas that `switches` names, which says in `said` what filling its caches took."""
    fill, is_shared = trainer.use_caches, "share_prefixes" not in switches

    def timed(*arguments):
        started = time.perf_counter()
        fill(*arguments)
        said["fill_seconds"] = time.perf_counter() - started
        if not is_shared:  # from here on: the start check and the caches know groups
            collator.pack = unshared_pack

    class Unshared(base):
        def _model_inputs(self, model, sequence):
            inputs = super()._model_inputs(model, sequence)
            if collator.pack is unshared_pack:
                each = inputs["image_features"].unflatten(0, (-1, model.config.image_seq_length))
                inputs["image_features"] = each.repeat_interleave(2, dim=0).flatten(0, 1)
            return inputs

    trainer.use_caches = timed
    if "pack_pairs" in switches:
        collator.plan_sequences = lambda lengths, token_budget: [[number] for number in range(len(lengths))]
    return base if is_shared else Unshared


def second_batch(trained, options):
    """The packed sequences of the first timed step, on the device."""
    examples = [trained.train_dataset[number] for number in range(options.pairs, 2 * options.pairs)]
    return [sequence.packing.to(options.device) for sequence in trained.data_collator(examples)["sequences"]]


def floors(trained, packings, options):
    """Seconds of a step's bare products: without and with recompute, and those that this trainer's mode takes."""
    args, model = trained.args, trained.model.get_base_model()
    images = 0 if args.cache_image_features else options.pairs
    how = {"rank": options.lora_r, "live_reference": not args.precompute_ref_log_probs, "live_images": images}
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    least, most = floor_seconds(model.config, packings, **how, device=options.device, dtype=dtype)
    mode = args.checkpointing_mode or "full"
    share = 1 / int(mode.removeprefix("every_")) if mode.startswith("every_") else RECOMPUTED[mode]
    return {"floor_seconds": least, "recompute_floor_seconds": most, "products": least + share * (most - least)}


def forecast_bytes(trained, run, lora, packings, options):
    """The peak that the planner foretells for this step, by the settings `run` of its trainer."""
    groups = [
        Group([1] * prefix, [[2] * length for length in branches])
        for packing in packings
        for prefix, branches in zip(packing.prefix_lengths, packing.branch_lengths, strict=True)
    ]
    config = BPOConfig(output_dir=trained.args.output_dir, **run | {"use_cpu": True})
    card = find_card(options.card or "a40")
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    planned = Run(config, lora, dtype, "nf4" if options.base == "nf4" else None, on_card(card.memory_bytes))
    model_config = trained.model.get_base_model().config
    sequences = packed_sequences(model_config, planned, groups, model_config.image_seq_length)
    step = count_step(model_config, planned, sequences)
    return {"forecast_bytes": forecast(step, card).peak_bytes}
