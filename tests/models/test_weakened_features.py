"""Weakened features of a batch against noise by hand, one image at a time."""

import random
from functools import partial

import pytest
import torch
from PIL import Image
from tiny_families import EXACT

from bpo_fast.answers.prompts import Prompts
from bpo_fast.models.packed_forward import image_features
from bpo_fast.models.prompt import image_inputs
from bpo_fast.models.weakened_features import ImageNoise
from bpo_fast.ops.noise.add import add_noise
from bpo_fast.ops.noise.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.sigmoid()
STEPS, IDS, SEED = (300, 900), [11, 5, 2**62], 3
QUESTIONS = ["w1 w2 w3", "w4", "w5 w6"]


def make_images(sizes=((16, 16), (40, 24), (24, 48))):
    return [Image.frombytes("RGB", (w, h), random.Random(n).randbytes(3 * w * h)) for n, (w, h) in enumerate(sizes)]


def by_hand(model, inputs, target, step, sample_id):
    """Features of one image, the noise of one sample put on all that goes into, or comes out of, a module."""
    core = model.model
    projector = next(
        getattr(core, name) for name in ("multi_modal_projector", "connector", "merger") if hasattr(core, name)
    )

    def noised(x):
        flat = x.reshape(1, -1)
        return add_noise(flat, step, schedule=SCHEDULE, seed=SEED, sample_ids=[sample_id]).view_as(x)

    def on_input(module, args, kwargs):
        if args:
            return (noised(args[0]), *args[1:]), kwargs
        return args, {name: noised(x) if name == "pixel_values" else x for name, x in kwargs.items()}

    if target == "projected":
        handle = projector.register_forward_hook(lambda module, args, output: noised(output))
    else:
        module = projector if target == "features" else model.base_model.get_encoder(modality="image")
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    try:
        return image_features(model, inputs)
    finally:
        handle.remove()


@pytest.mark.parametrize("target", ["features", "pixels", "projected"])
@pytest.mark.parametrize("family", EXACT)
def test_each_image_has_its_noise_at_each_step_in_one_map_or_in_tiles(family, target):
    model, processor = EXACT[family]()
    images = make_images()
    noise = ImageNoise(STEPS, IDS, SCHEDULE, target, SEED)
    prompts = Prompts.of(model, processor, QUESTIONS, images, noise)
    embeds, mask = prompts.embed(range(6))
    clear = Prompts.of(model, processor, QUESTIONS, images)
    for row in range(6):
        number, level = divmod(row, 2)
        inputs = clear.inputs([number])
        expected, _ = clear.embed([number])
        shown = inputs["input_ids"][0] == model.config.image_token_id
        features = by_hand(model, image_inputs(inputs), target, STEPS[level], IDS[number])
        assert (features - expected[0, shown]).abs().max() > 1e-2
        expected[0, shown] = features
        torch.testing.assert_close(embeds[row][mask[row]], expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(prompts.embed([row])[0], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", ["LLaVA over Llama", "LLaVA-NeXT"])
@pytest.mark.parametrize(
    ("target", "towers", "projectors"), [("features", 1, 2), ("projected", 1, 1), ("pixels", 2, 2)]
)
def test_steps_of_an_image_share_what_is_below_their_noise(family, target, towers, projectors, monkeypatch):
    model, processor = EXACT[family]()
    maps = {"tower": 0, "projector": 0}

    def counted(forward, name, x, *args, **kwargs):
        maps[name] += len(x)
        return forward(x, *args, **kwargs)

    core = model.model
    for name, module in (("tower", core.vision_tower.embeddings), ("projector", core.multi_modal_projector)):
        monkeypatch.setattr(module, "forward", partial(counted, module.forward, name))
    noise = ImageNoise(STEPS, IDS[:2], SCHEDULE, target, SEED)
    images = make_images(((16, 16), (16, 16)))
    weakened = Prompts.of(model, processor, QUESTIONS[:2], images, noise)
    weakened.embed([0])  # finds out whether images have one map each
    maps.update(tower=0, projector=0)
    Prompts.of(model, processor, QUESTIONS[:2], images).embed(range(2))
    clear = dict(maps)
    maps.update(tower=0, projector=0)
    weakened.embed(range(4))
    assert maps == {"tower": towers * clear["tower"], "projector": projectors * clear["projector"]}
