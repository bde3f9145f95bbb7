"""The sigmoid loss of pairs in one launch on a GPU; elsewhere `preference.sequence_preference` goes step by step."""

import torch
from torch import Tensor


@torch.library.custom_op("bpo_fast::sigmoid_preference", mutates_args=())
def _sigmoid_preference(
    logps: Tensor, ref_logps: Tensor | None, num_tokens: Tensor | None, beta: float, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [], rewards [2B], and the gradient of the loss in logps [2B]."""
    from bpo_fast.kernels.sigmoid_preference import launch_sigmoid_preference

    outputs = _sigmoid_preference_fake(logps, ref_logps, num_tokens, beta, label_smoothing)
    options = {"beta": beta, "label_smoothing": label_smoothing}
    with torch.cuda.device_of(logps):  # Triton launches on the current device
        launch_sigmoid_preference(logps, ref_logps, num_tokens, *outputs, **options)
    return outputs


@_sigmoid_preference.register_fake
def _sigmoid_preference_fake(logps, ref_logps, num_tokens, beta, label_smoothing):
    return logps.new_empty(()), torch.empty_like(logps), torch.empty_like(logps)


def _setup_context(ctx, inputs, output):
    ctx.num_constants = len(inputs) - 1
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2])


def _backward(ctx, grad, *_):
    (coefficients,) = ctx.saved_tensors
    return None if grad is None else grad * coefficients, *[None] * ctx.num_constants


_sigmoid_preference.register_autograd(_backward, setup_context=_setup_context)


def sigmoid_preference(
    logps: Tensor, ref_logps: Tensor | None, num_tokens: Tensor | None, beta: float, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Mean sigmoid loss [] of pairs, differentiable in logps, and the rewards [2B], in one launch.

    Args:
        logps: float32 [2B], chosen first, summed over tokens, on a CUDA device; B not 0.
        ref_logps: float32 [2B] or None.
        num_tokens: int64 [2B] for the loss of log-ratios per token, None for that of sums. Rewards are sums.
        beta: as in `LossConfig`.
        label_smoothing: as in `LossConfig`.
    """
    ref_logps = None if ref_logps is None else ref_logps.detach().contiguous()
    logps = logps.contiguous()
    loss, rewards, _ = _sigmoid_preference(logps, ref_logps, num_tokens, float(beta), float(label_smoothing))
    return loss, rewards.detach()
