"""The table of preference losses: small functions over sequence log-probs that give one value a pair.

Notation of the formulas: w is the chosen and l the rejected response; n its number of tokens; p = log pi(y | x) under
the policy, summed over tokens; r = p - log ref(y | x), the log-ratio to the reference; s = f'(exp r), the score that
the f-divergence makes of it (s = r for the reverse KL of standard DPO); r_v the log-ratio of the chosen response
where the prompt shows the weakened image; b = beta; e = label_smoothing; sigma the logistic function; L(x) =
-(1 - e) log sigma(x) - e log sigma(-x). With token weights or `ld_alpha`, p and log ref are weighted sums over the
tokens; "sft" and n know no weights. Papers are named by their arXiv number. The forms are those of TRL 1.16; where one
differs, its entry says so. `python -m bpo_fast.losses.table` prints docs/losses.md.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """What a loss may read of B pairs. Tensors are [2B], the chosen responses first.

    Attributes:
        config: the `LossConfig`, for numbers such as beta. (Not imported: it checks itself against this table.)
        logps: p, in nats.
        ref_logps: the reference's, or None for a reference of 0.
        logratios: r.
        scores: s.
        num_tokens: n, or None where the log-probs are averages over tokens already.
        weakened_logratios: [B], r_v; None unless a loss that reads it is asked for.
        nll: scalar, minus the mean log-prob of all chosen tokens; None unless "sft" is asked for.
    """

    config: Any
    logps: Tensor
    ref_logps: Tensor | None
    logratios: Tensor
    scores: Tensor
    num_tokens: Tensor | None
    weakened_logratios: Tensor | None
    nll: Tensor | None

    def average(self, values: Tensor) -> Tensor:
        """`values` [2B] over their number of tokens."""
        return values if self.num_tokens is None else values / self.num_tokens.clamp(min=1)


@dataclass(frozen=True)
class Loss:
    """One entry of the table.

    Attributes:
        values: the formula, B pairs -> [B]; its docstring writes it down.
        paper: where it comes from: name, arXiv number, equation.
        trl: how it differs from TRL 1.16's of the same name; empty where it does not.
        reference_free: it does not read the reference.
        smoothed: it reads `label_smoothing`.
        sorts_batch: it sorts the pairs of a batch, so that a pair's value depends on the others.
        of_score_differences: it has a form for every f-divergence: f-DPO's partition function cancels only in the
            difference of the scores. True of "sft" too, which reads no scores.
        reads_weakened: it reads the chosen response after the weakened image, so that a pair has three responses: in
            a packed sequence, a second prefix with one branch.
    """

    values: Callable[[Pairs], Tensor]
    paper: str
    trl: str = ""
    reference_free: bool = False
    smoothed: bool = False
    sorts_batch: bool = False
    of_score_differences: bool = False
    reads_weakened: bool = False


LOSSES: dict[str, Loss] = {}


def loss(paper: str, **marks: str | bool) -> Callable:
    """Decorator that enters a function into `LOSSES` under its own name; `marks` are the fields of `Loss`."""

    def enter(function):
        LOSSES[function.__name__] = Loss(function, paper, **marks)
        return function

    return enter


def losses_that(mark: str) -> frozenset[str]:
    """Names of the losses with a mark.

    Example:
        >>> sorted(losses_that("sorts_batch"))
        ['aot', 'aot_unpaired']
    """
    return frozenset(name for name, entry in LOSSES.items() if getattr(entry, mark))


def _difference(values):
    """Chosen minus rejected, [2B] -> [B]."""
    chosen, rejected = values.chunk(2)
    return chosen - rejected


def _logistic(margins, label_smoothing):
    """L(margins)."""
    if not label_smoothing:
        return -F.logsigmoid(margins)
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


@loss(
    "DPO, 2305.18290, eq. 7",
    smoothed=True,
    of_score_differences=True,
    trl="With label_smoothing conservative DPO (cDPO); TRL does not smooth it.",
)
def sigmoid(pairs: Pairs) -> Tensor:
    """L(b (s_w - s_l))."""
    return _logistic(pairs.config.beta * _difference(pairs.scores), pairs.config.label_smoothing)


@loss("SLiC, 2305.10425; with a reference RSO, 2309.06657", of_score_differences=True)
def hinge(pairs: Pairs) -> Tensor:
    """max(0, 1 - b (s_w - s_l))."""
    return torch.relu(1 - pairs.config.beta * _difference(pairs.scores))


@loss("IPO, 2310.12036, eq. 17, per token as its authors advise", of_score_differences=True)
def ipo(pairs: Pairs) -> Tensor:
    """(s_w / n_w - s_l / n_l - 1 / (2 b))^2."""
    return (_difference(pairs.average(pairs.scores)) - 1 / (2 * pairs.config.beta)) ** 2


@loss("EXO, 2402.00856, eq. 16", smoothed=True, of_score_differences=True)
def exo_pair(pairs: Pairs) -> Tensor:
    """KL((q, 1 - q) || (1 - e, e)) with q = sigma(b (s_w - s_l))."""
    margins = pairs.config.beta * _difference(pairs.scores)
    log_chosen, log_rejected = F.logsigmoid(margins), F.logsigmoid(-margins)
    smoothing = pairs.config.label_smoothing
    return torch.sigmoid(margins) * (log_chosen - math.log1p(-smoothing)) + torch.sigmoid(-margins) * (
        log_rejected - math.log(smoothing)
    )


@loss("NCA for two responses, 2402.05369")
def nca_pair(pairs: Pairs) -> Tensor:
    """-log sigma(b r_w) - (log sigma(-b r_w) + log sigma(-b r_l)) / 2."""
    chosen, rejected = (pairs.config.beta * pairs.logratios).chunk(2)
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


@loss("robust DPO, 2403.00409", smoothed=True, of_score_differences=True)
def robust(pairs: Pairs) -> Tensor:
    """((1 - e) l(m) - e l(-m)) / (1 - 2 e), l = -log sigma, m = b (s_w - s_l)."""
    margins = pairs.config.beta * _difference(pairs.scores)
    smoothing = pairs.config.label_smoothing
    return (smoothing * F.logsigmoid(-margins) - (1 - smoothing) * F.logsigmoid(margins)) / (1 - 2 * smoothing)


@loss("BCO, 2404.04656, without its moving shift of the rewards")
def bco_pair(pairs: Pairs) -> Tensor:
    """-log sigma(b r_w) - log sigma(-b r_l)."""
    chosen, rejected = (pairs.config.beta * pairs.logratios).chunk(2)
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


@loss("SPPO, 2405.00675, eq. 4.7 with win probabilities of 1 and 0")
def sppo_hard(pairs: Pairs) -> Tensor:
    """(r_w - 1 / (2 b))^2 + (r_l + 1 / (2 b))^2."""
    chosen, rejected = pairs.logratios.chunk(2)
    target = 0.5 / pairs.config.beta
    return (chosen - target) ** 2 + (rejected + target) ** 2


@loss("AOT, paired, 2406.05882", smoothed=True, sorts_batch=True)
def aot(pairs: Pairs) -> Tensor:
    """L(b (sort(p_w - p_l) - sort(ref_w - ref_l))), sorted over the batch."""
    delta = _difference(pairs.logps).sort().values
    if pairs.ref_logps is not None:
        delta = delta - _difference(pairs.ref_logps).sort().values
    return _logistic(pairs.config.beta * delta, pairs.config.label_smoothing)


@loss("AOT, unpaired, 2406.05882", smoothed=True, sorts_batch=True)
def aot_unpaired(pairs: Pairs) -> Tensor:
    """L(b (sort(r_w) - sort(r_l))), sorted over the batch."""
    chosen, rejected = pairs.logratios.chunk(2)
    delta = chosen.sort().values - rejected.sort().values
    return _logistic(pairs.config.beta * delta, pairs.config.label_smoothing)


@loss("APO, 2408.06266, eq. 7")
def apo_zero(pairs: Pairs) -> Tensor:
    """1 - sigma(b r_w) + sigma(b r_l), for chosen responses better than the model's own."""
    chosen, rejected = (pairs.config.beta * pairs.logratios).chunk(2)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


