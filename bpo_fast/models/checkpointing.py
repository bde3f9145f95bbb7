"""What a decoder's layers keep for the backward pass, and what they compute again in it.

Each layer is run by a function of the mode, through transformers' `GradientCheckpointingLayer`. All modes give the
gradients of "none", bit for bit: what is computed again is computed by the same code from the same inputs.

| mode | kept of a layer | computed again |
|---|---|---|
| none | everything | nothing |
| selective | its input, outputs of its linears, their thin LoRA products | norms, rotations, attention, activations |
| every_N | all of it in N - 1 layers of N, the input of the others | every N-th layer |
| full | its input | every layer |
| offload | nothing on the device: its input lies in page-locked memory of the host | every layer |

every_N takes single layers. A span of N layers behind one kept input would also be recomputed whole, and would hold
the activations of N layers at a time for N - 1 inputs saved: at 13B an input is a twentieth of a layer's activations,
so the shortest span is the smallest.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from bpo_fast.models.offload import LayerInputs
from bpo_fast.models.selective import run_selectively

MODES = ("none", "selective", "every_N", "full", "offload")


def check_mode(mode: str) -> None:
    """Refuse what is not a mode.

    Raises:
        ValueError: it is none of `MODES`, N a whole number of at least 2.

    Example:
        >>> check_mode("every_4")
    """
    if mode not in MODES or mode == "every_N":
        _every(mode)


def set_checkpointing(decoder: nn.Module, mode: str) -> None:
    """Let the layers of a decoder run in a mode whenever they train.

    Args:
        decoder: of a transformers model, with or without a LoRA adapter on its modules.
        mode: "none", "selective", "full", "offload", or "every_2", "every_3", ...

    Raises:
        ValueError: the mode is unknown, or the decoder has no layers that can be checkpointed.
    """
    check_mode(mode)
    layers = list(_layers(decoder))
    if not layers and mode != "none":
        raise ValueError(
            f"checkpointing: found '{mode}' for {type(decoder).__name__}, whose layers transformers cannot run again, "
            "expected 'none'; set checkpointing to none."
        )
    inputs = LayerInputs()
    step = _every(mode) if mode.startswith("every_") else 1
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = mode != "none" and number % step == 0
        # Random numbers are drawn again only where a layer draws any: their state costs a copy a layer.
        run = partial(_run, preserve_rng_state=draws_random_numbers(layer))
        if mode == "selective":
            run = partial(run_selectively, layer, preserve_rng_state=draws_random_numbers(layer))
        elif mode == "offload":
            run = partial(_run_offloaded, inputs, number, number + 1 == len(layers), run)
        layer._gradient_checkpointing_func = partial(_where_gradients_are, run)


def draws_random_numbers(layer: nn.Module) -> bool:
    """Whether a layer may draw random numbers while it trains: dropout as a module or a rate, jitter of a router.

    Example:
        >>> draws_random_numbers(nn.Dropout(0.1)), draws_random_numbers(nn.Dropout(0.0))
        (True, False)
    """
    return any(_draws(module) for module in layer.modules())


def _draws(module):
    if isinstance(module, _DropoutNd):
        return module.p > 0
    rates = (value for name, value in vars(module).items() if re.search("drop|jitter", name))
    return any(isinstance(rate, int | float) and rate > 0 for rate in rates)


def _every(mode: str) -> int:
    found = re.fullmatch("every_([0-9]+)", mode)
    if found is None or int(found[1]) < 2:
        raise ValueError(
            f"checkpointing: found {mode!r}, expected one of {', '.join(MODES)}, N a number of layers of at least 2."
        )
    return int(found[1])


def _layers(module: nn.Module) -> Iterator[GradientCheckpointingLayer]:
    """The outermost layers, in their order."""
    for child in module.children():
        if isinstance(child, GradientCheckpointingLayer):
            yield child
        else:
            yield from _layers(child)


def _where_gradients_are(run: Callable, function: Callable, *args):
    """The reference's pass, without gradients, has nothing to keep."""
    return run(function, *args) if torch.is_grad_enabled() else function(*args)


def _run(function, *args, preserve_rng_state):
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


def _run_offloaded(inputs, number, is_last, run, function, *args):
    if is_last:  # the backward pass begins with it
        return run(function, *args)
    with torch.autograd.graph.saved_tensors_hooks(partial(inputs.put, number), inputs.get):
        return run(function, *args)
