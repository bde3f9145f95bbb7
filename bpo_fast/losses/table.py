"""The table of preference losses: small functions over sequence log-probs that give one value a pair.

Notation of the formulas: w is the chosen and l the rejected response; n its number of tokens; p = log pi(y | x) under
the policy, summed over tokens; r = p - log ref(y | x), the log-ratio to the reference; s = f'(exp r), the score that
the f-divergence makes of it (s = r for the reverse KL of standard DPO); b = beta; e = label_smoothing; sigma the
logistic function; L(x) = -(1 - e) log sigma(x) - e log sigma(-x). Papers are named by their arXiv number. The forms
are those of TRL 1.16; where it differs from a paper the function says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from bpo_fast.losses.preference import LossConfig


@dataclass(frozen=True)
class Pairs:
    """What a loss may read of B pairs. Tensors are [2B], the chosen responses first.

    Attributes:
        config: numbers such as beta.
        logps: p, in nats.
        ref_logps: the reference's, or None for a reference of 0.
        logratios: r.
        scores: s.
        num_tokens: n, or None where the log-probs are averages over tokens already.
        nll: scalar, minus the mean log-prob of all chosen tokens; None unless "sft" is asked for.
    """

    config: LossConfig
    logps: Tensor
    ref_logps: Tensor | None
    logratios: Tensor
    scores: Tensor
    num_tokens: Tensor | None
    nll: Tensor | None

    def average(self, values: Tensor) -> Tensor:
        """`values` [2B] over their number of tokens."""
        return values if self.num_tokens is None else values / self.num_tokens.clamp(min=1)


def _difference(values):
    """Chosen minus rejected, [2B] -> [B]."""
    chosen, rejected = values.chunk(2)
    return chosen - rejected


def _logistic(margins, label_smoothing):
    """L(margins)."""
    if not label_smoothing:
        return -F.logsigmoid(margins)
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


def _sigmoid(pairs):
    """L(b (s_w - s_l)). DPO: 2305.18290, eq. 7. With e > 0 conservative DPO (cDPO), where TRL does not smooth."""
    return _logistic(pairs.config.beta * _difference(pairs.scores), pairs.config.label_smoothing)


def _sigmoid_norm(pairs):
    """L(b (s_w / n_w - s_l / n_l)). Length-normalised DPO of Tulu 3: 2411.15124, section 5. TRL does not smooth it."""
    margins = pairs.config.beta * _difference(pairs.average(pairs.scores))
    return _logistic(margins, pairs.config.label_smoothing)


def _hinge(pairs):
    """max(0, 1 - b (s_w - s_l)). SLiC: 2305.10425; with a reference: RSO, 2309.06657."""
    return torch.relu(1 - pairs.config.beta * _difference(pairs.scores))


def _ipo(pairs):
    """(s_w / n_w - s_l / n_l - 1 / (2 b))^2. IPO: 2310.12036, eq. 17, per token as its authors advise."""
    return (_difference(pairs.average(pairs.scores)) - 1 / (2 * pairs.config.beta)) ** 2


def _exo_pair(pairs):
    """KL((q, 1 - q) || (1 - e, e)) with q = sigma(b (s_w - s_l)). EXO: 2402.00856, eq. 16."""
    margins = pairs.config.beta * _difference(pairs.scores)
    log_chosen, log_rejected = F.logsigmoid(margins), F.logsigmoid(-margins)
    smoothing = pairs.config.label_smoothing
    return torch.sigmoid(margins) * (log_chosen - math.log1p(-smoothing)) + torch.sigmoid(-margins) * (
        log_rejected - math.log(smoothing)
    )


def _nca_pair(pairs):
    """-log sigma(b r_w) - (log sigma(-b r_w) + log sigma(-b r_l)) / 2. NCA for two responses: 2402.05369."""
    chosen, rejected = (pairs.config.beta * pairs.logratios).chunk(2)
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


def _robust(pairs):
    """((1 - e) l(m) - e l(-m)) / (1 - 2 e), l = -log sigma, m = b (s_w - s_l). Robust DPO: 2403.00409."""
    margins = pairs.config.beta * _difference(pairs.scores)
    smoothing = pairs.config.label_smoothing
    return (smoothing * F.logsigmoid(-margins) - (1 - smoothing) * F.logsigmoid(margins)) / (1 - 2 * smoothing)


def _bco_pair(pairs):
    """-log sigma(b r_w) - log sigma(-b r_l). BCO: 2404.04656, without its moving shift of the rewards."""
    chosen, rejected = (pairs.config.beta * pairs.logratios).chunk(2)
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def _sppo_hard(pairs):
    """(r_w - 1 / (2 b))^2 + (r_l + 1 / (2 b))^2. SPPO: 2405.00675, eq. 4.7 with win probabilities of 1 and 0."""
    chosen, rejected = pairs.logratios.chunk(2)
    target = 0.5 / pairs.config.beta
    return (chosen - target) ** 2 + (rejected + target) ** 2


def _aot(pairs):
    """L(b (sort(p_w - p_l) - sort(ref_w - ref_l))), sorted over the batch. AOT, paired: 2406.05882."""
    delta = _difference(pairs.logps).sort().values
    if pairs.ref_logps is not None:
        delta = delta - _difference(pairs.ref_logps).sort().values
    return _logistic(pairs.config.beta * delta, pairs.config.label_smoothing)


def _aot_unpaired(pairs):
    """L(b (sort(r_w) - sort(r_l))), sorted over the batch. AOT, unpaired: 2406.05882."""
    chosen, rejected = pairs.logratios.chunk(2)
    delta = chosen.sort().values - rejected.sort().values
    return _logistic(pairs.config.beta * delta, pairs.config.label_smoothing)


def _apo_zero(pairs):
    """1 - sigma(b r_w) + sigma(b r_l), for chosen responses better than the model's own. APO: 2408.06266, eq. 7."""
    chosen, rejected = (pairs.config.beta * pairs.logratios).chunk(2)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def _apo_down(pairs):
    """sigma(b r_w) + 1 - sigma(b (r_w - r_l)), for chosen ones worse than the model's. APO: 2408.06266, eq. 8."""
    chosen, rejected = (pairs.config.beta * pairs.logratios).chunk(2)
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


