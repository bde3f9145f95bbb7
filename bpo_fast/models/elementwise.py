"""Fused norms, rotations and gated activations in the layers of one decoder.

Liger's own functions change transformers' classes for every model of the process, whatever its device. Here the
modules of one decoder are changed, each kind only where the kernel gives what the module's own code gives on a random
input, and its gradients.
"""

import types
from collections.abc import Callable
from functools import partial

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from bpo_fast.ops.fused_elementwise import CASTINGS, KINDS, gated, rms_norm, rotate

# How far a fused result may lie from the module's own, in steps of the dtype at the largest value. Kernels round once
# where eager code rounds after every operation.
_STEPS = 4


def fuse_elementwise(decoder: nn.Module) -> dict[str, int]:
    """Let a decoder's frozen norms, its rotations and its gated activations run by Liger's kernels.

    Args:
        decoder: of a transformers model on a CUDA device, its adapter already on it.

    Returns:
        How many modules of each kind are fused: "norms", "activations", "rotations". What a kernel does not compute as
        the module does stays as it is, and is not counted.
    """
    counts = {"norms": 0, "activations": 0, "rotations": 0}
    # The reference runs the module that is saved whole, the policy its trained copy: neither is changed.
    whole = {
        part
        for module in decoder.modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for part in module.modules()
    }
    chosen: dict[tuple, Callable | None] = {}
    for module in decoder.modules():
        for kind, find in (("norms", _norm), ("activations", _activation), ("rotations", _rotation)):
            parts = find(module)
            if parts is None or module in whole or "forward" in vars(module):
                continue
            key = (kind, type(module), *parts[0])
            if key not in chosen:
                chosen[key] = next(parts[1], None)
            if chosen[key] is not None:
                module.forward = types.MethodType(chosen[key], module)
                counts[kind] += 1
    return counts


def _norm(module):
    """What tells a kind of norms apart, and the forwards that agree with it."""
    weight = module._parameters.get("weight")
    if "RMSNorm" not in type(module).__name__ or weight is None or weight.requires_grad:
        return None
    name = next((name for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    if name is None:
        return None

    def found():
        x = _random(weight, 3, len(weight))
        for offset, casting in CASTINGS:
            forward = partial(_norm_forward, name=name, offset=offset, casting=casting)
            if _agree(module, partial(forward, module), x):
                yield forward

    return (name, weight.dtype, len(weight)), found()


def _norm_forward(module, hidden_states, *, name, offset, casting):
    return rms_norm(hidden_states, module.weight, getattr(module, name), offset, casting)


def _activation(module):
    names = ("gate_proj", "up_proj", "down_proj")
    activation = getattr(module, "act_fn", None)
    if activation is None or not all(isinstance(getattr(module, name, None), nn.Module) for name in names):
        return None
    weight = next(module.parameters())

    def found():
        x = _random(_float_of(weight), 3, 64)
        # The module's own code around its activation alone.
        parts = types.SimpleNamespace(
            act_fn=activation, gate_proj=lambda x: x.clone(), up_proj=lambda x: x.flip(0), down_proj=lambda x: x
        )
        for kind in KINDS:
            if _agree(partial(type(module).forward, parts), partial(_gated_forward, parts, kind=kind), x):
                yield partial(_gated_forward, kind=kind)

    return (type(activation),), found()


def _gated_forward(module, x, *, kind):
    return module.down_proj(gated(module.gate_proj(x), module.up_proj(x), kind))


def _rotation(module):
    forward = type(module).forward
    own = getattr(forward, "__globals__", {}).get(_ROTATION)
    if (
        own is None
        or _ROTATION not in forward.__code__.co_names
        or forward.__closure__
        or not hasattr(module, "head_dim")
    ):
        return None
    weight = next(module.parameters())

    def found():
        size = module.head_dim
        q, k = (_random(_float_of(weight), 1, heads, 5, size) for heads in (4, 2))
        angles = torch.linspace(0.0, 3.0, 5 * size // 2, device=weight.device).view(1, 5, -1).repeat(1, 1, 2)
        cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
        if _agree(lambda q, k: own(q, k, cos, sin), lambda q, k: rotate(q, k, cos, sin), q, k):
            # The module's own code, that calls another function by this name.
            names = forward.__globals__ | {_ROTATION: rotate}
            yield types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__)

    return (module.head_dim,), found()


_ROTATION = "apply_rotary_pos_emb"


def _float_of(weight: Tensor) -> Tensor:
    """Something on the weight's device in the dtype that a layer's activations have; of 4 bits that is bfloat16."""
    return weight if weight.is_floating_point() else weight.new_empty(0, dtype=torch.bfloat16)


def _random(like: Tensor, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(like.device, like.dtype)


def _agree(own: Callable, fused: Callable, *given: Tensor) -> bool:
    """Whether both give the same outputs and gradients but for rounding; of fake tensors, whether both run."""
    try:
        expected, found = (_outputs_and_gradients(function, given) for function in (own, fused))
    except (TypeError, AttributeError, ValueError, RuntimeError):
        return False
    return all(
        e.shape == f.shape
        and e.dtype == f.dtype
        and (
            is_fake(e)
            or bool((e.float() - f.float()).abs().max() <= _STEPS * torch.finfo(e.dtype).eps * e.abs().max())
        )
        for e, f in zip(expected, found, strict=True)
    )


@torch.enable_grad()
def _outputs_and_gradients(function, given):
    leaves = [x.detach().clone().requires_grad_() for x in given]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = torch.autograd.grad(outputs, leaves, [_random(x, *x.shape, seed=1) for x in outputs])
    return [x.detach() for x in (*outputs, *gradients)]
