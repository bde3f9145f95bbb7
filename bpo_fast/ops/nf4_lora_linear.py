"""Frozen linears, of 4 bits or not, with LoRA on top: one node of the graph for all that read the same input.

    Y_i = X W_i^T + b_i + s_i U_i B_i^T        U = X A^T, A the A_i one below the other

        dU_i = s_i dY_i B_i                    dB_i = s_i dY_i^T U_i
        dX   = sum_i dY_i W_i + dU A           dA   = dU^T X

Each sum is a product's own accumulation into what is there (`addmm` into its own output), so nothing but products
reads or writes an activation. X and U are kept for the backward pass, X once for all i; weights of 4 bits are
dequantised for each product, into one buffer.

Dtypes are those of PEFT's layers. The frozen product runs in autocast's dtype, of 4 bits in the layer's own; the
low-rank products in autocast's, or in that of A and B. Where the two differ, the result is added in the wider one and
rounded once.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake
from torch.nn.functional import linear


@dataclass
class Frozen:
    """A linear that is not trained.

    Attributes:
        weight: [out, in], or bitsandbytes' packed 4 bits with their `quant_state`.
        bias: [out].
        compute_dtype: of the product of a 4-bit weight; None is the input's.
        keep: hold a dequantised or cast weight from a recomputation in the backward pass to the product that needs it
            there next. It is dequantised once less, and all weights of what is recomputed at once are held in full.
    """

    weight: Tensor
    bias: Tensor | None = None
    compute_dtype: torch.dtype | None = None
    keep: bool = False
    kept: Tensor | None = None

    @property
    def state(self) -> object | None:
        """bitsandbytes' quantisation state, None of a plain weight."""
        return getattr(self.weight, "quant_state", None)

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.weight.shape if self.state is None else self.state.shape)


class LowRank(NamedTuple):
    """What LoRA adds: `scaling` B A, with `a` [r, in] and `b` [out, r]."""

    a: Tensor
    b: Tensor
    scaling: float


def lora_linears(hidden: Tensor, linears: Sequence[Frozen], adapters: Sequence[LowRank | None]) -> tuple[Tensor, ...]:
    """The outputs of linears that read one input, each with its adapter.

    Args:
        hidden: [..., in], floating point.
        linears: n of them, with `in` columns each.
        adapters: n; None is a linear as it is.

    Returns:
        n outputs [..., out_i] in the dtype that PEFT's layer gives: the input's for 4 bits, that of the product for
        others.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> weight, a, b = torch.eye(2), torch.ones(1, 2), torch.tensor([[1.0], [0.0]])
        >>> lora_linears(torch.tensor([[1.0, 2.0]]), [Frozen(weight)], [LowRank(a, b, 0.5)])
        (tensor([[2.5000, 2.0000]]),)
    """
    for linear_, adapter in zip(linears, adapters, strict=True):
        (out, width), a = linear_.shape, adapter.a if adapter else None
        if hidden.shape[-1] != width:
            raise ValueError(f"hidden: found {tuple(hidden.shape)}, expected [..., {width}], as the weight's columns.")
        if adapter and (a.shape[1:] != (width,) or adapter.b.shape != (out, len(a))):
            raise ValueError(
                f"adapters: found {tuple(a.shape)} and {tuple(adapter.b.shape)}, expected [r, {width}] and [{out}, r]."
            )
    matrices = [matrix for adapter in adapters if adapter for matrix in adapter[:2]]
    return _LoraLinears.apply(hidden, tuple(linears), tuple(adapters), *matrices)


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, linears, adapters, *matrices):
        ctx.set_materialize_grads(False)
        ctx.linears, ctx.adapters, ctx.shape, ctx.dtype = linears, adapters, hidden.shape, hidden.dtype
        autocast = _autocast_dtype(hidden)
        ctx.dtypes = [_product_dtype(frozen, hidden, autocast) for frozen in linears]
        ctx.low = autocast or next((adapter.a.dtype for adapter in adapters if adapter), hidden.dtype)
        # All dtypes are given here; autocast would change those that are not its own.
        with _without_autocast([hidden] if {*ctx.dtypes} - {autocast} else []):
            outputs, kept = _forward(ctx, hidden)
        ctx.save_for_backward(*kept)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        # As in the forward pass, dtypes are given here.
        with _without_autocast(gradients):
            return _backward(ctx, gradients)


