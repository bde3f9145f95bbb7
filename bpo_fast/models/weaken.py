"""Image-weakened prompting: Gaussian noise on what the language model sees of an image.

BPO (arXiv 2403.08730, section 3.1) takes one step of a diffusion forward process on the image's features,

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,

so that the model has to answer from what its language prior knows. `weaken` does so for whatever a model is called
with; `models.weakened_features` for a batch whose answers are generated.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

from bpo_fast.models.families import PROJECTORS
from bpo_fast.models.load import base_model
from bpo_fast.ops.checks import INTEGER_DTYPES, check_indices, is_int
from bpo_fast.ops.noise.add import add_noise
from bpo_fast.ops.noise.operands import as_sample_ids
from bpo_fast.ops.noise.schedule import NoiseSchedule

SCHEDULES = ("sigmoid", "linear", "cosine")

# Whether this thread is in a block of `weaken`.
_WEAKENED: ContextVar[bool] = ContextVar("bpo_fast_weakened", default=False)


def resolve_schedule(schedule: str | NoiseSchedule) -> NoiseSchedule:
    """The `NoiseSchedule` called `schedule`, or `schedule` itself if it is one."""
    if isinstance(schedule, NoiseSchedule):
        return schedule
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: found {schedule!r}, expected one of {', '.join(SCHEDULES)}.")
    return getattr(NoiseSchedule, schedule)()


@contextmanager
def weaken(
    model: nn.Module,
    step: int | torch.Tensor | None,
    *,
    target: str = "features",
    schedule: str | NoiseSchedule = "sigmoid",
    seed: int = 0,
    sample_ids: torch.Tensor | Sequence[int] | None = None,
) -> Iterator[None]:
    """While the block runs, `model` sees its images with noise on them.

    Args:
        model: vision-language model of transformers (or a PEFT model of one) with a vision tower and a projector, and
            one feature map an image, as LLaVA-1.5 has.
        step: step of the schedule, 0 .. num_steps - 1, for all images or int64 [B]; None adds no noise.
        target: "features", the projector's input [B, tokens, vision width], as in the paper; "pixels", the vision
            tower's input [B, 3, height, width]; or "projected", the projector's output [B, tokens, width].
        schedule: "sigmoid" (the paper's), "linear", "cosine", or a schedule of your own.
        seed: seed of the noise.
        sample_ids: int64 [B] or a list of ints, ids of the images of every forward pass in the block; an image's noise
            depends on (seed, its id) alone. By default 0 .. B - 1.

    Raises:
        TypeError: a step or ids that are not whole numbers.
        ValueError: unknown target or schedule, ids that are not one row of numbers of 64 bits, a model without such a
            module, or one whose feature maps are not one an image.

    Example (with `model` and `inputs` of a LLaVA):

        with weaken(model, step=700, seed=0):
            logits = model(**inputs).logits
    """
    if target not in TARGETS:
        raise ValueError(f"target: found {target!r}, expected one of {', '.join(TARGETS)}.")
    schedule = resolve_schedule(schedule)
    if step is None:
        yield
        return
    if not is_int(step):
        check_indices("step", step, ("B",), dtypes=INTEGER_DTYPES, otherwise="an int")
    sample_ids = as_sample_ids(sample_ids)
    if sample_ids is not None:
        check_indices("sample_ids", sample_ids, ("B",), dtypes=INTEGER_DTYPES, otherwise="a list of ints")
        sample_ids = sample_ids.to(torch.int64)

    def noisy(x):
        if sample_ids is not None and x.shape[0] != len(sample_ids):
            raise ValueError(
                f"model: found {x.shape[0]} feature maps of {len(sample_ids)} images, expected one each for noise on "
                f"{target}; use a model without image tiling."
            )
        ids = None if sample_ids is None else sample_ids.to(x.device)
        return add_noise(x, step, schedule=schedule, seed=seed, sample_ids=ids)

    with changed(model, target, noisy):
        yield


@contextmanager
def changed(model: nn.Module, target: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """While the block runs, what `model` sees of its images at the `target` goes through `change`."""
    find_module, hook = TARGETS[target]
    handle = hook(find_module(model), change)
    token = _WEAKENED.set(True)
    try:
        yield
    finally:
        _WEAKENED.reset(token)
        handle.remove()


def is_weakened() -> bool:
    """Whether this is called in a block of `weaken`."""
    return _WEAKENED.get()


def find_projector(model: nn.Module) -> nn.Module:
    """The module between vision tower and language model.

    Raises:
        ValueError: none has a name of `families.PROJECTORS`.
    """
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] in PROJECTORS]
    if not found:
        raise ValueError(
            f"model: found no projector in {type(model).__name__}, expected one called {' or '.join(PROJECTORS)}; set "
            "target to 'pixels', which needs none."
        )
    return found[0]


def find_vision_tower(model: nn.Module) -> nn.Module:
    """The module that pixels go into.

    Raises:
        ValueError: the model has none.
    """
    base = base_model(model)
    tower = base.get_encoder(modality="image")
    if tower in (base, base.base_model):
        raise ValueError(f"model: found no vision tower in {type(model).__name__}, expected a vision-language model.")
    return tower


def _on_input(module, change):
    def hook(module, args, kwargs):
        if args:
            return (change(args[0]), *args[1:]), kwargs
        name = next(name for name, value in kwargs.items() if torch.is_tensor(value))
        return args, {**kwargs, name: change(kwargs[name])}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _on_output(module, change):
    return module.register_forward_hook(lambda module, args, output: change(output))


# What the noise is put on -> how its module is found, and where in that module's call the noise comes in.
TARGETS = {
    "features": (find_projector, _on_input),
    "pixels": (find_vision_tower, _on_input),
    "projected": (find_projector, _on_output),
}