@loss("APO, 2408.06266, eq. 8")
def apo_down(pairs: Pairs) -> Tensor:
    """sigma(b r_w) + 1 - sigma(b (r_w - r_l)), for chosen responses worse than the model's own."""
    chosen, rejected = (pairs.config.beta * pairs.logratios).chunk(2)
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


@loss("DiscoPOP, 2406.08414, eq. 5", of_score_differences=True)
def discopop(pairs: Pairs) -> Tensor:
    """(1 - g) l(m) + g exp(-m), l = -log sigma, m = b (s_w - s_l), g = sigma(m / tau)."""
    margins = pairs.config.beta * _difference(pairs.scores)
    ratio = margins / pairs.config.discopop_tau
    # g exp(-m) as one exponential: at a very negative margin the two factors are 0 and infinity.
    return torch.exp(F.logsigmoid(ratio) - margins) - torch.sigmoid(-ratio) * F.logsigmoid(margins)


@loss("maximum likelihood of the chosen responses", reference_free=True, of_score_differences=True)
def sft(pairs: Pairs) -> Tensor:
    """Minus the mean log-prob over all chosen tokens of the batch, the same for each pair."""
    return pairs.nll.expand(len(pairs.logps) // 2)


@loss(
    "length-normalised DPO of Tulu 3, 2411.15124, section 5",
    smoothed=True,
    of_score_differences=True,
    trl="TRL does not smooth it.",
)
def sigmoid_norm(pairs: Pairs) -> Tensor:
    """L(b (s_w / n_w - s_l / n_l))."""
    margins = pairs.config.beta * _difference(pairs.average(pairs.scores))
    return _logistic(margins, pairs.config.label_smoothing)


@loss("SimPO, 2405.14734, eq. 6", reference_free=True, smoothed=True, trl="In TRL a loss of its CPOTrainer.")
def simpo(pairs: Pairs) -> Tensor:
    """L(b (p_w / n_w - p_l / n_l) - gamma), gamma = simpo_gamma."""
    margins = pairs.config.beta * _difference(pairs.average(pairs.logps)) - pairs.config.simpo_gamma
    return _logistic(margins, pairs.config.label_smoothing)


@loss(
    "CPO's preference term, 2401.08417, eq. 3; its objective adds sft",
    reference_free=True,
    smoothed=True,
    trl="In TRL a trainer of its own.",
)
def cpo(pairs: Pairs) -> Tensor:
    """L(b (p_w - p_l))."""
    return _logistic(pairs.config.beta * _difference(pairs.logps), pairs.config.label_smoothing)


@loss(
    "ORPO's odds ratio, 2403.07691, eqs. 4 and 7; its objective adds sft",
    reference_free=True,
    trl="In TRL a trainer of its own.",
)
def orpo(pairs: Pairs) -> Tensor:
    """-b log sigma(o_w - o_l), o = log(q / (1 - q)), q = exp(p / n)."""
    logps = pairs.average(pairs.logps)
    # A probability of 1 has infinite odds. 1 - q by expm1, since 1 - exp(x) cancels near x = 0.
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    log_odds = logps - torch.log(-torch.expm1(logps))
    return -pairs.config.beta * F.logsigmoid(_difference(log_odds))


@loss("mDPO, 2406.11839, which crops the image where here noise weakens it", reads_weakened=True, trl="Not in TRL.")
def mdpo(pairs: Pairs) -> Tensor:
    """l(b (r_w - r_l)) + c l(b (r_w - r_v)) + a l(b r_w - d), l = -log sigma; c, a, d its weights and anchor."""
    config, (chosen, rejected) = pairs.config, pairs.logratios.chunk(2)
    preference = F.logsigmoid(config.beta * (chosen - rejected))
    conditional = F.logsigmoid(config.beta * (chosen - pairs.weakened_logratios))
    anchor = F.logsigmoid(config.beta * chosen - config.mdpo_anchor)
    return -(preference + config.mdpo_conditional_weight * conditional + config.mdpo_anchor_weight * anchor)


def _alpha_score(logratios, alpha):
    """f'(t) = (t^(alpha - 1) - 1) / (alpha - 1) at t = exp r; log t in the limit alpha -> 1."""
    slope = alpha - 1
    if abs(slope) < 1e-6:
        return logratios
    # Two scores that overflow would give inf - inf; the bound is a factor e under the largest number of the dtype.
    bound = math.log(torch.finfo(logratios.dtype).max) - 1
    return torch.expm1((slope * logratios).clamp(max=bound)) / slope


# s = f'(exp r) of f-DPO, 2309.16240, table 1; config -> function of the log-ratios.
F_DIVERGENCES = {
    "reverse_kl": lambda logratios, config: logratios,
    "forward_kl": lambda logratios, config: _alpha_score(logratios, 0.0),
    "js_divergence": lambda logratios, config: math.log(2) + F.logsigmoid(logratios),
    "alpha_divergence": lambda logratios, config: _alpha_score(logratios, config.f_alpha_divergence_coef),
}


def table_markdown() -> str:
    """docs/losses.md."""
    notation = " ".join(__doc__.split("\n\n")[1].split("Papers are")[0].split())
    lines = [
        "# Losses",
        "",
        "Made by `python -m bpo_fast.losses.table`. Options and defaults: `bpo_fast.LossConfig`.",
        "",
        notation,
        "",
        "| `loss_type` | formula | source | reference | smoothed | beside TRL 1.16 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, entry in LOSSES.items():
        formula = entry.values.__doc__.rstrip(".").replace("|", "\\|")
        reference, smoothed = "no" if entry.reference_free else "yes", "yes" if entry.smoothed else "no"
        lines.append(f"| {name} | {formula} | {entry.paper} | {reference} | {smoothed} | {entry.trl or 'the same'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table_markdown(), end="")
