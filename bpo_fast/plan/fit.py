"""The fastest settings of a training that a card holds."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from bpo_fast.plan.cards import Card
from bpo_fast.plan.forecast import Forecast
from bpo_fast.plan.run import Plan, Planned, pair_tokens, plan

# From the fastest to the one that holds least, with caches.
MODES = ("none", "selective", "full", "offload")
OPTIMIZERS = ("adamw_torch_fused", "adamw_bnb_8bit")


def choices(longest: int) -> Iterator[dict[str, Any]]:
    """Options of a training that trade memory for time, the fastest first.

    Args:
        longest: tokens of the longest pair, the smallest token budget.
    """
    for budget in (None, longest):
        for mode in MODES if budget is None else MODES[-2:]:
            yield from ({"checkpointing": mode, "optim": name, "token_budget": budget} for name in OPTIMIZERS)


def fit(planned: Planned, card: Card, make: Callable[[Planned, Card], Plan] = plan) -> tuple[Planned, Plan]:
    """The training with the first of `choices` that fits a card, caches on, and its plan.

    Args:
        planned: the training; its other settings stay. What it cannot keep is not cached.
        card: to fit.
        make: of a training its plan.

    Raises:
        ValueError: none fits.
    """
    needs_reference = planned.config.loss_config().needs_reference
    # Of images that are weakened only rows can be kept, which is all that "projected" needs.
    keeps_features = planned.config.noise_target in (None, "projected")
    caches = {"precompute_ref_log_probs": needs_reference, "cache_image_features": keeps_features}
    found: Forecast | None = None
    too_large = set()
    *most, smallest = choices(max(pair_tokens(planned)))
    for choice in (*most, smallest):
        kept = (choice["checkpointing"], choice["token_budget"])
        if kept in too_large and choice is not smallest:
            continue
        changed = replace(planned, config=with_options(planned.config, caches | choice))
        made = make(changed, card)
        if made.forecast.fits:
            return changed, made
        found = made.forecast
        # What is still too large with nothing held for the optimizer is so with any.
        if made.forecast.without_optimizer > card.memory_bytes:
            too_large.add(kept)
    raise ValueError(
        f"gpu: found {card.memory_gib:.1f} GiB on {card.name}, expected at least {found.peak_bytes / 2**30:.1f} for "
        f"{planned.name} one pair at a time with its inputs held on the host; take a larger card, a smaller model or "
        "quantization nf4."
    )


def with_options(config: Any, options: dict[str, Any]) -> Any:
    """A copy of a configuration with other options."""
    changed = copy.copy(config)
    for name, value in options.items():
        setattr(changed, name, value)
    return changed