def _forward(ctx, hidden):
    """The outputs, and what the backward pass needs: rows and low-rank activations."""
    adapted = any(ctx.adapters)
    rows = _Casts(hidden.reshape(-1, hidden.shape[-1]))
    low = torch.mm(rows.to(ctx.low), _stacked(ctx.adapters, ctx.low).t()) if adapted else None  # [N, R]
    # Inside a backward pass, this is a layer that is computed again for it.
    needed_next = ctx.needs_input_grad[0] and torch._C._current_graph_task_id() != -1
    outputs, parts = [], _parts(low, ctx.adapters)
    for frozen, adapter, dtype, part in zip(ctx.linears, ctx.adapters, ctx.dtypes, parts, strict=True):
        bias = None if frozen.bias is None else frozen.bias.to(dtype)
        output = linear(rows.to(dtype), dense(frozen, dtype, frozen.keep and needed_next), bias)
        result = dtype if frozen.state is None else hidden.dtype
        if adapter:
            wide = torch.promote_types(result, ctx.low)
            output = _add(output.to(wide), part.to(wide), adapter.b.to(wide).t(), adapter.scaling)
        outputs.append(output.to(result).view(*hidden.shape[:-1], -1))
    if not adapted:
        return outputs, ()
    # The narrower of what came and what met A.
    return outputs, (rows.to(ctx.low) if ctx.low.itemsize < hidden.dtype.itemsize else rows.given, low)


def _backward(ctx, gradients):
    adapted = [adapter for adapter in ctx.adapters if adapter]
    rows, low = ctx.saved_tensors if adapted else (None, None)
    d_low = None if low is None else torch.empty_like(low)
    d_hidden, d_matrices = None, []
    low_parts, d_low_parts = _parts(low, ctx.adapters), _parts(d_low, ctx.adapters)
    for i, (frozen, adapter, dtype, d_out) in enumerate(
        zip(ctx.linears, ctx.adapters, ctx.dtypes, gradients, strict=True)
    ):
        if d_out is None:  # this output was not used
            frozen.kept = None
            if adapter:
                d_low_parts[i].zero_()
                d_matrices.append(None)
            continue
        d_out = _Casts(d_out.reshape(-1, d_out.shape[-1]))
        if ctx.needs_input_grad[0]:
            d_hidden = _product(d_out.to(dtype), dense(frozen, dtype), d_hidden)
        frozen.kept = None
        if adapter:
            b, given = adapter.b.to(ctx.low), d_out.to(ctx.low)
            torch.addmm(d_low_parts[i], given, b, beta=0, alpha=adapter.scaling, out=d_low_parts[i])
            d_b = torch.empty_like(b)
            torch.addmm(d_b, given.t(), low_parts[i], beta=0, alpha=adapter.scaling, out=d_b)
            d_matrices.append(d_b.to(adapter.b.dtype))
    if adapted:
        if ctx.needs_input_grad[0]:
            d_hidden = _product(d_low, _stacked(ctx.adapters, ctx.low), d_hidden)
        d_a = torch.mm(d_low.t(), rows.to(ctx.low)).split([len(adapter.a) for adapter in adapted])
        d_a = [part.to(adapter.a.dtype) for part, adapter in zip(d_a, adapted, strict=True)]
        d_matrices = [matrix for pair in zip(d_a, d_matrices, strict=True) for matrix in pair]
    if d_hidden is not None:
        d_hidden = d_hidden.to(ctx.dtype).view(ctx.shape)
    return d_hidden, None, None, *d_matrices


def _add(to: Tensor, left: Tensor, right: Tensor, factor: float = 1.0) -> Tensor:
    """`to` += `factor` `left` `right`, by the product itself. `addmm_` does the same; FLOP counters know this form."""
    return torch.addmm(to, left, right, alpha=factor, out=to)


