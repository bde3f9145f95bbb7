"""Image-weakened prompting: Gaussian noise on what the language model sees of a picture.

BPO (arXiv 2403.08730, section 3.1) takes one step of a diffusion forward process on the picture's features,

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,

so that the model has to answer from what its language prior knows.
"""

from contextlib import contextmanager

import torch

from bpo_fast.models.load import base_model
from bpo_fast.ops.noise.add import add_noise
from bpo_fast.ops.noise.schedule import NoiseSchedule

TARGETS = ("features", "pixels", "projected")
SCHEDULES = ("sigmoid", "linear", "cosine")

# The names that transformers' models give to the module between vision tower and language model.
_PROJECTORS = ("multi_modal_projector", "mm_projector", "connector", "embed_vision", "aligner")


def resolve_schedule(schedule):
    """The `NoiseSchedule` called `schedule`, or `schedule` itself if it is one."""
    if isinstance(schedule, NoiseSchedule):
        return schedule
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, but it is {schedule!r}.")
    return getattr(NoiseSchedule, schedule)()


@contextmanager
def weaken(model, step, *, target="features", schedule="sigmoid", seed=0, sample_ids=None):
    """While the block runs, `model` sees its pictures with noise on them.

    Args:
        model: vision-language model of transformers (or a PEFT model of one) with a vision tower and a projector, and
            one feature map a picture, as LLaVA-1.5 has.
        step (`int`, `Tensor` [B] of int64, or `None`): step of the schedule, 0 .. num_steps - 1; None adds no noise.
        target (`str`): `features`, the projector's input [B, tokens, vision width], as in the paper; `pixels`, the
            vision tower's input [B, 3, height, width]; or `projected`, the projector's output [B, tokens, width].
        schedule (`str` or `NoiseSchedule`): `sigmoid` (the paper's), `linear` or `cosine`.
        seed (`int`): seed of the noise.
        sample_ids (`Tensor` [B] of int64 or list of int): ids of the pictures of every forward pass in the block; a
            picture's noise depends on (seed, its id) alone. By default 0 .. B - 1.

    Raises:
        ValueError: unknown target or schedule, a model without such a module, or one whose feature maps are not one a
            picture.

    Example (with `model` and `inputs` of a LLaVA):

        with weaken(model, step=700, seed=0):
            logits = model(**inputs).logits
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, but it is {target!r}.")
    schedule = resolve_schedule(schedule)
    if step is None:
        yield
        return
    if sample_ids is not None:
        sample_ids = torch.as_tensor(sample_ids, dtype=torch.int64)

    def noisy(x):
        if sample_ids is not None and x.shape[0] != len(sample_ids):
            raise ValueError(
                f"the model makes {x.shape[0]} feature maps of {len(sample_ids)} pictures, but noise on {target} "
                "needs one feature map a picture: use a model without image tiling."
            )
        ids = None if sample_ids is None else sample_ids.to(x.device)
        return add_noise(x, step, schedule=schedule, seed=seed, sample_ids=ids)

    def on_input(module, args, kwargs):
        if args:
            return (noisy(args[0]), *args[1:]), kwargs
        name = next(name for name, value in kwargs.items() if torch.is_tensor(value))
        return args, {**kwargs, name: noisy(kwargs[name])}

    if target == "pixels":
        handle = _vision_tower(model).register_forward_pre_hook(on_input, with_kwargs=True)
    elif target == "features":
        handle = _projector(model).register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        handle = _projector(model).register_forward_hook(lambda module, args, output: noisy(output))
    try:
        yield
    finally:
        handle.remove()


def _projector(model):
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] in _PROJECTORS]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no projector called {' or '.join(_PROJECTORS)}, so that noise can go on its "
            "pixels only: set target to 'pixels'."
        )
    return found[0]


def _vision_tower(model):
    base = base_model(model)
    tower = base.get_encoder(modality="image")
    if tower in (base, base.base_model):
        raise ValueError(f"{type(model).__name__} has no vision tower, and pictures cannot be weakened without one.")
    return tower