def _discopop(pairs):
    """(1 - g) l(m) + g exp(-m), l = -log sigma, m = b (s_w - s_l), g = sigma(m / tau). DiscoPOP: 2406.08414, eq. 5."""
    margins = pairs.config.beta * _difference(pairs.scores)
    ratio = margins / pairs.config.discopop_tau
    # g exp(-m) as one exponential: at a very negative margin the two factors are 0 and infinity.
    return torch.exp(F.logsigmoid(ratio) - margins) - torch.sigmoid(-ratio) * F.logsigmoid(margins)


def _sft(pairs):
    """Minus the mean log-prob over all chosen tokens of the batch, for each pair the same: maximum likelihood."""
    return pairs.nll.expand(len(pairs.logps) // 2)


def _cpo(pairs):
    """L(b (p_w - p_l)), the preference term of CPO: 2401.08417, eq. 3. Its objective adds "sft"."""
    return _logistic(pairs.config.beta * _difference(pairs.logps), pairs.config.label_smoothing)


def _simpo(pairs):
    """L(b (p_w / n_w - p_l / n_l) - gamma), gamma = simpo_gamma. SimPO: 2405.14734, eq. 6."""
    margins = pairs.config.beta * _difference(pairs.average(pairs.logps)) - pairs.config.simpo_gamma
    return _logistic(margins, pairs.config.label_smoothing)


def _orpo(pairs):
    """-b log sigma(o_w - o_l), o = log(q / (1 - q)), q = exp(p / n). ORPO's odds ratio: 2403.07691, eqs. 4 and 7.

    Its objective adds "sft" of weight 1.
    """
    logps = pairs.average(pairs.logps)
    # A probability of 1 has infinite odds. 1 - q by expm1, since 1 - exp(x) cancels near x = 0.
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    log_odds = logps - torch.log(-torch.expm1(logps))
    return -pairs.config.beta * F.logsigmoid(_difference(log_odds))


LOSSES = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sft": _sft,
    "sigmoid_norm": _sigmoid_norm,
    "simpo": _simpo,
    "cpo": _cpo,
    "orpo": _orpo,
}
REFERENCE_FREE_LOSSES = frozenset({"sft", "simpo", "cpo", "orpo"})
SMOOTHED_LOSSES = frozenset({"sigmoid", "exo_pair", "robust", "aot", "aot_unpaired", "sigmoid_norm", "simpo", "cpo"})
# Losses that sort the pairs of a batch: a pair's value depends on the others.
SORTED_LOSSES = frozenset({"aot", "aot_unpaired"})
# The partition function of f-DPO cancels only in the difference of the scores, so only losses of that difference
# have a form for every f-divergence; "sft" reads no scores.
F_DIVERGENCE_LOSSES = frozenset({"sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft", "sigmoid_norm"})


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
