"""What autocast means to code that chooses its own precision."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast would have a matrix product of `x` in: x's own where it is off, and for float64.

    Under autocast a model in float32 or float16 makes tensors of several dtypes: what a linear makes is in the lower
    precision, what a norm or rotary angles make is not.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     autocast_dtype(torch.zeros(2))
        torch.bfloat16
    """
    device = x.device.type
    if not x.is_floating_point() or x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A block in which autocast rounds nothing on x's device: products of float32 stay in float32."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def precise(op: Callable[..., Any]) -> Callable[..., Any]:
    """The body of an op that runs without autocast, which reaches into it and would round what it multiplies."""

    @functools.wraps(op)
    def run(*arguments: Any) -> Any:
        with without_autocast(next(x for x in arguments if isinstance(x, Tensor))):
            return op(*arguments)

    return run
