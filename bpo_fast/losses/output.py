"""What a preference loss gives back, and what is logged of it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bpo_fast.ops.rows import TokenStatistics


@dataclass(frozen=True)
class PreferenceOutput:
    """What a preference loss gives back, for B pairs of at most T tokens; all but `loss` is detached.

    Attributes:
        loss: scalar, differentiable, the mean over the pairs.
        chosen_logps, rejected_logps: [B], summed over the response's tokens (with `ld_alpha` or token weights: their
            weighted sum), in nats.
        chosen_rewards, rejected_rewards: [B], beta times the log-ratio to the reference (to 0 without one).
        token_logps: [2B, T-1], of positions 1..T-1, 0 where ignored; [3B, T-1] for a loss that reads the chosen
            responses after their weakened images, which come last.
        num_tokens: [2B] or [3B], response tokens.
        statistics: if asked for, `TokenStatistics` of the policy's tokens, each [2B, T-1] and 0 where ignored, or
            [2B], summed over the response's tokens.
        weakened_logps, weakened_rewards: [B] of the chosen responses after their weakened images, for a loss that
            reads them.
    """

    loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    token_logps: Tensor
    num_tokens: Tensor
    statistics: TokenStatistics | None = None
    weakened_logps: Tensor | None = None
    weakened_rewards: Tensor | None = None

    def pair_metrics(self) -> dict[str, Tensor]:
        """Each pair's value [B] of what TRL logs: `rewards/{chosen,rejected,accuracies,margins}`, `logps/...`.

        With `rewards/weakened` and `logps/weakened` where there are any.
        """
        weakened = {"rewards/weakened": self.weakened_rewards, "logps/weakened": self.weakened_logps}
        return {
            "rewards/chosen": self.chosen_rewards,
            "rewards/rejected": self.rejected_rewards,
            "rewards/accuracies": (self.chosen_rewards > self.rejected_rewards).to(self.chosen_rewards.dtype),
            "rewards/margins": self.chosen_rewards - self.rejected_rewards,
            "logps/chosen": self.chosen_logps,
            "logps/rejected": self.rejected_logps,
            **{name: values for name, values in weakened.items() if values is not None},
        }

    def token_metrics(self) -> dict[str, tuple[Tensor, Tensor]]:
        """What TRL logs as means over tokens, each as (sum, number of tokens), scalars; empty without statistics.

        `entropy` of all response tokens, in nats; `mean_token_accuracy`, the share of chosen tokens that are their
        position's most likely; `logits/chosen` and `logits/rejected`, the mean logit over vocabulary and tokens.
        """
        if self.statistics is None:
            return {}

        def sums(values):
            per_response = values.reshape(len(self.num_tokens), -1)[: 2 * len(self.chosen_logps)].sum(1)
            return per_response.to(self.chosen_logps.dtype).view(2, -1).sum(1)

        found = self.statistics
        entropy, correct, logits = map(sums, (found.entropy, found.is_top1, found.mean_logits))
        chosen, rejected = sums(self.num_tokens)
        return {
            "entropy": (entropy.sum(), chosen + rejected),
            "mean_token_accuracy": (correct[0], chosen),
            "logits/chosen": (logits[0], chosen),
            "logits/rejected": (logits[1], rejected),
        }

    def metrics(self) -> dict[str, float]:
        """The means of `pair_metrics` and `token_metrics` as floats. One transfer from the device."""
        values = {name: value.mean() for name, value in self.pair_metrics().items()}
        values |= {name: total / count.clamp(min=1) for name, (total, count) in self.token_metrics().items()}
        return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))
