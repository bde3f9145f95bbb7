"""Exact counts of a training step at LLaVA-1.5's shapes, ours beside TRL's: `python bench/flops.py`.

Every row is run on fake tensors: ours is BPOTrainer's own step, and TRL's is the scheme of its DPOTrainer with its own
head: chosen and rejected padded to one length, each with the image, both in the policy's pass and in the reference's.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from results import Results
from torch._subclasses.fake_tensor import FakeTensorMode

from bpo_fast.cli.quiet import quiet
from bpo_fast.models.lora import adapter_disabled, restrict_to_decoder
from bpo_fast.plan.cards import find_card
from bpo_fast.plan.fakes import Faker, meta_model
from bpo_fast.plan.lengths import PAPER_MIX, groups_of
from bpo_fast.plan.meter import Meter, Metered
from bpo_fast.plan.operations import on_card
from bpo_fast.plan.shapes import PRESETS, find_config, image_tokens
from bpo_fast.plan.step import Run, Step, by_few_layers, count_step, packed_sequences
from bpo_fast.train.config import BPOConfig

TRL, OURS = "TRL DPOTrainer's scheme", "bpo_fast"
BEFORE = {"fused_lora": False}
CACHES = {"precompute_ref_log_probs": True, "cache_image_features": True}
ROWS = {
    f"{OURS}, PEFT's linears": BEFORE,
    f"{OURS}, live reference": {},
    f"{OURS}, caches": CACHES,
    f"{OURS}, caches, selective checkpointing": CACHES | {"checkpointing": "selective"},
}


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.set_defaults(device="cpu", dtype="bfloat16, NF4 base")
    parser.add_argument("--model", choices=PRESETS, default="llava-1.5-13b", help="shapes")
    parser.add_argument("--pairs", type=int, default=4, help="preference pairs a step")
    parser.add_argument("--lora-r", type=int, default=64, help="LoRA rank")
    parser.add_argument("--output", type=Path, help="JSON path (default: below bench/results)")
    return parser.parse_args(arguments)


def ours(options, config, groups, changes):
    training = BPOConfig(use_cpu=True, bf16=True, max_length=2048, optim="adamw_bnb_8bit", **changes)
    lora = LoraConfig(r=options.lora_r, lora_alpha=4 * options.lora_r, task_type="CAUSAL_LM")
    run = Run(training, lora, torch.bfloat16, "nf4", on_card(find_card("a40").memory_bytes))
    return count_step(config, run, packed_sequences(config, run, groups, image_tokens(config)))


def padded(groups):
    """(rows [2B, S] of image tokens and places, labelled places of the flat [2B * (S - 1)] rows, S)."""
    sequences = [
        group.prefix + branch for number in range(2) for group in groups for branch in [group.branches[number]]
    ]
    length = max(map(len, sequences))
    labelled = []
    for number, (sequence, group) in enumerate(zip(sequences, [*groups, *groups], strict=True)):
        labelled += range(number * length + len(group.prefix) - 1, number * length + len(sequence) - 1)
    return length, torch.tensor(labelled)


def trl_step(options, groups, config):
    """TRL's two forward passes and its backward pass, with full checkpointing, as its DPOConfig has by default."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    model, mode = meta_model(config, torch.bfloat16, "nf4"), FakeTensorMode(allow_non_fake_inputs=True)
    lora = LoraConfig(r=options.lora_r, lora_alpha=4 * options.lora_r, task_type="CAUSAL_LM")
    with torch.device("meta"):
        model = get_peft_model(model, restrict_to_decoder(lora, model))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    Faker(mode).model(model)
    base, side, count = model.get_base_model(), config.vision_config.image_size, 2 * len(groups)
    length, labelled = padded(groups)
    meter = Meter(on_card(find_card("a40").memory_bytes))
    for tensor in (*model.parameters(), *model.buffers()):
        meter.know(tensor, "model")

    def logps(embeds, mask, rows, targets, pixels, images):
        features = base.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        embeds = embeds.index_copy(0, images, torch.cat(list(features)).to(embeds.dtype)).view(count, length, -1)
        hidden = base.get_decoder()(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        head = base.get_output_embeddings().weight
        size = _CHUNKED_LOGPROB_CHUNK_SIZE
        picked = hidden.flatten(0, 1)[rows]
        return ChunkedLogProbFunction.apply(picked, head, None, targets, 1.0, size, None, 1.0, ())[0]

    places = image_tokens(config)
    starts = [n * length for n in range(count)]
    images = torch.cat([torch.arange(start, start + places) for start in starts])
    with mode, torch.autocast("cpu", torch.bfloat16):
        rows, images = mode.from_tensor(labelled), mode.from_tensor(images)
        inputs = (
            torch.empty(count * length, config.get_text_config().hidden_size, dtype=torch.bfloat16),
            torch.empty(count, 1, length, length, dtype=torch.bool),
            rows,
            torch.zeros(len(rows), dtype=torch.int64),
            torch.empty(count, 3, side, side, dtype=torch.bfloat16),
            images,
        )
        model.train()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        with meter:
            policy = logps(*inputs)
            with torch.no_grad(), adapter_disabled(model):
                reference = logps(*inputs)
            (policy - reference).sum().backward()
    return Step(meter.metered, Metered(), (length,) * count, len(groups))


def row(step, reference):
    seen, pairs = step.loss, step.num_pairs
    moved = seen.product_bytes + seen.other_bytes
    return {
        "tflops_per_pair": seen.total_flops / pairs / 1e12,
        "flops_ratio": seen.total_flops / reference.loss.total_flops,
        "tokens": sum(step.sequence_lengths),
        "gigabytes_per_pair": moved / pairs / 1e9,
        "other_gigabytes_per_pair": seen.other_bytes / pairs / 1e9,
        "other_share": seen.other_bytes / moved,
    }


def count(options, progress):
    config = find_config(options.model)
    pairs = PAPER_MIX.pairs(options.pairs)
    groups = groups_of(pairs, image_tokens(config))
    steps = {TRL: by_few_layers(config, "full", partial(trl_step, options, groups))}
    progress.update()
    for name, changes in ROWS.items():
        steps[name] = ours(options, config, groups, changes)
        progress.update()
    what = (
        "A training step counted on fake tensors: QLoRA, bf16, full checkpointing where no other is named; "
        + PAPER_MIX.source
    )
    shape = {"pairs": options.pairs, "image tokens": image_tokens(config), "LoRA r": options.lora_r}
    shape |= {"layers": config.get_text_config().num_hidden_layers, "H": config.get_text_config().hidden_size}
    rows = {name: row(step, steps[TRL]) for name, step in steps.items()}
    return {"what": what, "shape": shape, "reference": TRL, "rows": rows}


def main(arguments):
    options = parse(arguments)
    jobs = {options.model: (1 + len(ROWS), partial(count, options))}
    settings = vars(options) | {"lengths": PAPER_MIX.source}
    with quiet():
        Results("flops", settings, options.output).run(jobs)


if __name__ == "__main__":
    main(sys.argv[1:])
