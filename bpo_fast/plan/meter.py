"""What a step computes, moves and holds: FLOPs, bytes and live memory of every operation, on fake or real tensors."""

import weakref
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bpo_fast.plan.operations import Cost, HeadMemory, costs

# Kinds of dynamic memory; what lasts (weights, gradients, ...) is known by other names before a step.
KEPT, TRANSIENT, INSIDE = "kept for the backward pass", "recomputed and transient", "inside one operation"

# They make a tensor and neither read nor write memory.
_EMPTY = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
_EMPTY |= {"aten::_unsafe_view", "aten::_reshape_alias"}


@dataclass
class Metered:
    """What a `Meter` saw.

    Attributes:
        flops: of matrix products, two a multiply-add, by operation; others with 0.
        product_bytes: read and written by matrix products.
        other_bytes: read and written by everything else.
        peak_bytes: the most that was held at once.
        at_peak: what that was, by kind.
    """

    flops: Counter = field(default_factory=Counter)
    product_bytes: int = 0
    other_bytes: int = 0
    peak_bytes: int = 0
    at_peak: dict[str, int] = field(default_factory=dict)

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())


class Meter(TorchDispatchMode):
    """Counts while it is entered; the tensors of a step may be fake.

    A storage counts from the operation that made it to its end, whoever holds it. Memory that an operation takes and
    gives back inside itself is known by formula (`plan.operations`).

    Args:
        head: what the head takes of a device's memory.
    """

    def __init__(self, head: HeadMemory):
        super().__init__()
        self.metered = Metered()
        self._costs = costs(head)
        self._live: dict[int, tuple[int, str, weakref.ref]] = {}
        self._bytes: Counter = Counter()
        self._total = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def __enter__(self):
        self._hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        result = super().__exit__(*exception)
        self._hooks.__exit__(*exception)
        return result

    def know(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor that is there before the step, or change its kind."""
        if tensor.is_meta:  # which stands for the host's memory
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            self._bytes[self._live[key][1]] -= size
            self._live[key] = (size, kind, self._live[key][2])
        else:
            self._live[key] = (size, kind, weakref.ref(storage, lambda _, key=key: self._forget(key)))
            self._total += size
        self._bytes[kind] += size

    def keep(self) -> None:
        """Say at the end of a forward pass that what it leaves is kept for the backward pass."""
        for key, (size, kind, storage) in self._live.items():
            if kind == TRANSIENT:
                self._live[key] = (size, KEPT, storage)
                self._bytes[TRANSIENT] -= size
                self._bytes[KEPT] += size

    def held(self) -> dict[str, int]:
        """Bytes that are held now, by kind."""
        return {kind: size for kind, size in self._bytes.items() if size}

    def _forget(self, key):
        size, kind, _ = self._live.pop(key)
        self._total -= size
        self._bytes[kind] -= size

    def _keep(self, tensor):
        entry = self._live.get(tensor.untyped_storage()._cdata)
        if entry is not None and entry[1] == TRANSIENT:
            self.know(tensor, KEPT)
        return tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for tensor in outputs:
            if tensor.untyped_storage()._cdata not in self._live:
                self.know(tensor, TRANSIENT)
        cost = self._cost(func, args, kwargs, out, inputs + outputs)
        seen = self.metered
        seen.flops[func._overloadpacket] += cost.flops
        seen.product_bytes += cost.product_bytes
        seen.other_bytes += cost.other_bytes
        if self._total + cost.inside > seen.peak_bytes:
            seen.peak_bytes = self._total + cost.inside
            seen.at_peak = self.held() | ({INSIDE: cost.inside} if cost.inside else {})
        return out

    def _cost(self, func, args, kwargs, out, tensors):
        # A fake tensor is asked for its device by an operation, and some views are not called such.
        if func.is_view or func.namespace == "prim" or func.name().partition(".")[0] in _EMPTY:
            return Cost()
        packet = func._overloadpacket
        if packet in self._costs:
            return self._costs[packet](*args, **kwargs)
        moved = sum(map(_extent, tensors))
        if packet in flop_registry:
            return Cost(flop_registry[packet](*args, **kwargs, out_val=out), moved)
        return Cost(other_bytes=moved)


def _extent(tensor):
    """Bytes of the elements that a tensor shows, each once where it is expanded."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()
