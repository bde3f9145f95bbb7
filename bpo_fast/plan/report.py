"""A plan in words and as JSON."""

from typing import Any

from bpo_fast.plan.cards import GIB
from bpo_fast.plan.forecast import (
    BANDWIDTH_SHARE,
    CONTEXT_BYTES,
    FRAGMENTED_SHARE,
    PAPER_CARDS,
    PAPER_EPOCHS,
    PAPER_HOURS,
    PAPER_PAIRS,
    RATE_SHARE,
)
from bpo_fast.plan.run import Plan, Planned
from bpo_fast.plan.shapes import preset_name


def assumptions(planned: Planned) -> list[str]:
    """What a plan assumes and does not count."""
    return [
        f"lengths of the pairs: {planned.mix.source}",
        f"products reach {RATE_SHARE:.0%} of the card's dense bf16 rate, and everything else {BANDWIDTH_SHARE:.0%} of "
        "its bandwidth: assumed, not measured",
        f"{CONTEXT_BYTES / GIB:.2f} GiB for CUDA's context and workspaces, and {FRAGMENTED_SHARE:.0%} of what a step "
        "makes for memory between blocks",
        "gradients of the step's earlier batches are there",
    ]


def settings(planned: Planned) -> dict[str, Any]:
    """What a plan is for."""
    config = planned.config
    return {
        "model": planned.name,
        "quantization": planned.quantization or "none",
        "lora_r": planned.lora.r,
        "optim": str(getattr(config.optim, "value", config.optim)),
        "checkpointing": config.checkpointing_mode,
        "token_budget": config.token_budget,
        "precompute_ref_log_probs": config.precompute_ref_log_probs,
        "cache_image_features": config.cache_image_features,
    }


def as_json(planned: Planned, plan: Plan) -> dict[str, Any]:
    """The plan as JSON values."""
    found = plan.forecast
    return {
        "settings": settings(planned),
        "gpu": {"name": found.card.name, "memory_gib": found.card.memory_gib},
        "peak_gib": round(found.peak_bytes / GIB, 3),
        "tensors_gib": round(found.tensor_bytes / GIB, 3),
        "fits": found.fits,
        "memory_gib": {name: round(size / GIB, 3) for name, size in found.terms.items()},
        "flops_per_pair": found.flops_per_pair,
        "seconds_per_pair": found.seconds_per_pair,
        "epoch_hours": found.epoch_hours,
        "epoch_pairs": PAPER_PAIRS,
        "paper_hours": _paper_hours(planned),
        "pairs": plan.step.num_pairs,
        "sequence_lengths": list(plan.step.sequence_lengths),
        "assumptions": assumptions(planned),
    }


def as_text(planned: Planned, plan: Plan) -> str:
    """The plan as a table and sentences."""
    found, step = plan.forecast, plan.step
    width = max(map(len, found.terms))
    table = [("held at the peak of a step", "GiB"), ("-" * width, "-----:")]
    table += [(name, f"{size / GIB:.2f}") for name, size in found.terms.items()]
    table += [("together", f"{found.peak_bytes / GIB:.2f}")]
    tokens = " + ".join(f"{length:,}" for length in step.sequence_lengths)
    return "\n".join(
        [
            f"{', '.join(f'{name} {value}' for name, value in settings(planned).items())}",
            f"{step.num_pairs} pairs a batch, packed to {tokens} tokens",
            "",
            *(f"| {name:<{width}} | {size:>6} |" for name, size in table),
            "",
            f"{found.card.name} has {found.card.memory_gib:.1f} GiB: it {'fits' if found.fits else 'does not fit'}.",
            f"{found.flops_per_pair / 1e12:,.1f} TFLOP a pair{_times(planned, found)}",
            "",
            *(f"- {text}" for text in assumptions(planned)),
        ]
    )


def _times(planned, found):
    if found.seconds_per_pair is None:
        return "; the rates of this card are not known here, so no time is given."
    lines = [
        f", {found.seconds_per_pair:.2f} s a pair: {found.product_seconds:.2f} s of products and "
        f"{found.other_seconds:.2f} s of everything else.",
        f"An epoch of {PAPER_PAIRS:,} pairs: {found.epoch_hours:,.1f} h on one {found.card.name}.",
    ]
    if hours := _paper_hours(planned):
        card_hours = hours * PAPER_CARDS / PAPER_EPOCHS
        rest = f"{card_hours:,.0f} h of one card an epoch."
        lines.append(f"The paper took {hours} h for {PAPER_EPOCHS} epochs on eight A40s: {rest}")
    return "\n".join(lines)


def _paper_hours(planned):
    return PAPER_HOURS.get(preset_name(planned.name))
