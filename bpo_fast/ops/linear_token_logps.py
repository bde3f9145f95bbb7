"""Log-probabilities of target tokens straight from hidden states, without the logits of more than one chunk of tokens.

`head_sweep.py` says how.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bpo_fast.ops.checks import IGNORE_INDEX, check_indices, check_same, check_tensor, check_transform
from bpo_fast.ops.head_sweep import linear_token_logps_op
from bpo_fast.ops.rows import TokenStatistics, accumulation_dtype
from bpo_fast.ops.token_logps import SequenceLogps


class HeadLora(NamedTuple):
    """A LoRA adapter on the head: lora_A [r, H], lora_B [V, r] and their scaling, as PEFT names them."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float


def check_head(hidden_name, hidden, weight_name, weight, bias_name, bias, lora_name, lora):
    """The checks that `linear_token_logps` and `linear_dpo_loss` share, under the names of the caller's arguments."""
    check_tensor(weight_name, weight, ("V", hidden.shape[-1]))
    check_same(weight_name, weight, hidden_name, hidden)
    if not len(weight):
        raise ValueError(f"{weight_name} must have at least one row, got V = 0.")
    if bias is not None:
        check_tensor(bias_name, bias, (len(weight),))
        check_same(bias_name, bias, hidden_name, hidden)
    if lora is not None:
        if not isinstance(lora, tuple) or len(lora) != 3:
            raise TypeError(f"{lora_name} must be (lora_A, lora_B, scaling), got {type(lora).__name__}.")
        check_tensor(f"{lora_name}'s lora_A", lora[0], ("r", hidden.shape[-1]))
        check_tensor(f"{lora_name}'s lora_B", lora[1], (len(weight), len(lora[0])))


