"""A decoder's norms, rotations and gated activations by Liger's kernels, as operations that fake tensors know.

Liger's own functions write into their arguments: a rotation into q and k, the activation's backward into gate and up,
a norm's into the gradient. What a layer keeps for its backward pass must stay as it is, so here only the activation's
two inputs, which are then of no more use, are overwritten, and autograd is told.
"""

import torch
from torch import Tensor

# Of a norm's weight: added to it, and where it is multiplied.
CASTINGS = ((0.0, "llama"), (1.0, "gemma"))

# Activations that a second tensor is multiplied by.
KINDS = ("silu", "gelu_tanh")


@torch.library.custom_op("bpo_fast::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, casting: str) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.rms_norm import rms_norm_forward

    y, _, rstd, *_ = rms_norm_forward(x.contiguous(), weight, eps, offset, casting, None)
    return y, rstd


@_rms_norm.register_fake
def _(x, weight, eps, offset, casting):
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(
        x.numel() // x.shape[-1], dtype=torch.float32
    )


@torch.library.custom_op("bpo_fast::rms_norm_backward", mutates_args=())
def _rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, casting: str) -> Tensor:
    from liger_kernel.ops.rms_norm import _str_to_casting_mode, rms_norm_backward
    from liger_kernel.ops.utils import calculate_settings

    columns = x.shape[-1]
    mode = _str_to_casting_mode[casting]
    dx, _ = rms_norm_backward(
        dy.contiguous(),
        x.contiguous().view(-1, columns),
        weight,
        rstd,
        offset,
        mode,
        *calculate_settings(columns),
        in_place=False,
        row_mode=None,
        needs_dw=False,
    )
    return dx


@_rms_norm_backward.register_fake
def _(dy, x, weight, rstd, offset, casting):
    return torch.empty_like(dy, memory_format=torch.contiguous_format)


@torch.library.custom_op("bpo_fast::gated", mutates_args=())
def _gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return _gated_kernels(kind)[0](gate.contiguous(), up.contiguous())[2]


@_gated.register_fake
def _(gate, up, kind):
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@torch.library.custom_op("bpo_fast::gated_backward_", mutates_args=("gate", "up"))
def _gated_backward_(d_out: Tensor, gate: Tensor, up: Tensor, kind: str) -> None:
    gradients = _gated_kernels(kind)[1](gate, up, d_out.contiguous())
    for to, made in zip((gate, up), gradients, strict=True):
        if made.data_ptr() != to.data_ptr():  # Liger writes in place; this is for one that does not
            to.copy_(made)


def _gated_kernels(kind):
    if kind == "silu":
        from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward

        return swiglu_forward, swiglu_backward
    from liger_kernel.ops.geglu import geglu_backward, geglu_forward

    return geglu_forward, geglu_backward


@torch.library.custom_op("bpo_fast::rotate", mutates_args=())
def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.rope import rope_backward, rope_forward

    # In memory of their own, a token's heads in a row, as Liger wants them.
    q, k = (x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2) for x in (q, k))
    q, k, *_ = (rope_backward if backward else rope_forward)(q, k, cos, sin)
    return q, k


@_rotate.register_fake
def _(q, k, cos, sin, backward):
    return tuple(
        torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2) for x in (q, k)
    )


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset, casting):
        y, rstd = _rms_norm(x, weight, eps, offset, casting)
        ctx.save_for_backward(x, rstd)
        ctx.weight, ctx.options = weight, (offset, casting)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, rstd = ctx.saved_tensors
        return _rms_norm_backward(dy, x, ctx.weight, rstd, *ctx.options), None, None, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, kind):
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return _gated(gate, up, kind)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        gate, up = ctx.saved_tensors
        _gated_backward_(d_out, gate, up, ctx.kind)
        return gate, up, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(q, k, cos, sin, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_q, d_k):
        return *_rotate(d_q, d_k, *ctx.saved_tensors, True), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, casting: str = "llama") -> Tensor:
    """RMSNorm of the last dimension by a weight that is not trained.

    Args:
        x: [..., H] on a CUDA device.
        weight: [H].
        offset, casting: one of `CASTINGS`.
    """
    return _RMSNorm.apply(x, weight, eps, offset, casting)


def gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """activation(gate) * up, of two tensors [..., I] that a backward pass may overwrite.

    Args:
        kind: the activation, one of `KINDS`.
    """
    return _Gated.apply(gate, up, kind)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Rotary positions, as transformers' `apply_rotary_pos_emb`.

    Args:
        q, k: [B, heads, S, D], of any strides.
        cos, sin: [B, S, D].
    """
    return _Rotate.apply(q, k, cos, sin)
