"""The images of a packed sequence as they are and weakened, for pairs with a second root.

A pair whose loss reads the weakened image is two groups of a packed sequence: its prompt with both responses, and the
same prompt, whose image rows are noisy, with the chosen response. The noise comes from the fused op each time that
features are made. A pair's depends on the seed and the pair alone: the same bits in any batch, order, process, epoch
and resumed run, which is also what lets the reference's log-probs be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from weakref import WeakKeyDictionary

import torch
from torch import nn

from bpo_fast.models.load import base_model
from bpo_fast.models.packed_forward import image_features
from bpo_fast.models.packing import Group
from bpo_fast.models.weaken import TARGETS, resolve_schedule
from bpo_fast.ops.noise.add import add_noise

_schedule = cache(resolve_schedule)  # whose table on a device is copied there once


@dataclass(frozen=True)
class Weakening:
    """The noise on the images of second roots; see `models.weaken.weaken`.

    Attributes:
        step: of the schedule.
        target: "features" and "pixels" as there, a feature map at a time; "projected", the rows that stand in for a
            pair's image tokens, all of its images' as one.
        schedule: its name.
        seed: of the noise.

    Raises:
        ValueError: an unknown target or schedule, or a step that the schedule does not have.
    """

    step: int
    target: str
    schedule: str
    seed: int

    def __post_init__(self):
        if self.target not in TARGETS:
            raise ValueError(f"noise_target: found {self.target!r}, expected one of {', '.join(TARGETS)}.")
        _schedule(self.schedule).checked_step(self.step, "noise_step")


def second_root(group: Group) -> Group:
    """The group that a pair has for its weakened image: the same prefix, and the first of its branches."""
    return Group(group.prefix, group.branches[:1])


@torch.no_grad()
def features_of_both_roots(
    model: nn.Module,
    image_inputs: dict[str, torch.Tensor],
    weakening: Weakening,
    noise_ids: torch.Tensor,
    num_rows: Sequence[int],
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """Embedding rows of the pairs' images, and then the same of the weakened images.

    The vision tower runs once for "features", for which the projector runs twice, and twice for "pixels".

    Args:
        model: with or without a LoRA adapter.
        image_inputs: as for `image_features`; not read where features are given.
        weakening: the noise.
        noise_ids: int64 [B], of each pair; the ids of its feature maps count on from it.
        num_rows: image tokens of each pair's prompt.
        kept: [M, H], the rows of the images as they are, where a cache keeps them; "projected" needs no more.

    Returns:
        [2M, H].

    Raises:
        ValueError: feature maps that cannot be told apart by pairs.
    """
    noised = partial(add_noise, step=weakening.step, schedule=_schedule(weakening.schedule), seed=weakening.seed)
    if weakening.target == "projected":
        clean = image_features(model, image_inputs) if kept is None else kept
        parts = zip(noise_ids.split(1), clean.split(list(num_rows)), strict=True)
        return torch.cat([clean, *(noised(rows[None], sample_ids=number)[0] for number, rows in parts)])
    if weakening.target == "features":
        clean, maps = _features_and_maps(model, image_inputs)
        projected = _module(model, "features")(noised(maps, sample_ids=_map_ids(noise_ids, num_rows, len(maps))))
        return torch.cat([clean, projected.reshape(-1, projected.shape[-1])])
    clean = image_features(model, image_inputs)

    def change(pixels):
        return noised(pixels, sample_ids=_map_ids(noise_ids, num_rows, len(pixels)))

    return torch.cat([clean, _with_input(model, "pixels", image_inputs, change)])


# Of a model the module of each target: to look for one is to walk over all modules.
_MODULES: WeakKeyDictionary[nn.Module, dict[str, nn.Module]] = WeakKeyDictionary()


def _module(model, target):
    found = _MODULES.setdefault(base_model(model), {})
    if target not in found:
        find, _ = TARGETS[target]
        found[target] = find(model)
    return found[target]


def _with_input(model, target, image_inputs, change):
    """Embedding rows [M, H] of images, whose target's tensor is changed on its way."""
    _, hook = TARGETS[target]
    handle = hook(_module(model, target), change)
    try:
        return image_features(model, image_inputs)
    finally:
        handle.remove()


def _features_and_maps(model, image_inputs):
    """Embedding rows [M, H], and the feature maps [T, tokens, vision width] that the projector made them of."""
    maps = []

    def record(x):
        maps.append(x)
        return x

    clean = _with_input(model, "features", image_inputs, record)
    return clean, torch.cat(maps)


def _map_ids(noise_ids: torch.Tensor, num_rows: Sequence[int], num_maps: int) -> torch.Tensor:
    """Noise ids int64 [T] of the feature maps, which become as many rows each."""
    rows_a_map, rest = divmod(sum(num_rows), num_maps)
    if rest or any(rows % max(1, rows_a_map) for rows in num_rows):
        raise ValueError(
            f"noise_target: found {num_maps} feature maps for pairs of {', '.join(map(str, num_rows))} image tokens, "
            "expected maps of as many tokens each; set noise_target to 'projected'."
        )
    counts = [rows // rows_a_map for rows in num_rows]
    numbers = zip(noise_ids.split(1), counts, strict=True)
    return torch.cat([first + torch.arange(count, device=first.device) for first, count in numbers])


@torch.no_grad()
def check_weakening(model: nn.Module, image_inputs: dict[str, torch.Tensor], weakening: Weakening) -> None:
    """Refuse a noise target that is not all of what the language model sees of an image.

    "features" and "pixels" go by feature maps, a pair's one after the other; a model that puts maps together and in
    between rows of its own, as LLaVA-NeXT does, has no such order.

    Raises:
        ValueError: the projector's rows are not the model's image features one by one, but for rounding.
    """
    if weakening.target == "projected":
        return
    clean, maps = _features_and_maps(model, image_inputs)
    rows = _module(model, "features")(maps).reshape(-1, clean.shape[-1])
    # A GPU may choose another product for the copy of the maps; rows of others' places differ by their own size.
    if rows.shape != clean.shape or (rows - clean).float().norm() > 0.1 * clean.float().norm():
        raise ValueError(
            f"noise_target: found '{weakening.target}' for {type(base_model(model)).__name__}, whose image tokens are "
            "not its projector's rows one by one, expected 'projected'; set it."
        )
