"""PEFT's LoRA linears run as one operation (`ops.nf4_lora_linear`), q/k/v together and gate/up together.

Only their forward changes. Parameters, names, saving, merging and everything else of a layer stay PEFT's, so
optimizers, checkpoints, DistributedDataParallel and a saved adapter see nothing of it. A layer that is not plain LoRA
on a frozen linear, or not at the moment, runs PEFT's own forward; `fused_linears` says which, and why.
"""

import functools

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from bpo_fast.ops.nf4_lora_linear import Frozen, LowRank, lora_linears

# Modules of one parent that read one tensor, by the names that transformers' decoders give them.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

FUSED = "fused"


def fuse_linears(model: nn.Module, *, keep_dequantized: bool = False) -> None:
    """Let the LoRA linears of a model run as one operation each, or one for those that read the same input.

    Args:
        model: with PEFT's layers in it; those that are fused already stay so.
        keep_dequantized: with checkpointing, hold the weights of a layer that is computed again, dequantised, until
            its backward pass has used them.
    """
    for module in model.modules():
        if type(module) in _classes():
            module.__class__ = _fused(type(module))
            module._frozen = Frozen(module.base_layer.weight)
            module._siblings = _Siblings([module])
        if isinstance(module, _Fused):
            module._frozen.keep = keep_dequantized
    for module in model.modules():
        for names in SIBLINGS:
            layers = [layer for name in names if isinstance(layer := getattr(module, name, None), _Fused)]
            if len(layers) > 1 and len({layer.in_features for layer in layers}) == 1:
                siblings = _Siblings(layers)
                for layer in layers:
                    layer._siblings = siblings


def fused_linears(model: nn.Module) -> dict[str, str]:
    """Of every LoRA layer, by its path: "fused", or why PEFT's own forward runs."""
    return {
        path: (_why_not(module) or FUSED)
        if isinstance(module, _Fused)
        else f"a {type(module).__name__} of another kind"
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


class _Fused:
    """What comes before PEFT's class, whose forward is the one to fall back to."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if args or kwargs or _why_not(self) is not None:
            return super().forward(x, *args, **kwargs)
        return self._siblings.output(self, x)


class _Siblings:
    """Linears that read one tensor: the first that is called computes for all, and the others hand out its results.

    Not so where there is nothing to share: without gradients, or without an adapter that is on. Nor where a model
    turns out to give them different tensors.
    """

    def __init__(self, layers: list[_Fused]):
        self.layers, self.alike = layers, len(layers) > 1
        self._first, self._input, self._version, self._waiting = None, None, 0, {}

    def output(self, layer: _Fused, x: Tensor) -> Tensor:
        if self._waiting:
            waiting, same = self._waiting, self._input is x and self._version == x._version
            if same and layer in waiting and torch.is_grad_enabled():
                output = waiting.pop(layer)
                if not waiting:
                    self._input = None
                return output
            # Left over from a pass that was broken off, or another input than the first one's.
            self.alike &= layer is self._first or same
            self._input, self._waiting = None, {}
        low_rank = _low_rank(layer)
        if not self.alike or low_rank is None or not torch.is_grad_enabled():
            return lora_linears(x, [_frozen(layer)], [low_rank])[0]
        layers = [other for other in self.layers if other is layer or _why_not(other) is None]
        outputs = lora_linears(x, [_frozen(each) for each in layers], [_low_rank(each) for each in layers])
        results = dict(zip(layers, outputs, strict=True))
        output = results.pop(layer)
        if results:
            self._first, self._input, self._version, self._waiting = layer, x, x._version, results
        return output


def _frozen(layer) -> Frozen:
    # Read anew each time: a move to another device makes new parameters of 4 bits.
    frozen, base = layer._frozen, layer._modules["base_layer"]
    frozen.weight, frozen.bias = base._parameters["weight"], base._parameters["bias"]
    frozen.compute_dtype = getattr(base, "compute_dtype", None)
    return frozen


def _low_rank(layer) -> LowRank | None:
    adapter = _active(layer)
    if adapter is None:
        return None
    a, b = (layer._modules[name]._modules[adapter]._parameters["weight"] for name in ("lora_A", "lora_B"))
    return LowRank(a, b, layer.scaling[adapter])


def _active(layer) -> str | None:
    """The adapter that is on, if any."""
    if layer._disable_adapters:
        return None
    there = layer._modules["lora_A"]._modules
    return next((name for name in layer.active_adapters if name in there), None)


def _why_not(layer) -> str | None:
    """Why PEFT's own forward has to run now, or None. Called for every call of a layer, hence the plain lookups."""
    modules = layer._modules
    base = modules["base_layer"]
    weight = base._parameters["weight"]
    if layer.merged_adapters:
        return "the adapter is merged"
    if base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__:
        return "the base layer has hooks"
    if weight.requires_grad or (base._parameters["bias"] is not None and base._parameters["bias"].requires_grad):
        return "the base layer is trained"
    if isinstance(layer, LoraLinear):
        # Conv1D is transposed; other adapters, quantisations and shards come as classes of their own.
        odd = next((x for x in (base, weight) if type(x) not in (nn.Linear, nn.Parameter, FakeTensor)), None)
        if odd is not None:
            return f"the base layer is a {type(odd).__name__}"
    else:
        state = getattr(weight, "quant_state", None)
        if state is None:
            return "the base layer is not quantised yet"
        if getattr(state, "packing_format_for_cpu", False):
            return "bitsandbytes has packed the base layer for a CPU"
    name = _active(layer)
    if name is None:
        return None
    if sum(adapter in modules["lora_A"]._modules for adapter in layer.active_adapters) > 1:
        return "several adapters are on"
    if name in layer.lora_variant:
        return f"the adapter is a {type(layer.lora_variant[name]).__name__}"
    if layer.lora_bias[name]:
        return "the adapter has a bias"
    dropout = modules["lora_dropout"]._modules[name]
    if dropout.training and getattr(dropout, "p", 0.0):
        return f"lora_dropout is {dropout.p}"
    for part in ("lora_A", "lora_B"):
        matrix = modules[part]._modules[name]
        if type(matrix) is not nn.Linear or matrix._forward_hooks or matrix._forward_pre_hooks:
            return f"{part} is no plain linear"
    return None


@functools.cache
def _classes() -> tuple[type, ...]:
    """PEFT's classes of LoRA on a linear and, where bitsandbytes is installed, on one of 4 bits."""
    from peft.import_utils import is_bnb_4bit_available

    if not is_bnb_4bit_available():
        return (LoraLinear,)
    from peft.tuners.lora.bnb import Linear4bit

    return LoraLinear, Linear4bit


@functools.cache
def _fused(kind: type) -> type:
    return type(f"Fused{kind.__name__}", (_Fused, kind), {})
