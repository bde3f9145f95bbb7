"""Tensors that lie one after the other in one buffer, so that they are sent, pinned and copied as one."""

from collections.abc import Callable, Sequence

import torch

# Where a tensor of the buffer may begin: as far apart as kernels ask of their operands.
_ALIGNMENT = 256

Place = tuple[torch.dtype, tuple[int, ...], int]  # dtype, shape, first byte


def in_one_buffer(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[Place]]:
    """One buffer that holds the tensors, and where; without a copy where they are such a buffer's already.

    Args:
        tensors: of any shapes and types, on one device.

    Returns:
        (buffer, places): uint8 [bytes], and what `out_of_buffer` finds each tensor by.

    Example:
        >>> buffer, places = in_one_buffer([torch.arange(2), torch.ones(3, dtype=torch.int32)])
        >>> buffer.shape, out_of_buffer(buffer, places)
        (torch.Size([268]), [tensor([0, 1]), tensor([1, 1, 1], dtype=torch.int32)])
    """
    places, end = [], 0
    for tensor in tensors:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        places.append((tensor.dtype, tuple(tensor.shape), start))
        end = start + tensor.numel() * tensor.element_size()
    if (buffer := _buffer_of(tensors, places, end)) is not None:
        return buffer, places
    buffer = torch.zeros(end, dtype=torch.uint8, device=tensors[0].device if tensors else None)
    for tensor, view in zip(tensors, out_of_buffer(buffer, places), strict=True):
        view.copy_(tensor)
    return buffer, places


def out_of_buffer(buffer: torch.Tensor, places: Sequence[Place]) -> list[torch.Tensor]:
    """The tensors of a buffer, as views."""
    tensors = []
    for dtype, shape, start in places:
        size = dtype.itemsize * torch.Size(shape).numel()
        tensors.append(buffer[start : start + size].view(dtype).view(shape))
    return tensors


def together(tensors: Sequence[torch.Tensor], function: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    """What `function` (a copy, pinning) makes of all tensors, called once."""
    buffer, places = in_one_buffer(tensors)
    return out_of_buffer(function(buffer), places)


def _buffer_of(tensors, places, size):
    """The buffer that the tensors are the views of; None if they are not."""
    if not tensors or (storage := tensors[0].untyped_storage()).nbytes() != size:
        return None
    for tensor, (_, _, start) in zip(tensors, places, strict=True):
        if tensor.untyped_storage()._cdata != storage._cdata or not tensor.is_contiguous():
            return None
        if tensor.storage_offset() * tensor.element_size() != start:
            return None
    return tensors[0].view(-1).view(torch.uint8).as_strided((size,), (1,), 0)
