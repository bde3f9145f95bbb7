"""From sequence log-probs to a preference loss: its options, the weighted sum of its terms, and what is logged."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from bpo_fast.losses.table import (
    F_DIVERGENCE_LOSSES,
    F_DIVERGENCES,
    LOSSES,
    REFERENCE_FREE_LOSSES,
    SMOOTHED_LOSSES,
    SORTED_LOSSES,
    Pairs,
)
from bpo_fast.ops.checks import check_indices, check_same, check_tensor
from bpo_fast.ops.rows import runs_in_triton
from bpo_fast.ops.sigmoid_preference import sigmoid_preference

# What each number must be, and whether one is; None is allowed for ld_alpha alone.
_RANGES = {
    "beta": ("positive", lambda value: value > 0),
    "label_smoothing": ("in [0, 0.5)", lambda value: 0 <= value < 0.5),
    "ld_alpha": ("in [0, 1], or None to weigh all tokens alike", lambda value: 0 <= value <= 1),
    "f_alpha_divergence_coef": ("a finite number", lambda value: True),
    "discopop_tau": ("positive", lambda value: value > 0),
    "simpo_gamma": ("at least 0", lambda value: value >= 0),
}


@dataclass(frozen=True)
class LossConfig:
    """Which losses, with which weights and numbers. Names and defaults are those of TRL's DPOConfig.

    Args:
        loss_type: name of a loss, or several names; see `bpo_fast.losses.table` for formulas and sources.
            "simpo", "cpo" and "orpo" take no reference, and "sft" beside them makes their papers' whole objectives:
            `["cpo", "sft"]` with weights `[1, alpha]`, `["sft", "orpo"]`.
        beta: strength of the pull to the reference, positive.
        loss_weights: a weight for each name; None weighs all by 1.
        label_smoothing: probability that a preference is the wrong way round, in [0, 0.5). For sigmoid, sigmoid_norm,
            exo_pair (which needs it), robust, aot, aot_unpaired, simpo, cpo; the other losses beside one of those are
            not smoothed.
        average_logps: divide log-probs by the response's number of tokens before anything else. The losses that are
            averages by definition ("ipo", "sigmoid_norm", "simpo", "orpo") are not averaged twice.
        ld_alpha: weight, in [0, 1], of the tokens past the length of the shorter response of a pair (LD-DPO,
            2409.06411); None leaves all at 1. "sft" has every token at 1.
        f_divergence_type: "reverse_kl" (standard DPO), "forward_kl", "js_divergence" or "alpha_divergence" (f-DPO,
            2309.16240). An exponential that would overflow is held below the largest number of its dtype.
        f_alpha_divergence_coef: alpha of "alpha_divergence"; 0 is the forward KL, 1 the reverse KL.
        use_weighting: weigh each pair by exp of the mean over its responses' tokens of
            log p(token) - log sum_v p(v)^2 (WPO, 2406.11827, eq. 2), both responses' weights multiplied; a constant
            in the gradient.
        discopop_tau: temperature of "discopop", positive.
        simpo_gamma: margin of "simpo", at least 0.

    Raises:
        TypeError, ValueError: an option of the wrong kind, out of its range, or at odds with another.

    >>> LossConfig(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]).weights  # MPO
    (0.8, 0.2, 1.0)
    """

    loss_type: str | Sequence[str] = "sigmoid"
    beta: float = 0.1
    loss_weights: Sequence[float] | None = None
    label_smoothing: float = 0.0
    average_logps: bool = False
    ld_alpha: float | None = None
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    use_weighting: bool = False
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5

    @property
    def loss_types(self) -> tuple[str, ...]:
        """The names, also of a single one."""
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)

    @property
    def weights(self) -> tuple[float, ...]:
        """A weight for each of `loss_types`."""
        return (1.0,) * len(self.loss_types) if self.loss_weights is None else tuple(self.loss_weights)

    @property
    def needs_reference(self) -> bool:
        """Whether one of the losses reads the reference."""
        return not REFERENCE_FREE_LOSSES.issuperset(self.loss_types)

    @property
    def is_plain_sigmoid(self) -> bool:
        """Whether the loss is that of `ops.sigmoid_preference`."""
        plain = (("sigmoid",), (1.0,), "reverse_kl", False)
        return (self.loss_types, self.weights, self.f_divergence_type, self.use_weighting) == plain

    def __post_init__(self):
        if not isinstance(self.loss_type, str | list | tuple):
            raise TypeError(f"loss_type must be the name of a loss or a list of names, got {self.loss_type!r}.")
        if not isinstance(self.loss_weights, list | tuple | None):
            raise TypeError(f"loss_weights must be a list of numbers or None, got {self.loss_weights!r}.")
        types = self.loss_types
        if not types:
            raise ValueError("loss_type must name at least one loss, got an empty list.")
        for name in types:
            _check_choice("loss_type", name, LOSSES)
        _check_choice("f_divergence_type", self.f_divergence_type, F_DIVERGENCES)
        for name, (wanted, holds) in _RANGES.items():
            value = getattr(self, name)
            if not (value is None and name == "ld_alpha") and not (_is_finite(value) and holds(value)):
                raise ValueError(f"{name} must be {wanted}, got {value!r}.")
        if len(self.weights) != len(types) or not all(map(_is_finite, self.weights)):
            raise ValueError(
                f"loss_weights must hold a finite number for each of {', '.join(types)}, got {self.loss_weights!r}."
            )
        self._check_combinations(types)

    def _check_combinations(self, types):
        if self.label_smoothing and SMOOTHED_LOSSES.isdisjoint(types):
            raise ValueError(
                f"label_smoothing={self.label_smoothing} has no meaning for loss_type={self.loss_type!r}; set it to 0 "
                f"or use one of {_listed(SMOOTHED_LOSSES)}."
            )
        if "exo_pair" in types and not self.label_smoothing:
            raise ValueError("label_smoothing must be positive for 'exo_pair', got 0; its paper recommends 1e-3.")
        if self.f_divergence_type != "reverse_kl" and not F_DIVERGENCE_LOSSES.issuperset(types):
            raise ValueError(
                f"f_divergence_type={self.f_divergence_type!r} has no meaning for "
                f"{_listed(set(types) - F_DIVERGENCE_LOSSES)}; use 'reverse_kl', or only losses of "
                f"{_listed(F_DIVERGENCE_LOSSES)}."
            )
        if self.use_weighting and not (SORTED_LOSSES | {"sft"}).isdisjoint(types):
            raise ValueError(
                f"use_weighting weighs single pairs, which {_listed((SORTED_LOSSES | {'sft'}).intersection(types))} "
                "does not have: it joins the pairs of a batch; drop one of the two."
            )


LOSS_OPTIONS = tuple(field.name for field in fields(LossConfig))


def _is_finite(value):
    return isinstance(value, int | float) and -math.inf < value < math.inf


def _listed(names):
    return ", ".join(map(repr, sorted(names)))


def _check_choice(field, value, choices):
    if value not in list(choices):
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"{field} must be one of {', '.join(choices)}, got {value!r}{hint}")


def loss_config(**options) -> LossConfig:
    """A LossConfig of keyword arguments that a caller passed on.

    Raises:
        TypeError: an argument that is no option of a loss.

    >>> loss_config(ld_alhpa=0.5)
    Traceback (most recent call last):
    TypeError: 'ld_alhpa' is no option of a preference loss; did you mean 'ld_alpha'?
    """
    for name in options:
        if name not in LOSS_OPTIONS:
            near = difflib.get_close_matches(name, LOSS_OPTIONS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(LOSS_OPTIONS)}."
            raise TypeError(f"{name!r} is no option of a preference loss; {hint}")
    return LossConfig(**options)


@dataclass(frozen=True)
class PreferenceOutput:
    """What a preference loss gives back, for B pairs of at most T tokens.

    `loss` is the differentiable mean over the pairs. The rest is detached: `chosen_logps` and `rejected_logps` [B],
    summed over the response's tokens (with `ld_alpha`: their weighted sum), in nats; `chosen_rewards` and
    `rejected_rewards` [B], beta times the log-ratio to the reference (to 0 without one); `token_logps` [2B, T-1], of
    positions 1..T-1, 0 where ignored; `num_tokens` [2B], response tokens; `statistics`, if asked for, the policy's
    token statistics `entropy`, `is_top1`, `mean_logits`, ..., each [2B, T-1] and 0 where ignored, or [2B], summed over
    the response's tokens.
    """

    loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    token_logps: Tensor
    num_tokens: Tensor
    statistics: tuple | None = None

    def pair_metrics(self):
        """Each pair's value [B] of what TRL logs: `rewards/{chosen,rejected,accuracies,margins}`, `logps/...`."""
        return {
            "rewards/chosen": self.chosen_rewards,
            "rewards/rejected": self.rejected_rewards,
            "rewards/accuracies": (self.chosen_rewards > self.rejected_rewards).to(self.chosen_rewards.dtype),
            "rewards/margins": self.chosen_rewards - self.rejected_rewards,
            "logps/chosen": self.chosen_logps,
            "logps/rejected": self.rejected_logps,
        }

    def token_metrics(self):
        """What TRL logs as means over tokens, each as (sum, number of tokens), scalars; empty without statistics.

        `entropy` of all response tokens, in nats; `mean_token_accuracy`, the share of chosen tokens that are their
        position's most likely; `logits/chosen` and `logits/rejected`, the mean logit over vocabulary and tokens.
        """
        if self.statistics is None:
            return {}

        def sums(values):
            per_response = values.reshape(len(self.num_tokens), -1).sum(1)
            return per_response.to(self.chosen_logps.dtype).view(2, -1).sum(1)

        entropy, correct, logits = map(
            sums, (self.statistics.entropy, self.statistics.is_top1, self.statistics.mean_logits)
        )
        chosen, rejected = sums(self.num_tokens)
        return {
            "entropy": (entropy.sum(), chosen + rejected),
            "mean_token_accuracy": (correct[0], chosen),
            "logits/chosen": (logits[0], chosen),
            "logits/rejected": (logits[1], rejected),
        }

    def metrics(self):
        """The means of `pair_metrics` and `token_metrics` as floats. One transfer from the device."""
        values = {name: value.mean() for name, value in self.pair_metrics().items()}
        values |= {name: total / count.clamp(min=1) for name, (total, count) in self.token_metrics().items()}
        return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))


