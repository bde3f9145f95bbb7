"""Log-probabilities of target tokens straight from hidden states, without the logits of more than one chunk of tokens.

`head_sweep.py` says how.
"""

import torch
from torch import Tensor

from bpo_fast.ops.checks import IGNORE_INDEX, check_indices, check_same, check_tensor, check_transform
from bpo_fast.ops.head_sweep import Arguments, Outputs, linear_token_logps_op
from bpo_fast.ops.precision import without_autocast
from bpo_fast.ops.rows import TokenStatistics, accumulation_dtype
from bpo_fast.ops.token_logps import SequenceLogps


def check_head(hidden_name, hidden, *, weight, bias, lora):
    """The checks that the callers of a head share; weight, bias and lora are (name of the argument, value)."""
    (weight_name, weight), (bias_name, bias), (lora_name, lora) = weight, bias, lora
    check_tensor(weight_name, weight, ("V", hidden.shape[-1]))
    check_same(weight_name, weight, hidden_name, hidden)
    if not len(weight):
        raise ValueError(f"{weight_name}: found V = 0, expected at least one row.")
    if bias is not None:
        check_tensor(bias_name, bias, (len(weight),))
        check_same(bias_name, bias, hidden_name, hidden)
    if lora is not None:
        if not isinstance(lora, tuple) or len(lora) != 3:
            raise TypeError(f"{lora_name}: found {type(lora).__name__}, expected (lora_A, lora_B, scaling).")
        check_tensor(f"{lora_name}'s lora_A", lora[0], ("r", hidden.shape[-1]))
        check_tensor(f"{lora_name}'s lora_B", lora[1], (len(weight), len(lora[0])))


def _low_rank(rows, lora):
    """Low-rank rows [N, r] and weight [V, r] of the adapter, in the accumulation dtype.

    They are small, and rounded to 16 bits, as autocast would, the rows alone would cost the logits more than anything
    else here does.
    """
    if lora is None:
        return None, None
    lora_A, lora_B, scaling = lora
    dtype = accumulation_dtype(rows.dtype)
    with without_autocast(rows):
        return rows.to(dtype) @ lora_A.t().to(dtype) * scaling, lora_B.to(dtype)


def _through_head(
    hidden,
    weight,
    targets,
    *,
    ref_hidden=None,
    bias=None,
    lora=None,
    logit_softcap=None,
    temperature=1.0,
    with_statistics=False,
    dense=False,
):
    """`Outputs` of the op, flat, for hidden states and targets of any shape, unchecked; and the `TokenStatistics`."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    low_rank, low_rank_weight = _low_rank(rows, lora)
    with_rows = torch.is_grad_enabled() and (rows.requires_grad or (low_rank is not None and low_rank.requires_grad))
    arguments = Arguments(
        hidden=rows,
        ref_hidden=None if ref_hidden is None else ref_hidden.detach().reshape(rows.shape),
        weight=weight,
        targets=None if targets is None else targets.reshape(-1).to(torch.int64).contiguous(),
        bias=bias,
        low_rank=low_rank,
        low_rank_weight=low_rank_weight,
        softcap=None if logit_softcap is None else float(logit_softcap),
        temperature=float(temperature),
        with_rows=with_rows,
        with_statistics=with_statistics,
        dense=dense,
    )
    outputs = Outputs(*linear_token_logps_op(*arguments))
    if not with_statistics:
        return outputs, None
    return outputs, TokenStatistics(*outputs.statistics.detach().reshape(4, *targets.shape))


def flat_linear_token_logps(hidden, weight, targets, **options):
    """`linear_token_logps` of [N, H] without its checks, for targets [N] none of which is ignored.

    Such rows need not be looked for, so on a GPU nothing waits. Returns (logps, TokenStatistics or None).
    """
    outputs, statistics = _through_head(hidden, weight, targets, dense=True, **options)
    return outputs.logps, statistics


def linear_sequence_logps(hidden, ref_hidden, weight, targets, **options):
    """`sequence_logps` from hidden states: `SequenceLogps` of hidden and ref_hidden (or None) [S, T, H], unchecked.

    The reference goes through the head without its adapter, and is a constant.
    """
    outputs, statistics = _through_head(hidden, weight, targets, ref_hidden=ref_hidden, **options)
    token_logps = outputs.logps.view(targets.shape)
    ref_token_logps = None if ref_hidden is None else outputs.ref_logps.detach().view(targets.shape)
    return SequenceLogps(
        token_logps=token_logps,
        logps=token_logps.sum(1),
        ref_token_logps=ref_token_logps,
        ref_logps=None if ref_hidden is None else ref_token_logps.sum(1),
        num_tokens=(targets != IGNORE_INDEX).sum(1),
        statistics=statistics,
    )


def linear_logsumexp(hidden, weight, **options):
    """log sum exp over the vocabulary of the final logits of hidden [N, H], float32 [N]; differentiable, unchecked.

    What a shard of the vocabulary has to say of each token: see `vocab_parallel.py`.
    """
    return -_through_head(hidden, weight, None, dense=True, **options)[0].logps


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
    lora: tuple[Tensor, Tensor, float] | None = None,
    with_statistics: bool = False,
) -> Tensor | tuple[Tensor, TokenStatistics]:
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
            the vocabulary. On a CUDA device such a target gives NaN, and so does its gradient.

    Example:
        >>> linear_token_logps(torch.ones(2, 3), torch.zeros(5, 3), torch.tensor([4, -100]))
        tensor([-1.6094,  0.0000])
    """
    check_tensor("hidden", hidden, ("...", "H"))
    check_indices("targets", targets, hidden.shape[:-1])
    check_same("targets", targets, "hidden", hidden)
    check_head("hidden", hidden, weight=("weight", weight), bias=("bias", bias), lora=("lora", lora))
    check_transform(logit_softcap, temperature)
    outputs, statistics = _through_head(
        hidden,
        weight,
        targets,
        bias=bias,
        lora=lora,
        logit_softcap=logit_softcap,
        temperature=temperature,
        with_statistics=with_statistics,
    )
    logps = outputs.logps.reshape(targets.shape)
    return (logps, statistics) if with_statistics else logps
