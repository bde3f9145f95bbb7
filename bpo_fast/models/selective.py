"""A layer that keeps the outputs of its linears and computes the rest again in its backward pass.

torch's own selective checkpointing chooses by operator: under it a linear of 4 bits is dequantised again though its
output is kept, LoRA's thin products run again, and every operator goes through Python twice. Here whole modules are
left out of the second run: a linear hands out the output that it gave, and its input, computed again, takes the place
of what its own backward pass saved of it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import get_device_states, set_device_states


def run_selectively(layer: nn.Module, function: Callable, *args, preserve_rng_state: bool):
    """Run a layer; its backward pass needs its input, the outputs of its linears and one more run of the rest.

    Args:
        layer: whose linears are kept.
        function: its forward, which gets `args`.
        preserve_rng_state: the layer draws random numbers, which are to be the same in the second run.
    """
    return _Run(layer, function, args, preserve_rng_state).first()


def _linears(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost linears, each with its adapter."""
    for child in module.children():
        base = child.get_base_layer() if isinstance(child, BaseTunerLayer) else child
        if isinstance(base, nn.Linear):
            yield child
        else:
            yield from _linears(child)


def rotates_in_place(layer: nn.Module) -> bool:
    """Whether a layer's queries and keys are rotated by a kernel that another library has put in.

    Liger's writes over them, which autograd's count of versions does not see.
    """
    rotate = getattr(sys.modules[type(layer).__module__], "apply_rotary_pos_emb", None)
    return rotate is not None and not rotate.__module__.startswith("transformers.")


class _Saved:
    """Stands for a tensor that a node of the graph has saved, until the second run brings it."""

    __slots__ = ("__weakref__", "like", "run", "tensor")

    def __init__(self, run: _Run, like: tuple):
        self.run, self.like, self.tensor = run, like, None


class _Run:
    """The two runs of a layer in one step."""

    def __init__(self, layer, function, args, preserve_rng_state):
        self.linears, self.function, self.args = list(_linears(layer)), function, args
        self.copies = rotates_in_place(layer)
        self.device = next((x.device for x in args if isinstance(x, torch.Tensor)), torch.device("cpu"))
        # Of each call of a linear, in their order: its output with its version, and what its nodes saved of its input.
        self.outputs: list[tuple[torch.Tensor, int] | None] = []
        self.saved_inputs: list[list[weakref.ref[_Saved]]] = []
        # What the other nodes saved, in their order. The graph holds it; once its backward is done, nothing does.
        self.saved: list[weakref.ref[_Saved]] = []
        self.random = [self._random_state()] if preserve_rng_state else None
        self.autocast = _autocast(self.device.type)

    def first(self):
        self.input = None
        with self._linears_as(self._keep), saved_tensors_hooks(self._save, self._load):
            output = self.function(*self.args)
        if not self.saved_after_last:
            self.outputs[-1] = None  # the second run ends where the last linear begins
        return output

    @property
    def saved_after_last(self):
        return not self.outputs or len(self.saved) > self.saved_before_last

    def _keep(self, forward, *args, **kwargs):
        """A linear's call in the first run."""
        self.input = _first_tensor(args, kwargs)
        self.saved_inputs.append([])
        output = forward(*args, **kwargs)
        self.input = None
        self.outputs.append((output.detach().requires_grad_(output.requires_grad), output._version))
        self.saved_before_last = len(self.saved)
        if self.random is not None:
            self.random.append(self._random_state())
        return output.clone() if self.copies else output

    def _save(self, tensor):
        if self.input is None:
            saved = _Saved(self, (tensor.shape, tensor.dtype))
            self.saved.append(weakref.ref(saved))
            return saved
        if tensor.untyped_storage()._cdata != self.input.untyped_storage()._cdata:
            return tensor  # a weight, or thin
        offset = tensor.storage_offset() - self.input.storage_offset()
        saved = _Saved(self, (tensor.shape, tensor.stride(), offset))
        self.saved_inputs[-1].append(weakref.ref(saved))
        return saved

    def _load(self, saved):
        if not isinstance(saved, _Saved):
            return saved
        if saved.tensor is None:
            self._second()
        return saved.tensor

    def _second(self):
        args = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in self.args]
        self.calls, self.place = 0, 0
        with (
            self._random_as_before(),
            self.autocast,
            torch.enable_grad(),
            self._linears_as(self._hand_out),
            saved_tensors_hooks(self._bring, _no_backward),
            suppress(_Done),
        ):
            self.function(*args)
        if (self.calls, self.place) != (len(self.outputs), len(self.saved)):
            raise RuntimeError(
                f"checkpointing: found a layer that saved {self.place} tensors around {self.calls} linears when it "
                f"ran again, expected {len(self.saved)} around {len(self.outputs)}; set checkpointing to full."
            )
        # What is still needed is in the graph's hands.
        self.args = self.function = self.outputs = None

    def _hand_out(self, forward, *args, **kwargs):
        """A linear's call in the second run."""
        number, self.calls = self.calls, self.calls + 1
        tensor = _first_tensor(args, kwargs).detach()
        for saved in filter(None, (reference() for reference in self.saved_inputs[number])):
            shape, stride, offset = saved.like
            saved.tensor = tensor.as_strided(shape, stride, tensor.storage_offset() + offset)
        if self.random is not None:
            self._set_random_state(self.random[number + 1])
        if self.outputs[number] is None:
            raise _Done
        output, version = self.outputs[number]
        if output._version != version:
            raise RuntimeError(
                f"checkpointing: found a layer that writes into the output of {type(self.linears[0]).__name__} "
                f"{number}, expected it unchanged until the backward pass; set checkpointing to full."
            )
        return output

    def _bring(self, tensor):
        number, self.place = self.place, self.place + 1
        if number < len(self.saved) and (saved := self.saved[number]()) is not None:
            if saved.like != (tensor.shape, tensor.dtype):
                raise RuntimeError(
                    f"checkpointing: found a layer that computed {tuple(tensor.shape)}, {tensor.dtype}, when it ran "
                    f"again, expected {tuple(saved.like[0])}, {saved.like[1]}; set checkpointing to full."
                )
            saved.tensor = tensor.detach()
        if self.place == len(self.saved) and self.calls == len(self.outputs):
            raise _Done
        return None

    @contextmanager
    def _linears_as(self, call):
        """Send the calls of the linears through `call`, which gets each one's own forward first."""
        own = [(vars(linear), vars(linear).get("forward"), linear.forward) for linear in self.linears]
        try:
            for attributes, _, forward in own:
                attributes["forward"] = partial(call, forward)
            yield
        finally:
            for attributes, before, _ in own:
                if before is None:
                    del attributes["forward"]
                else:
                    attributes["forward"] = before

    def _random_state(self):
        return torch.get_rng_state(), get_device_states(*(x for x in self.args if isinstance(x, torch.Tensor)))

    def _set_random_state(self, state):
        host, devices = state
        torch.set_rng_state(host)
        set_device_states(*devices, device_type=self.device.type)

    @contextmanager
    def _random_as_before(self):
        if self.random is None:
            yield
            return
        own = self._random_state()
        self._set_random_state(self.random[0])
        try:
            yield
        finally:
            self._set_random_state(own)


class _Done(Exception):
    """The second run has brought everything."""


def _first_tensor(args, kwargs):
    return next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))


def _autocast(device_type):
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=torch.is_autocast_cache_enabled(),
    )


def _no_backward(_):
    raise RuntimeError("checkpointing: found a backward pass through a layer's second run, expected none.")