def _product(left: Tensor, right: Tensor, to: Tensor | None) -> Tensor:
    """`left` `right`, added to what is there, in the wider dtype of both."""
    if to is None:
        return torch.mm(left, right)
    wide = torch.promote_types(to.dtype, left.dtype)
    return _add(to.to(wide), left.to(wide), right.to(wide))


def _stacked(adapters: Sequence[LowRank | None], dtype: torch.dtype) -> Tensor:
    """[R, in]: the A of all adapters, cast as they are stacked."""
    given = [adapter.a for adapter in adapters if adapter]
    if len(given) == 1:
        return given[0].to(dtype)
    stacked = given[0].new_empty(sum(map(len, given)), given[0].shape[1], dtype=dtype)
    for part, a in zip(stacked.split([len(a) for a in given]), given, strict=True):
        part.copy_(a)
    return stacked


def _parts(low: Tensor | None, adapters: Sequence[LowRank | None]) -> list[Tensor | None]:
    """The columns of each adapter, None for a linear without one."""
    if low is None:
        return [None] * len(adapters)
    return list(low.split([len(adapter.a) if adapter else 0 for adapter in adapters], dim=1))


class _Casts:
    """A tensor in the dtypes it is asked for, each made once."""

    def __init__(self, given: Tensor):
        self.given, self._made = given, {}

    def to(self, dtype: torch.dtype) -> Tensor:
        if dtype == self.given.dtype:
            return self.given
        if dtype not in self._made:
            self._made[dtype] = self.given.to(dtype)
        return self._made[dtype]


def dense(frozen: Frozen, dtype: torch.dtype, keep: bool = False) -> Tensor:
    """[out, in] in a dtype, to be read before the next one on this stream: it may lie in the one buffer of all.

    A weight of 4 bits takes the dtype that it had before it was quantised on the way, as bitsandbytes does.

    Args:
        keep: let `frozen` hold it for the next call, in memory of its own.
    """
    if frozen.kept is not None and frozen.kept.dtype == dtype:
        return frozen.kept
    weight, state = frozen.weight, frozen.state
    if state is None and weight.dtype == dtype:
        return weight
    room = None if keep else _buffer
    made = weight if state is None else _dequantised(weight, state, room if state.dtype == dtype else None)
    if made.dtype != dtype:
        made = made.to(dtype) if room is None else room(made, made.shape, dtype).copy_(made)
    frozen.kept = made if keep else None
    return made


def _dequantised(weight: Tensor, state, room: Callable | None) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    packed = weight.detach()
    # bitsandbytes writes into a given tensor on a GPU alone, and its form for fake tensors into none.
    out = room(weight, state.shape, state.dtype) if room and weight.is_cuda and not is_fake(weight) else None
    return dequantize_4bit(packed, state, out=out)


# (device, stream or thread, dtype) -> memory for the largest weight so far. That of fake tensors ends with their mode.
_BUFFERS: dict[tuple, Tensor] = {}
_FAKE_BUFFERS: WeakKeyDictionary[FakeTensorMode, dict[tuple, Tensor]] = WeakKeyDictionary()


def _buffer(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    size = shape[0] * shape[1]
    buffers = _FAKE_BUFFERS.setdefault(like.fake_mode, {}) if is_fake(like) else _BUFFERS
    # What runs on one stream runs in turn; on a CPU, what one thread runs.
    turn = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else threading.get_ident()
    key = (like.device, turn, dtype)
    if key not in buffers or buffers[key].numel() < size:
        buffers[key] = torch.empty(size, dtype=dtype, device=like.device)
    return buffers[key][:size].view(*shape)


def _product_dtype(frozen: Frozen, hidden: Tensor, autocast: torch.dtype | None) -> torch.dtype:
    """Of the frozen product; autocast does not reach into bitsandbytes' one."""
    if frozen.state is None:
        return autocast or hidden.dtype
    return frozen.compute_dtype or hidden.dtype


def _autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    kind = hidden.device.type
    if hidden.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _without_autocast(tensors):
    kind = next((tensor.device.type for tensor in tensors if tensor is not None), None)
    if kind is None or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)
