"""Preference losses over sequence log-probs, from logits (`dpo_loss`) or from hidden states (`linear_dpo_loss`).

With the log-ratios r_w = log pi(y_w) - log ref(y_w) of the chosen and r_l of the rejected response, and d = r_w - r_l:

    sigmoid  -(1 - s) log sigmoid(beta d) - s log sigmoid(-beta d)   DPO (2305.18290, eq. 7); s: label smoothing, cDPO
    hinge    max(0, 1 - beta d)                                      SLiC (2305.10425)
    ipo      (d' - 1 / (2 beta))^2                                   IPO (2310.12036, eq. 17)

d' is d of log-ratios divided by their response's number of tokens, as IPO's authors advise and TRL does.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bpo_fast.ops.checks import IGNORE_INDEX, check_indices, check_same, check_tensor
from bpo_fast.ops.linear_token_logps import check_head, flat_linear_token_logps
from bpo_fast.ops.token_logps import sequence_logps


def _sigmoid(chosen_logratios, rejected_logratios, beta, label_smoothing):
    margins = beta * (chosen_logratios - rejected_logratios)
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


def _hinge(chosen_logratios, rejected_logratios, beta, label_smoothing):
    return torch.relu(1 - beta * (chosen_logratios - rejected_logratios))


def _ipo(chosen_logratios, rejected_logratios, beta, label_smoothing):
    return (chosen_logratios - rejected_logratios - 1 / (2 * beta)) ** 2


LOSS_TYPES = {"sigmoid": _sigmoid, "hinge": _hinge, "ipo": _ipo}
# Losses of log-ratios per token, whatever `average_logps` says.
AVERAGED_LOSS_TYPES = frozenset({"ipo"})
SMOOTHED_LOSS_TYPES = frozenset({"sigmoid"})


@dataclass(frozen=True)
class PreferenceOutput:
    """What a preference loss gives back, for B pairs of at most T tokens.

    `loss` is the differentiable mean over the pairs. The rest is detached: `chosen_logps` and `rejected_logps` [B],
    summed over the response's tokens, in nats; `chosen_rewards` and `rejected_rewards` [B], beta times the log-ratio
    to the reference (to 0 without one); `token_logps` [2B, T-1], of positions 1..T-1, 0 where ignored.
    """

    loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    token_logps: Tensor

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

    def metrics(self):
        """The means of `pair_metrics` as floats. One transfer from the device."""
        values = self.pair_metrics()
        return dict(zip(values, torch.stack([value.mean() for value in values.values()]).tolist(), strict=True))


def check_loss_arguments(beta, loss_type, label_smoothing):
    """Raise ValueError for a loss that does not exist or a number out of its range."""
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {loss_type!r}.")
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}.")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}.")
    if label_smoothing and loss_type not in SMOOTHED_LOSS_TYPES:
        raise ValueError(
            f"label_smoothing={label_smoothing} has no meaning for loss_type={loss_type!r}; set it to 0 or use "
            "loss_type='sigmoid'."
        )


def preference_loss(
    chosen_logps,
    rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    *,
    beta=0.1,
    loss_type="sigmoid",
    label_smoothing=0.0,
):
    """Loss of each pair from sequence log-probs.

    Args:
        chosen_logps, rejected_logps: [B], in nats. For "ipo" give log-probs divided by the number of tokens, as
            `dpo_loss` does; for the others sums (or averages, for the length-normalised form of the loss).
        ref_chosen_logps, ref_rejected_logps: [B] of the reference, in the same unit; both None: reference-free.
        beta: strength of the pull to the reference, positive.
        loss_type: "sigmoid", "hinge" or "ipo".
        label_smoothing: probability that a pair's labels are swapped, in [0, 0.5); for "sigmoid" only.

    Returns:
        [B], differentiable in the first two arguments.

    Raises:
        TypeError, ValueError: tensors whose kind, shape or device does not fit, unknown losses, numbers out of range.

    >>> import torch
    >>> zero = torch.zeros(1)
    >>> preference_loss(zero, zero, zero, zero, beta=0.1)
    tensor([0.6931])
    """
    check_loss_arguments(beta, loss_type, label_smoothing)
    check_tensor("chosen_logps", chosen_logps, ("B",))
    others = {"rejected_logps": rejected_logps}
    if (ref_chosen_logps is None) != (ref_rejected_logps is None):
        raise ValueError("ref_chosen_logps and ref_rejected_logps must be given together, or both left None.")
    if ref_chosen_logps is not None:
        others |= {"ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps}
    for name, value in others.items():
        check_tensor(name, value, (len(chosen_logps),))
        check_same(name, value, "chosen_logps", chosen_logps)
    if ref_chosen_logps is not None:
        chosen_logps, rejected_logps = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    return LOSS_TYPES[loss_type](chosen_logps, rejected_logps, beta, label_smoothing)


def sequence_preference(
    logps, ref_logps, num_tokens, token_logps, *, beta, loss_type="sigmoid", label_smoothing=0.0, average_logps=False
):
    """The loss and what is logged with it, from sequence log-probs however they were computed.

    `logps` [2B] (chosen first, then rejected) is differentiable; `ref_logps` [2B] or None; `num_tokens` [2B] counts
    the response tokens of each; `token_logps` goes into the output. All log-probs are sums: averaging, where the loss
    or `average_logps` asks for it, happens here and touches the loss alone, so rewards keep one meaning (TRL's).
    """
    logratios = logps if ref_logps is None else logps - ref_logps.detach()
    scores = logratios
    if average_logps or loss_type in AVERAGED_LOSS_TYPES:
        scores = logratios / num_tokens.clamp(min=1)
    chosen, rejected = scores.chunk(2)
    loss = preference_loss(
        chosen, rejected, None, None, beta=beta, loss_type=loss_type, label_smoothing=label_smoothing
    ).mean()
    rewards = beta * logratios.detach()
    return PreferenceOutput(loss, *logps.detach().chunk(2), *rewards.chunk(2), token_logps.detach())


def _check_pairs(name, value, last, labels, ref_name, reference, ref_logps):
    """The checks that both DPO losses share: `value` is [2B, T, last], the reference fits, at most one is given."""
    check_tensor(name, value, ("2B", "T", last))
    if not len(value) or len(value) % 2:
        raise ValueError(
            f"{name} must hold B chosen rows, then B rejected rows, B at least 1; got {len(value)} rows in "
            f"{list(value.shape)}."
        )
    if not value.shape[2]:
        raise ValueError(f"{name} must have {last} of at least 1, got {list(value.shape)}.")
    check_indices("labels", labels, value.shape[:2])
    check_same("labels", labels, name, value)
    if reference is not None and ref_logps is not None:
        raise ValueError(f"{ref_name} and ref_logps exclude each other: give one, or none for a reference-free loss.")
    if reference is not None:
        check_tensor(ref_name, reference, tuple(value.shape))
        check_same(ref_name, reference, name, value)
    if ref_logps is not None:
        check_tensor("ref_logps", ref_logps, (len(value),))
        if ref_logps.device != value.device:
            raise ValueError(f"ref_logps is on {ref_logps.device} but {name} is on {value.device}; move one of them.")


def _shifted(labels):
    """The target of each position: the label of the next one, none for the last. Copies labels, never logits."""
    return F.pad(labels[:, 1:].to(torch.int64), (0, min(1, labels.shape[1])), value=IGNORE_INDEX)


def dpo_loss(
    policy_logits,
    labels,
    *,
    ref_logits=None,
    ref_logps=None,
    beta=0.1,
    loss_type="sigmoid",
    label_smoothing=0.0,
    average_logps=False,
):
    """Preference loss of B pairs from the policy's logits.

    Args:
        policy_logits: [2B, T, V], rows 0..B-1 chosen, B..2B-1 rejected; float16, bfloat16, float32 or float64.
            Log-probs and loss are computed in float32 (float64 for float64).
        labels: int64 or int32 [2B, T], the input tokens at their own positions, -100 = ignored. The shift by one
            happens inside and copies no logits.
        ref_logits: the reference's, like policy_logits; a constant. Read in the same launch on CUDA.
        ref_logps: [2B], the reference's sequence log-probs, summed over the response's tokens. Excludes ref_logits;
            neither means a reference-free loss.
        beta, loss_type, label_smoothing: as in `preference_loss`.
        average_logps: divide log-ratios by the number of response tokens in the loss ("ipo" always does). Log-probs
            and rewards of the output stay sums.

    Returns:
        PreferenceOutput.

    Raises:
        TypeError, ValueError: arguments whose kind, shape, dtype, device or range does not fit.

    >>> import torch
    >>> logits = torch.zeros(2, 3, 5)
    >>> output = dpo_loss(logits, torch.tensor([[-100, 1, 2], [-100, 3, -100]]), ref_logits=logits)
    >>> output.loss, output.chosen_logps
    (tensor(0.6931), tensor([-3.2189]))
    """
    check_loss_arguments(beta, loss_type, label_smoothing)
    _check_pairs("policy_logits", policy_logits, "V", labels, "ref_logits", ref_logits, ref_logps)
    targets = _shifted(labels)
    token_logps, sums = sequence_logps(policy_logits, ref_logits, targets)
    return sequence_preference(
        sums[0],
        ref_logps if ref_logits is None else sums[1],
        (targets != IGNORE_INDEX).sum(1),
        token_logps[0, :, :-1],
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        average_logps=average_logps,
    )


def linear_dpo_loss(
    policy_hidden,
    lm_head_weight,
    labels,
    *,
    ref_hidden=None,
    ref_logps=None,
    lm_head_bias=None,
    logit_softcap=None,
    beta=0.1,
    loss_type="sigmoid",
    label_smoothing=0.0,
    average_logps=False,
):
    """Preference loss of B pairs from the last hidden states: `dpo_loss` without logits (see `linear_token_logps`).

    Args:
        policy_hidden: [2B, T, H], rows 0..B-1 chosen, B..2B-1 rejected.
        lm_head_weight: [V, H]; lm_head_bias: [V] or None; logit_softcap: cap of the logits or None.
        labels: as in `dpo_loss`; only positions that predict a response token meet the head.
        ref_hidden: the reference's, like policy_hidden, through the same head; a constant.
        The other arguments, the result and the errors are those of `dpo_loss`.

    >>> import torch
    >>> hidden, head = torch.ones(2, 3, 4), torch.zeros(5, 4)
    >>> output = linear_dpo_loss(hidden, head, torch.tensor([[-100, 1, 2], [-100, 3, -100]]), ref_hidden=hidden)
    >>> output.loss, output.chosen_logps
    (tensor(0.6931), tensor([-3.2189]))
    """
    check_loss_arguments(beta, loss_type, label_smoothing)
    _check_pairs("policy_hidden", policy_hidden, "H", labels, "ref_hidden", ref_hidden, ref_logps)
    check_head(
        "policy_hidden", policy_hidden, "lm_head_weight", lm_head_weight, "lm_head_bias", lm_head_bias, logit_softcap
    )
    targets = _shifted(labels)
    token_logps = flat_linear_token_logps(policy_hidden, lm_head_weight, targets, lm_head_bias, logit_softcap)
    if ref_hidden is not None:
        with torch.no_grad():
            ref_logps = flat_linear_token_logps(ref_hidden, lm_head_weight, targets, lm_head_bias, logit_softcap).sum(
                1
            )
    return sequence_preference(
        token_logps.sum(1),
        ref_logps,
        (targets != IGNORE_INDEX).sum(1),
        token_logps[:, :-1],
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        average_logps=average_logps,
    )
