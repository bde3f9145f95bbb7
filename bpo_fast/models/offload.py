"""Inputs of layers in page-locked memory of the host, copied there and back beside the computation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._subclasses import FakeTensor


@dataclass
class _Held:
    """An input on the host; `before` is that of the layer before, which the backward pass needs next."""

    host: torch.Tensor | None
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    before: _Held | None
    fetched: tuple[torch.Tensor, torch.cuda.Event | None] | None = None


class LayerInputs:
    """Holds the tensors that autograd saves of a decoder's layers on the host while they are not needed.

    On CUDA all copies run on a stream of their own: those to the host while the next layers compute, and those back
    one layer ahead of the backward pass. What lies on the host already stays where it is. Of a fake tensor, whose
    bytes are counted as those of a device, nothing is held.
    """

    def __init__(self):
        self._last: _Held | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def put(self, number: int, tensor: torch.Tensor) -> torch.Tensor | _Held:
        """Take a tensor to the host.

        Args:
            number: of its layer; a forward pass begins with layer 0.
            tensor: what autograd saves of it.
        """
        if tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor):
            return tensor
        before = self._last if number > 0 else None
        host = None if isinstance(tensor, FakeTensor) else self._to_host(tensor)
        self._last = held = _Held(host, tensor.shape, tensor.stride(), tensor.dtype, tensor.device, before)
        return held

    def get(self, held: torch.Tensor | _Held) -> torch.Tensor:
        """The tensor on its device again; the one of the layer before is on its way then."""
        if isinstance(held, torch.Tensor):
            return held
        if held is self._last:
            self._last = None  # nothing is added to this forward pass any more
        tensor, copied = held.fetched or self._fetch(held)
        held.fetched = None
        if copied is not None:
            torch.cuda.current_stream(held.device).wait_event(copied)
        if (before := held.before) is not None and before.fetched is None:
            before.fetched = self._fetch(before)
        held.before = None
        return tensor

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        stream = self._stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not given to others before it was read
        return host

    def _fetch(self, held: _Held) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        # Memory of the stream that uses it, so that none is held between two streams; what used it before is waited
        # for, which also keeps the copy from running further ahead than one layer.
        tensor = torch.empty_strided(held.shape, held.stride, dtype=held.dtype, device=held.device)
        if held.host is None:
            return tensor, None
        stream = self._stream(held.device)
        stream.wait_stream(torch.cuda.current_stream(held.device))
        with torch.cuda.stream(stream):
            tensor.copy_(held.host, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        return tensor, copied

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]
