"""Preference losses of a model's output: from logits (`dpo_loss`) or from hidden states (`linear_dpo_loss`).

Both make token log-probs and hand them to `token_preference`; formulas and sources of the losses are in `table`.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bpo_fast.losses.config import loss_config
from bpo_fast.losses.output import PreferenceOutput
from bpo_fast.losses.preference import Responses, token_preference
from bpo_fast.ops.checks import IGNORE_INDEX, check_device, check_indices, check_same, check_tensor, check_transform
from bpo_fast.ops.linear_token_logps import check_head, linear_sequence_logps
from bpo_fast.ops.rows import TokenStatistics
from bpo_fast.ops.token_logps import sequence_logps


def _check_pairs(name, value, last, labels, ref_name, reference, ref_logps, token_weights, config):
    """The checks that both DPO losses share: `value` is [RB, T, last], the reference fits, at most one is given."""
    count = config.responses_per_pair
    check_tensor(name, value, (f"{count}B", "T", last))
    if not len(value) or len(value) % count:
        last_ones = ", then the B chosen ones after their weakened images" if config.reads_weakened else ""
        raise ValueError(
            f"{name}: found shape {list(value.shape)}, expected [{count}B, T, {last}]; give B chosen sequences, then "
            f"B rejected ones{last_ones}, B at least 1."
        )
    if not value.shape[2]:
        raise ValueError(f"{name}: found shape {list(value.shape)}, expected {last} of at least 1.")
    check_indices("labels", labels, value.shape[:2])
    check_same("labels", labels, name, value)
    _check_labelled(labels, config)
    if token_weights is not None:
        check_tensor("token_weights", token_weights, tuple(labels.shape))
        check_device("token_weights", token_weights, name, value)
        _check_weights(token_weights, labels)
    if reference is not None and ref_logps is not None:
        raise ValueError(f"{ref_name} and ref_logps: found both, expected one, or none for a reference-free loss.")
    if reference is not None:
        check_tensor(ref_name, reference, tuple(value.shape))
        check_same(ref_name, reference, name, value)
    if ref_logps is not None:
        check_tensor("ref_logps", ref_logps, (len(value),))
        check_device("ref_logps", ref_logps, name, value)


def _check_labelled(labels, config):
    """Raise where a sequence has no label that is predicted: its log-prob would be 0, and its pair's loss of nothing.

    And where a chosen response has other tokens after its weakened image. Looks at the data: not on a GPU, which would
    have to be waited for, nor where torch.compile traces.
    """
    if labels.is_cuda or torch.compiler.is_compiling():
        return
    empty = (labels[:, 1:] == IGNORE_INDEX).all(1).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"labels: found none but {IGNORE_INDEX} after position 0 in sequence {', '.join(map(str, empty[:8]))} of "
            f"{len(labels)}, expected a response token in each; drop these pairs."
        )
    if config.reads_weakened:
        chosen, _, weakened = (part[part != IGNORE_INDEX].tolist() for part in labels[:, 1:].chunk(3))
        if chosen != weakened:
            raise ValueError(
                "labels: found other tokens in the last third than in the first, expected the chosen responses again, "
                "after their weakened images."
            )


def _check_weights(token_weights, labels):
    """Raise for a weight that is no finite number of at least 0, where `_check_labelled` looks."""
    if labels.is_cuda or torch.compiler.is_compiling():
        return
    read = token_weights[:, 1:][labels[:, 1:] != IGNORE_INDEX]
    wrong = read[~((read >= 0) & read.isfinite())]
    if len(wrong):
        raise ValueError(
            f"token_weights: found {wrong[0].item()}, expected finite numbers of at least 0 where a label is "
            "predicted."
        )


def _shifted(labels):
    """The target of each position: the label of the next one, none for the last. Copies labels, never logits."""
    return F.pad(labels[:, 1:].to(torch.int64), (0, min(1, labels.shape[1])), value=IGNORE_INDEX)


def _padded_preference(found, ref_logps, targets, config, with_statistics, token_weights):
    """The loss of padded sequences, whose last position predicts nothing, from their `SequenceLogps`.

    `ref_logps` [RB] are the caller's own, or None, and so are the `token_weights` [RB, T] at the labels' positions.
    """
    if token_weights is not None:
        token_weights = F.pad(token_weights.detach()[:, 1:], (0, min(1, targets.shape[1])))
        # What stands where nothing is predicted, a NaN even, is not read.
        token_weights = torch.where(targets == IGNORE_INDEX, 0, token_weights).to(found.token_logps.dtype)

    def places():
        pairs = torch.arange(len(targets), device=targets.device) % (len(targets) // config.responses_per_pair)
        return (targets != IGNORE_INDEX).cumsum(1) - 1, pairs[:, None]

    output = token_preference(
        found.token_logps,
        Responses(lambda values: values.sum(1), places, found.num_tokens),
        config,
        ref_token_logps=found.ref_token_logps,
        logps=found.logps,
        ref_logps=ref_logps if found.ref_logps is None else found.ref_logps,
        statistics=found.statistics,
        token_weights=token_weights,
    )
    statistics = TokenStatistics(*(values[:, :-1] for values in found.statistics)) if with_statistics else None
    return replace(output, token_logps=output.token_logps[:, :-1], statistics=statistics)


def dpo_loss(
    policy_logits: Tensor,
    labels: Tensor,
    *,
    ref_logits: Tensor | None = None,
    ref_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
    beta: float = 0.1,
    loss_type: str | list[str] = "sigmoid",
    label_smoothing: float = 0.0,
    average_logps: bool = False,
    with_statistics: bool = False,
    inplace_backward: bool = False,
    **loss_options: Any,
) -> PreferenceOutput:
    """Preference loss of B pairs from the policy's logits.

    Args:
        policy_logits: [2B, T, V], the B chosen sequences first; float16, bfloat16, float32 or float64.
            Log-probs and loss are computed in float32 (float64 for float64). For a loss that reads the chosen
            responses after their weakened images, too ("mdpo"), those come last: [3B, T, V], and 3B everywhere below.
        labels: int64 or int32 [2B, T], the input tokens at their own positions, -100 = ignored. The shift by one
            happens inside and copies no logits.
        ref_logits: the reference's, like policy_logits; a constant. Read in the same launch on CUDA.
        ref_logps: [2B], the reference's sequence log-probs, summed over the response's tokens (with `ld_alpha` as the
            policy's are: the tail weighed by it; so with `token_weights`). Excludes ref_logits; neither means a
            reference-free loss.
        token_weights: floating point [2B, T], a factor for the log-prob of each label under policy and reference, at
            the label's own position (TPO, 2412.14487); constants, not read where the label is -100. The losses'
            numbers of tokens are not weighed by it, nor is "sft".
        logit_softcap: cap c of logits c * tanh(logits / c), or None. Logits of a model that caps its own (Gemma 2)
            need none.
        temperature: divides the logits, after the cap.
        beta, loss_type, label_smoothing, average_logps: as in `LossConfig`. Log-probs and rewards of the output stay
            sums.
        with_statistics: also give what TRL logs of the policy's tokens (`entropy`, `mean_token_accuracy`, ...), from
            the same pass.
        inplace_backward: let the backward pass write the gradient over policy_logits, which nothing else may then
            read; it saves their size in memory.
        loss_options: the further fields of `bpo_fast.LossConfig`.

    Returns:
        PreferenceOutput.

    Raises:
        TypeError, ValueError: arguments whose kind, shape, dtype, device or range does not fit, unknown options.

    Example:
        >>> logits = torch.zeros(2, 3, 5)
        >>> output = dpo_loss(logits, torch.tensor([[-100, 1, 2], [-100, 3, -100]]), ref_logits=logits)
        >>> output.loss, output.chosen_logps
        (tensor(0.6931), tensor([-3.2189]))
    """
    config = loss_config(
        beta=beta, loss_type=loss_type, label_smoothing=label_smoothing, average_logps=average_logps, **loss_options
    )
    _check_pairs(
        "policy_logits", policy_logits, "V", labels, "ref_logits", ref_logits, ref_logps, token_weights, config
    )
    check_transform(logit_softcap, temperature)
    targets = _shifted(labels)
    found = sequence_logps(
        policy_logits,
        ref_logits,
        targets,
        logit_softcap=logit_softcap,
        temperature=temperature,
        with_statistics=with_statistics or config.use_weighting,
        inplace_backward=inplace_backward,
    )
    return _padded_preference(found, ref_logps, targets, config, with_statistics, token_weights)


def linear_dpo_loss(
    policy_hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    ref_hidden: Tensor | None = None,
    ref_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    lm_head_bias: Tensor | None = None,
    lm_head_lora: tuple[Tensor, Tensor, float] | None = None,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
    beta: float = 0.1,
    loss_type: str | list[str] = "sigmoid",
    label_smoothing: float = 0.0,
    average_logps: bool = False,
    with_statistics: bool = False,
    **loss_options: Any,
) -> PreferenceOutput:
    """Preference loss of B pairs from the last hidden states: `dpo_loss` without logits (see `linear_token_logps`).

    Args:
        policy_hidden: [2B, T, H], the B chosen sequences first.
        lm_head_weight: [V, H]; lm_head_bias: [V] or None.
        lm_head_lora: an adapter on the head, (lora_A [r, H], lora_B [V, r], scaling) as PEFT holds them, or None. The
            reference goes without it.
        labels: as in `dpo_loss`; only positions that predict a response token meet the head.
        ref_hidden: the reference's, like policy_hidden, through the same head; a constant.
        The other arguments, the result and the errors are those of `dpo_loss`.

    Example:
        >>> hidden, head = torch.ones(2, 3, 4), torch.zeros(5, 4)
        >>> output = linear_dpo_loss(hidden, head, torch.tensor([[-100, 1, 2], [-100, 3, -100]]), ref_hidden=hidden)
        >>> output.loss, output.chosen_logps
        (tensor(0.6931), tensor([-3.2189]))
    """
    config = loss_config(
        beta=beta, loss_type=loss_type, label_smoothing=label_smoothing, average_logps=average_logps, **loss_options
    )
    _check_pairs(
        "policy_hidden", policy_hidden, "H", labels, "ref_hidden", ref_hidden, ref_logps, token_weights, config
    )
    check_head(
        "policy_hidden",
        policy_hidden,
        weight=("lm_head_weight", lm_head_weight),
        bias=("lm_head_bias", lm_head_bias),
        lora=("lm_head_lora", lm_head_lora),
    )
    check_transform(logit_softcap, temperature)
    targets = _shifted(labels)
    found = linear_sequence_logps(
        policy_hidden,
        ref_hidden,
        lm_head_weight,
        targets,
        bias=lm_head_bias,
        logit_softcap=logit_softcap,
        temperature=temperature,
        lora=lm_head_lora,
        with_statistics=with_statistics or config.use_weighting,
    )
    return _padded_preference(found, ref_logps, targets, config, with_statistics, token_weights)
