"""The image features of a batch at several noise steps, the vision part run once an image.

Steps of one image share everything below their noise: the vision tower, and for noise on "projected" the projector.
Where each image has one feature map, the noise op reads a map once and writes it as often as it is wanted, into the
projector's input or straight to the rows of the image tokens; the tiles of one image are noised as one sample, image
by image.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bpo_fast.models.packed_forward import image_features
from bpo_fast.models.weaken import changed, find_projector, find_vision_tower
from bpo_fast.ops.noise.add import add_noise
from bpo_fast.ops.noise.rows import add_noise_rows
from bpo_fast.ops.noise.schedule import NoiseSchedule


@dataclass(frozen=True)
class ImageNoise:
    """Noise on the images of a batch, each of them at every step.

    Attributes:
        steps: K steps of the schedule.
        sample_ids: N ids, one an image; its noise depends on (seed, its id) alone, and is the same at every step but
            for its scale.
        schedule: what each step keeps.
        target: see `models.weaken.weaken`.
        seed: of the noise.
    """

    steps: Sequence[int]
    sample_ids: Sequence[int]
    schedule: NoiseSchedule
    target: str = "features"
    seed: int = 0


class Copy(NamedTuple):
    """An image at one step: its place among the images, the step, and the id of its noise."""

    image: int
    step: int
    sample_id: int


# What the steps of one image share, by the noise's target.
_SHARED = {"pixels": (), "features": (find_vision_tower,), "projected": (find_vision_tower, find_projector)}


@torch.no_grad()
def write_at_once(
    model: nn.Module, noise: ImageNoise, copies: Sequence[Copy], inputs: dict[str, Tensor], out: Tensor, rows: Tensor
) -> bool:
    """Write weakened features to the rows of their image tokens, all in one pass of the vision part.

    Args:
        model: with or without a LoRA adapter.
        noise: its target, schedule and seed.
        copies: C copies of N images.
        inputs: what the processor made of the N images, as `packed_forward.image_features` takes it.
        out: [S, H], where to.
        rows: the rows of `out`, copy after copy.

    Returns:
        False, and nothing written, where an image has several maps, or its features are not its projected map alone.
    """
    source, step, ids = (torch.tensor(numbers, device=out.device) for numbers in zip(*copies, strict=True))
    images = len(set(source.tolist()))
    arguments = {"schedule": noise.schedule, "seed": noise.seed, "sample_ids": ids}
    maps: list[Tensor] = []
    expected = [images] if noise.target == "projected" else []

    def noised(x):  # [C, 3, height, width]
        if len(x) != len(copies):
            return x
        maps.append(x)
        return add_noise(x, step, **arguments)

    def copied(x):  # [N, M, W] -> [C, M, W]
        if x.ndim != 3 or len(x) != images:
            return x
        buffer = x.new_empty(len(copies) * x.shape[1], x.shape[2])
        every = torch.arange(len(buffer), device=x.device)
        add_noise_rows(x, step, out=buffer, rows=every, source=source, **arguments)
        expected.append(len(copies))
        return buffer.view(len(copies), *x.shape[1:])

    def taken(x):  # [N or C, M, H]; what the model makes of the first N maps is only looked at
        if x.ndim != 3 or [len(x)] != expected:
            return x
        maps.append(x)
        return x[:images]

    if noise.target == "pixels":
        if any(len(x) != images for x in inputs.values()):
            return False
        with changed(model, "pixels", noised):
            features = image_features(model, {name: x.index_select(0, source) for name, x in inputs.items()})
        if maps:
            out.index_copy_(0, rows, features.to(out.dtype))
        return bool(maps)

    with ExitStack() as stack:
        if noise.target == "features":
            stack.enter_context(changed(model, "features", copied))
        stack.enter_context(changed(model, "projected", taken))
        features = image_features(model, inputs)
    # Some families pool, crop or join the maps behind their projector.
    if not maps or not torch.equal(features, maps[0][:images].flatten(0, 1)):
        return False
    if noise.target == "projected":
        add_noise_rows(maps[0], step, out=out, rows=rows, source=source, **arguments)
    else:
        out.index_copy_(0, rows, maps[0].flatten(0, 1).to(out.dtype))
    return True


@torch.no_grad()
def one_by_one(
    model: nn.Module, noise: ImageNoise, copies: Sequence[Copy], inputs_of: Callable[[int], dict[str, Tensor]]
) -> Tensor:
    """Weakened features [M, H], copy after copy, one image in the vision part at a time.

    Args:
        model: with or without a LoRA adapter.
        noise: its target, schedule and seed.
        copies: of the images; those of one image follow each other.
        inputs_of: what the processor makes of one of the images by itself.
    """
    features = []
    for image, group in itertools.groupby(copies, key=lambda copy: copy.image):
        inputs = inputs_of(image)
        with ExitStack() as stack:
            for find in _SHARED[noise.target]:
                stack.enter_context(_computed_once(find(model)))
            for copy in group:
                with as_one_sample(model, noise, copy):
                    features.append(image_features(model, inputs))
    return torch.cat(features)


@contextmanager
def as_one_sample(model: nn.Module, noise: ImageNoise, copy: Copy) -> Iterator[None]:
    """While the block runs, `model` sees one image, in whatever tiles or patches, as one sample of the noise."""

    def noisy(x):
        options = {"schedule": noise.schedule, "seed": noise.seed, "sample_ids": [copy.sample_id]}
        return add_noise(x.reshape(1, -1), copy.step, **options).view_as(x)

    with changed(model, noise.target, noisy):
        yield


@contextmanager
def _computed_once(module):
    """While the block runs, the module's first output is that of every call; its hooks are called as ever."""
    forward, outputs = module.forward, []
    own = vars(module).get("forward")

    def once(*args, **kwargs):
        if not outputs:
            outputs.append(forward(*args, **kwargs))
        return outputs[0]

    module.forward = once
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