def _pair_losses(config, logps, ref_logps, num_tokens, nll):
    """The weighted sum [B] of the losses of `config`, from log-probs [2B]: `Pairs` says what the arguments are."""
    if config.average_logps and num_tokens is not None:
        lengths, num_tokens = num_tokens.clamp(min=1), None
        logps = logps / lengths
        ref_logps = None if ref_logps is None else ref_logps / lengths
    logratios = logps if ref_logps is None else logps - ref_logps
    scores = F_DIVERGENCES[config.f_divergence_type](logratios, config)
    pairs = Pairs(config, logps, ref_logps, logratios, scores, num_tokens, nll)
    total = None
    for loss_type, weight in zip(config.loss_types, config.weights, strict=True):
        values = LOSSES[loss_type](pairs)
        values = values if weight == 1 else weight * values
        total = values if total is None else total + values
    return total


def preference_loss(
    chosen_logps,
    rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    *,
    beta=0.1,
    loss_type="sigmoid",
    label_smoothing=0.0,
    chosen_num_tokens=None,
    rejected_num_tokens=None,
    **loss_options,
):
    """Loss of each pair from sequence log-probs.

    Args:
        chosen_logps, rejected_logps: [B], in nats, summed over the response's tokens. Without numbers of tokens the
            losses that need averages ("ipo", "sigmoid_norm", "simpo", "orpo") take them as averages already.
        ref_chosen_logps, ref_rejected_logps: [B] of the reference, in the same unit; both None: reference-free.
        beta, loss_type, label_smoothing: as in `LossConfig`.
        chosen_num_tokens, rejected_num_tokens: int64 or int32 [B], tokens of each response. "sft" and `average_logps`
            need them.
        loss_options: further fields of `LossConfig`, but for `ld_alpha` and `use_weighting`, which need the log-probs
            of single tokens.

    Returns:
        [B], differentiable in the first two arguments; their mean is the loss. With "sft" each pair has the batch's.

    Raises:
        TypeError, ValueError: tensors whose kind, shape or device does not fit, unknown losses and options, numbers
            out of range.

    >>> import torch
    >>> zero = torch.zeros(1)
    >>> preference_loss(zero, zero, zero, zero, beta=0.1)
    tensor([0.6931])
    """
    config = loss_config(beta=beta, loss_type=loss_type, label_smoothing=label_smoothing, **loss_options)
    for name in ("ld_alpha", "use_weighting"):
        if getattr(config, name) not in (None, False):
            raise ValueError(f"{name} needs the log-probs of single tokens; use dpo_loss or linear_dpo_loss.")
    check_tensor("chosen_logps", chosen_logps, ("B",))
    logps = _joined(check_tensor, chosen_logps, chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    ref_logps = _joined(
        check_tensor, chosen_logps, ref_chosen_logps=ref_chosen_logps, ref_rejected_logps=ref_rejected_logps
    )
    num_tokens = _joined(
        check_indices,
        chosen_logps,
        chosen_num_tokens=chosen_num_tokens,
        rejected_num_tokens=rejected_num_tokens,
    )
    if num_tokens is None and (config.average_logps or "sft" in config.loss_types):
        raise ValueError(
            "chosen_num_tokens and rejected_num_tokens must be given for 'sft' and average_logps, got None."
        )
    nll = mean_nll(logps, num_tokens) if "sft" in config.loss_types else None
    return _pair_losses(config, logps, ref_logps, num_tokens, nll)


def _joined(check, like, **halves):
    """Both halves [B] as one [2B], checked; None if both are None."""
    (chosen_name, chosen), (rejected_name, rejected) = halves.items()
    if (chosen is None) != (rejected is None):
        raise ValueError(f"{chosen_name} and {rejected_name} must be given together, or both left None.")
    if chosen is None:
        return None
    for name, value in halves.items():
        check(name, value, (len(like),))
        check_same(name, value, "chosen_logps", like)
    return torch.cat([chosen, rejected])


def mean_nll(logps, num_tokens):
    """Minus the mean log-prob over all chosen tokens: scalar, from sums [2B] and numbers of tokens [2B]."""
    pairs = len(logps) // 2
    return -logps[:pairs].sum() / num_tokens[:pairs].sum().clamp(min=1)


def desensitized(token_logps, offsets, pairs, num_tokens, ld_alpha):
    """Token log-probs of which those past the shorter response of their pair are multiplied by `ld_alpha` (LD-DPO).

    Args:
        token_logps: of any shape.
        offsets: each token's place in its response, from 0.
        pairs: int64, the pair, 0..B-1, that each token belongs to. Both broadcast to the shape of token_logps.
        num_tokens: [2B], tokens of each response, the chosen ones first.
        ld_alpha: weight of the tail.

    >>> import torch
    >>> offsets = torch.tensor([0, 1, 2, 0])  # a chosen response of three tokens, a rejected one of one
    >>> desensitized(torch.ones(4), offsets, torch.zeros(4, dtype=torch.int64), torch.tensor([3, 1]), 0.5)
    tensor([1.0000, 0.5000, 0.5000, 1.0000])
    """
    shorter = torch.minimum(*num_tokens.chunk(2))
    return torch.where(offsets < shorter[pairs], token_logps, ld_alpha * token_logps)


def mean_aligned_logps(token_logps, statistics, sums, num_tokens):
    """What `use_weighting` weighs by: the mean over a response's tokens of log p(token) - log sum_v p(v)^2 (WPO).

    A constant, [2B]. `token_logps` and `statistics` have one shape; `sums` adds up such values over each response.
    """
    return sums(token_logps.detach() - statistics.log_sum_sq_probs) / num_tokens.clamp(min=1)


def sequence_preference(
    logps,
    ref_logps,
    num_tokens,
    token_logps,
    config,
    *,
    nll=None,
    mean_aligned_logps=None,
    statistics=None,
):
    """The loss and what is logged with it, from sequence log-probs however they were computed.

    Args:
        logps: [2B], chosen first, then rejected; differentiable. All log-probs are sums over tokens, with `ld_alpha`
            of `desensitized` ones: averaging, where the loss or `average_logps` asks for it, happens here and touches
            the loss alone, so rewards keep one meaning (TRL's).
        ref_logps: [2B] of the reference, or None.
        num_tokens: [2B], response tokens.
        token_logps: goes into the output.
        config: LossConfig.
        nll: scalar, the loss "sft" where `mean_nll` of these sums is not it: with `ld_alpha`, or when these pairs are
            a part of a batch.
        mean_aligned_logps: [2B], for `use_weighting`; see the function of that name.
        statistics: goes into the output; see `PreferenceOutput`.

    Returns:
        PreferenceOutput.

    Raises:
        ValueError: what the config asks for is not given.
    """
    ref_logps = None if ref_logps is None else ref_logps.detach()
    if nll is None and "sft" in config.loss_types:
        if config.ld_alpha is not None:
            raise ValueError("nll must be given for 'sft' with ld_alpha, got None; take mean_nll of unweighted sums.")
        nll = mean_nll(logps, num_tokens)
    output = (token_logps.detach(), num_tokens, statistics)
    if config.is_plain_sigmoid and runs_in_triton(logps):
        averaged = num_tokens if config.average_logps else None
        loss, rewards = sigmoid_preference(logps, ref_logps, averaged, config.beta, config.label_smoothing)
        return PreferenceOutput(loss, *logps.detach().chunk(2), *rewards.chunk(2), *output)
    losses = _pair_losses(config, logps, ref_logps, num_tokens, nll)
    if config.use_weighting:
        if mean_aligned_logps is None:
            raise ValueError("mean_aligned_logps must be given for use_weighting, got None.")
        losses = losses * mean_aligned_logps.detach().view(2, -1).sum(0).exp()
    logratios = logps.detach() if ref_logps is None else logps.detach() - ref_logps
    return PreferenceOutput(
        losses.mean(),
        *logps.detach().chunk(2),
        *(config.beta * logratios).chunk(2),
        *output,
    )
