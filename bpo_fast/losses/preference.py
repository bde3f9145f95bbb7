"""From log-probs of tokens or sequences to a preference loss: sums, LD-DPO, NLL and weights, in one order for all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bpo_fast.losses.config import LossConfig, loss_config
from bpo_fast.losses.output import PreferenceOutput
from bpo_fast.losses.table import F_DIVERGENCES, LOSSES, Pairs
from bpo_fast.ops.checks import check_indices, check_same, check_tensor
from bpo_fast.ops.rows import TokenStatistics, runs_in_triton
from bpo_fast.ops.sigmoid_preference import sigmoid_preference


@dataclass(frozen=True)
class Responses:
    """How token values, of whatever shape, belong to the responses of B pairs: `LossConfig.responses_per_pair` each.

    The chosen responses come first, then the rejected ones; where a loss reads the chosen ones after their weakened
    images, too, those come last: [2B] or [3B], [RB] for short.

    Attributes:
        sums: token values -> [RB], their sum over each response.
        places: -> (each token's offset in its response, from 0; its pair, int64 0..B-1), both broadcasting to the
            shape of the token values. Called for LD-DPO only.
        num_tokens: [RB], tokens of each response.
    """

    sums: Callable[[Tensor], Tensor]
    places: Callable[[], tuple[Tensor, Tensor]]
    num_tokens: Tensor


@dataclass(frozen=True)
class Batch:
    """The batch that some pairs are a part of: its number of pairs, and of tokens in its chosen responses."""

    num_pairs: int
    num_chosen_tokens: int


def _pair_losses(config, logps, ref_logps, num_tokens, nll):
    """The weighted sum [B] of the losses of `config`, from log-probs [RB]: `Pairs` says what the arguments are."""
    if config.average_logps and num_tokens is not None:
        lengths, num_tokens = num_tokens.clamp(min=1), None
        logps = logps / lengths
        ref_logps = None if ref_logps is None else ref_logps / lengths
    logratios, weakened = logps if ref_logps is None else logps - ref_logps, None
    if config.reads_weakened:
        both = 2 * (len(logps) // 3)
        logratios, weakened = logratios[:both], logratios[both:]
        logps, ref_logps, num_tokens = (None if x is None else x[:both] for x in (logps, ref_logps, num_tokens))
    scores = F_DIVERGENCES[config.f_divergence_type](logratios, config)
    pairs = Pairs(config, logps, ref_logps, logratios, scores, num_tokens, weakened, nll)
    total = None
    for loss_type, weight in zip(config.loss_types, config.weights, strict=True):
        values = LOSSES[loss_type].values(pairs)
        values = values if weight == 1 else weight * values
        total = values if total is None else total + values
    return total


def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
    *,
    beta: float = 0.1,
    loss_type: str | list[str] = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_num_tokens: Tensor | None = None,
    rejected_num_tokens: Tensor | None = None,
    weakened_logps: Tensor | None = None,
    ref_weakened_logps: Tensor | None = None,
    **loss_options: Any,
) -> Tensor:
    """Loss of each pair from sequence log-probs.

    Args:
        chosen_logps, rejected_logps: [B], in nats, summed over the response's tokens. Without numbers of tokens the
            losses that need averages ("ipo", "sigmoid_norm", "simpo", "orpo") take them as averages already.
        ref_chosen_logps, ref_rejected_logps: [B] of the reference, in the same unit; both None: reference-free.
        beta, loss_type, label_smoothing: as in `LossConfig`.
        chosen_num_tokens, rejected_num_tokens: int64 or int32 [B], tokens of each response. "sft" and `average_logps`
            need them.
        weakened_logps, ref_weakened_logps: [B], log-probs of the chosen responses where the prompt shows the weakened
            image; for "mdpo", and for no other loss.
        loss_options: further fields of `LossConfig`, but for `ld_alpha` and `use_weighting`, which need the log-probs
            of single tokens.

    Returns:
        [B], differentiable in the policy's log-probs; their mean is the loss. With "sft" each pair has the batch's.

    Raises:
        TypeError, ValueError: tensors whose kind, shape or device does not fit, unknown losses and options, numbers
            out of range.

    Example:
        >>> zero = torch.zeros(1)
        >>> preference_loss(zero, zero, zero, zero, beta=0.1)
        tensor([0.6931])
    """
    config = loss_config(beta=beta, loss_type=loss_type, label_smoothing=label_smoothing, **loss_options)
    for name in ("ld_alpha", "use_weighting"):
        if (value := getattr(config, name)) not in (None, False):
            raise ValueError(
                f"{name}: found {value} without log-probs of single tokens, expected them; use dpo_loss or "
                "linear_dpo_loss."
            )
    check_tensor("chosen_logps", chosen_logps, ("B",))
    policy = {"chosen_logps": chosen_logps, "rejected_logps": rejected_logps}
    reference = {"ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps}
    counts = {"chosen_num_tokens": chosen_num_tokens, "rejected_num_tokens": rejected_num_tokens}
    if config.reads_weakened:
        policy["weakened_logps"], reference["ref_weakened_logps"] = weakened_logps, ref_weakened_logps
    elif weakened_logps is not None or ref_weakened_logps is not None:
        raise ValueError(
            f"weakened_logps: found log-probs with loss_type={loss_type!r}, expected None, since it does not read "
            "them; leave them out or use 'mdpo'."
        )
    logps = _joined(check_tensor, chosen_logps, **policy)
    ref_logps = _joined(check_tensor, chosen_logps, **reference)
    num_tokens = _joined(check_indices, chosen_logps, **counts)
    if num_tokens is not None and config.reads_weakened:
        num_tokens = torch.cat([num_tokens, chosen_num_tokens])
    if num_tokens is None and (config.average_logps or "sft" in config.loss_types):
        raise ValueError("chosen_num_tokens and rejected_num_tokens: found None, expected both for 'sft' and means.")
    return _pair_losses(config, logps, ref_logps, num_tokens, _mean_nll(config, logps, num_tokens))


def _joined(check, like, **parts):
    """All parts [B] as one [RB], checked; None if all are None."""
    given = [name for name, value in parts.items() if value is not None]
    if not given:
        return None
    if len(given) < len(parts):
        found, wanted = ("one of them", "both or neither") if len(parts) == 2 else (", ".join(given), "all or none")
        raise ValueError(f"{' and '.join(parts)}: found {found}, expected {wanted}.")
    for name, value in parts.items():
        check(name, value, (len(like),))
        check_same(name, value, "chosen_logps", like)
    return torch.cat(list(parts.values()))


def _mean_nll(config, logps, num_tokens):
    """The loss "sft" where `config` has it: minus the mean log-prob over all chosen tokens, from sums [RB]."""
    if "sft" not in config.loss_types:
        return None
    pairs = len(logps) // config.responses_per_pair
    return -logps[:pairs].sum() / num_tokens[:pairs].sum().clamp(min=1)


def desensitized(token_logps: Tensor, offsets: Tensor, pairs: Tensor, num_tokens: Tensor, ld_alpha: float) -> Tensor:
    """Token log-probs of which those past the shorter response of their pair are multiplied by `ld_alpha` (LD-DPO).

    Args:
        token_logps: of any shape.
        offsets: each token's place in its response, from 0.
        pairs: int64, the pair, 0..B-1, that each token belongs to. Both broadcast to the shape of token_logps.
        num_tokens: [2B], tokens of each response, the chosen ones first.
        ld_alpha: weight of the tail.

    Example:
        >>> offsets = torch.tensor([0, 1, 2, 0])  # a chosen response of three tokens, a rejected one of one
        >>> desensitized(torch.ones(4), offsets, torch.zeros(4, dtype=torch.int64), torch.tensor([3, 1]), 0.5)
        tensor([1.0000, 0.5000, 0.5000, 1.0000])
    """
    shorter = torch.minimum(*num_tokens.chunk(2))
    return torch.where(offsets < shorter[pairs], token_logps, ld_alpha * token_logps)


def sequence_preference(
    logps: Tensor,
    ref_logps: Tensor | None,
    num_tokens: Tensor,
    config: LossConfig,
    *,
    nll: Tensor | None = None,
    pair_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean loss of B pairs and the rewards [RB], from sequence log-probs however they were computed.

    Args:
        logps: [RB], sums over tokens, in the order of `Responses`; differentiable. Averaging, where the loss or
            `average_logps` asks for it, touches the loss alone, so rewards keep one meaning (TRL's).
        ref_logps: [RB] of the reference, or None.
        num_tokens: [RB], response tokens.
        config: the options.
        nll: scalar, the loss "sft"; needed where `config` has it.
        pair_weights: [B], factors of the pairs' losses.
    """
    ref_logps = None if ref_logps is None else ref_logps.detach()
    if config.is_plain_sigmoid and pair_weights is None and runs_in_triton(logps):
        averaged = num_tokens if config.average_logps else None
        return sigmoid_preference(logps, ref_logps, averaged, config.beta, config.label_smoothing)
    losses = _pair_losses(config, logps, ref_logps, num_tokens, nll)
    if pair_weights is not None:
        losses = losses * pair_weights
    logratios = logps.detach() if ref_logps is None else logps.detach() - ref_logps
    return losses.mean(), config.beta * logratios


def token_preference(
    token_logps: Tensor,
    responses: Responses,
    config: LossConfig,
    *,
    ref_token_logps: Tensor | None = None,
    logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    statistics: TokenStatistics | None = None,
    token_weights: Tensor | None = None,
    batch: Batch | None = None,
) -> PreferenceOutput:
    """The loss of B pairs, and what is logged with it, from log-probs of tokens: padded, packed or otherwise laid out.

    Args:
        token_logps: the policy's, of any shape, 0 where ignored; differentiable.
        responses: what makes responses of values of that shape.
        config: the options.
        ref_token_logps: the reference's, of the same shape, or None.
        logps: [RB], the sums of token_logps where a kernel has made them already.
        ref_logps: the same of ref_token_logps; without them the reference's log-probs from elsewhere, with `ld_alpha`
            or token weights weighed by them already. Neither: reference-free.
        statistics: of the policy's tokens; goes into the output, and `use_weighting` needs it.
        token_weights: of the same shape, factors of both models' token log-probs in the sums that preferences are made
            of; "sft" and the weights of `use_weighting` are of the log-probs as they are.
        batch: what these pairs are a part of; the loss is then their share of the batch's mean.

    Returns:
        PreferenceOutput, `token_logps` and `statistics` in the shape they came in.
    """
    num_tokens = responses.num_tokens
    pairs = len(num_tokens) // config.responses_per_pair
    logps = responses.sums(token_logps) if logps is None else logps
    share, nll = 1.0, _mean_nll(config, logps, num_tokens)
    if batch is not None:
        share = pairs / batch.num_pairs
        if nll is not None:
            nll = -logps[:pairs].sum() / batch.num_chosen_tokens / share
    if ref_token_logps is not None and ref_logps is None:
        ref_logps = responses.sums(ref_token_logps)
    if config.ld_alpha is not None or token_weights is not None:

        def sums(values):
            if config.ld_alpha is not None:
                values = desensitized(values, *responses.places(), num_tokens[: 2 * pairs], config.ld_alpha)
            return responses.sums(values if token_weights is None else values * token_weights)

        logps = sums(token_logps)
        ref_logps = ref_logps if ref_token_logps is None else sums(ref_token_logps)
    pair_weights = None
    if config.use_weighting:
        if statistics is None:
            raise ValueError("statistics: found None, expected those of the policy's tokens for use_weighting.")
        # WPO: the mean over each response's tokens, a constant; both responses' weights multiplied.
        aligned = responses.sums(token_logps.detach() - statistics.log_sum_sq_probs) / num_tokens.clamp(min=1)
        pair_weights = aligned[: 2 * pairs].view(2, -1).sum(0).exp()
    loss, rewards = sequence_preference(logps, ref_logps, num_tokens, config, nll=nll, pair_weights=pair_weights)
    chosen_logps, rejected_logps, *weakened_logps = logps.detach().split(pairs)
    chosen_rewards, rejected_rewards, *weakened_rewards = rewards.split(pairs)
    return PreferenceOutput(
        loss if batch is None else loss * share,
        chosen_logps,
        rejected_logps,
        chosen_rewards,
        rejected_rewards,
        token_logps.detach(),
        num_tokens,
        statistics,
        *weakened_logps,
        *weakened_rewards,
    )