def _operands(hidden, lora):
    """hidden as rows [N, H], and the low-rank rows [N, r] and weight [V, r] of the adapter, in the accumulation dtype.

    They are small, and rounded to 16 bits the rows alone would cost the logits more than anything else here does.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    if lora is None:
        return rows, None, None
    lora_A, lora_B, scaling = lora
    dtype = accumulation_dtype(rows.dtype)
    return rows, rows.to(dtype) @ lora_A.t().to(dtype) * scaling, lora_B.to(dtype)


def _call(hidden, ref_hidden, weight, targets, bias, lora, logit_softcap, temperature, with_statistics, dense):
    """The op on hidden states and targets of any shape; its outputs, flat."""
    rows, low_rank, low_rank_weight = _operands(hidden, lora)
    with_rows = torch.is_grad_enabled() and (rows.requires_grad or (low_rank is not None and low_rank.requires_grad))
    return linear_token_logps_op(
        rows,
        None if ref_hidden is None else ref_hidden.detach().reshape(rows.shape),
        weight,
        None if targets is None else targets.reshape(-1).to(torch.int64).contiguous(),
        bias,
        low_rank,
        low_rank_weight,
        None if logit_softcap is None else float(logit_softcap),
        float(temperature),
        with_rows,
        with_statistics,
        dense,
    )


def flat_linear_token_logps(hidden, weight, targets, *, bias=None, logit_softcap=None, with_statistics=False):
    """`linear_token_logps` of [N, H] without its checks, for targets [N] none of which is ignored.

    Such rows need not be looked for, so on a GPU nothing waits. Returns (logps, TokenStatistics or None).
    """
    logps, _, _, _, statistics = _call(
        hidden, None, weight, targets, bias, None, logit_softcap, 1.0, with_statistics, True
    )
    return logps, TokenStatistics(*statistics.detach()) if with_statistics else None


def linear_sequence_logps(
    hidden,
    ref_hidden,
    weight,
    targets,
    *,
    bias=None,
    logit_softcap=None,
    temperature=1.0,
    lora=None,
    with_statistics=False,
):
    """`sequence_logps` from hidden states: `SequenceLogps` of hidden and ref_hidden (or None) [S, T, H], unchecked.

    The reference goes through the head without its adapter, and is a constant.
    """
    token_logps, ref_logps, _, _, statistics = _call(
        hidden, ref_hidden, weight, targets, bias, lora, logit_softcap, temperature, with_statistics, False
    )
    token_logps = token_logps.view(targets.shape)
    ref_token_logps = None if ref_hidden is None else ref_logps.detach().view(targets.shape)
    return SequenceLogps(
        token_logps,
        token_logps.sum(1),
        ref_token_logps,
        None if ref_hidden is None else ref_token_logps.sum(1),
        (targets != IGNORE_INDEX).sum(1),
        TokenStatistics(*statistics.detach().view(4, *targets.shape)) if with_statistics else None,
    )


def linear_logsumexp(hidden, weight, *, bias=None, logit_softcap=None, temperature=1.0):
    """log sum exp over the vocabulary of the final logits of hidden [N, H], float32 [N]; differentiable, unchecked.

    What a shard of the vocabulary has to say of each token: see `vocab_parallel.py`.
    """
    return -_call(hidden, None, weight, None, bias, None, logit_softcap, temperature, False, True)[0]


def linear_token_logps(
    hidden,
    weight,
    targets,
    *,
    bias=None,
    logit_softcap=None,
    temperature=1.0,
    lora=None,
    with_statistics=False,
):
    """Log-probability of each target token, log softmax(hidden @ weight.T + bias)[target], from hidden states.

    Never holds more logits than one chunk of tokens (128 MiB of float32 on the CPU, 1/128 of a GPU's memory). Tokens
    whose target is -100 do not meet the head at all. The logits are float32 for 16-bit inputs too: never rounded
    before the softmax.

    Args:
        hidden: float16, bfloat16, float32 or float64, [..., H].
        weight: the head, [V, H], of the same dtype and device. Tied embeddings need nothing: their gradient adds up.
        targets: int64 or int32, [...], the token that each row predicts (nothing is shifted here), in [0, V) or -100:
            such a row gives 0 and gets a gradient of 0.
        bias: [V] of the same dtype, or None.
        logit_softcap: cap c of logits c * tanh(logits / c) (Gemma 2), or None.
        temperature: divides the logits, after the cap.
        lora: an adapter on the head, (lora_A [r, H], lora_B [V, r], scaling) as PEFT holds them, or None; the logits
            get scaling * hidden @ lora_A.T @ lora_B.T, and the head is not merged with it.
        with_statistics: give the tokens' `TokenStatistics` too, from the same pass.

    Returns:
        float32 [...] (float64 for float64 inputs), in nats, differentiable in hidden, weight, bias and the adapter;
        with statistics the pair of it and a `TokenStatistics`. A weight, bias or lora_B that asks for a gradient costs
        a second sweep in the backward pass; its gradient is summed in float32.

    Raises:
        TypeError: arguments that are no floating-point tensors, or of different dtypes; targets of no integer dtype.
        ValueError: shapes or devices that do not fit, a cap or a temperature that is not positive, a target outside
            the vocabulary. On a CUDA device such a target gives NaN.

    >>> import torch
    >>> linear_token_logps(torch.ones(2, 3), torch.zeros(5, 3), torch.tensor([4, -100]))
    tensor([-1.6094,  0.0000])
    """
    if not isinstance(hidden, Tensor) or hidden.ndim < 1:
        raise ValueError("hidden must be a tensor of shape [..., H] with at least one dimension.")
    check_tensor("hidden", hidden, (*hidden.shape[:-1], "H"))
    check_indices("targets", targets, hidden.shape[:-1])
    check_same("targets", targets, "hidden", hidden)
    check_head("hidden", hidden, "weight", weight, "bias", bias, "lora", lora)
    check_transform(logit_softcap, temperature)
    logps, _, _, _, statistics = _call(
        hidden, None, weight, targets, bias, lora, logit_softcap, temperature, with_statistics, False
    )
    logps = logps.reshape(targets.shape)
    if not with_statistics:
        return logps
    return logps, TokenStatistics(*statistics.detach().reshape(4, *targets.shape))
