"""The table of losses: values worked out by hand, directions of the gradients, extremes."""

import math
import re
from pathlib import Path

import pytest
import torch

from bpo_fast import preference_loss
from bpo_fast.losses.table import LOSSES, table_markdown


def softplus(x):
    return math.log1p(math.exp(x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


Q = sigmoid(1)
ODDS = [math.exp(x) / (1 - math.exp(x)) for x in (-0.5, -1.0)]
# Log-probs of -1 and -4, of -2 and -3 under the reference: log-ratios 1 and -1. Lengths 2 and 4. beta 0.5.
BY_HAND = {
    "sigmoid": ({}, softplus(-1)),
    "hinge": ({"beta": 0.25}, 0.5),
    "ipo": ({}, (0.5 + 0.25 - 1) ** 2),
    "exo_pair": ({"label_smoothing": 0.1}, Q * math.log(Q / 0.9) + (1 - Q) * math.log((1 - Q) / 0.1)),
    "nca_pair": ({}, 1.5 * softplus(-0.5) + 0.5 * softplus(0.5)),
    "robust": ({"label_smoothing": 0.1}, (0.9 * softplus(-1) - 0.1 * softplus(1)) / 0.8),
    "bco_pair": ({}, 2 * softplus(-0.5)),
    "sppo_hard": ({"beta": 0.25}, (1 - 2) ** 2 + (-1 + 2) ** 2),
    "aot": ({"label_smoothing": 0.2}, 0.8 * softplus(-1) + 0.2 * softplus(1)),
    "aot_unpaired": ({}, softplus(-1)),
    "apo_zero": ({}, 2 * sigmoid(-0.5)),
    "apo_down": ({}, sigmoid(0.5) + 1 - sigmoid(1)),
    "discopop": ({"discopop_tau": 0.5}, (1 - sigmoid(2)) * softplus(-1) + sigmoid(2) * math.exp(-1)),
    "sft": ({}, 0.5),
    "sigmoid_norm": ({}, softplus(-0.5 * (0.5 + 0.25))),
    "simpo": ({"simpo_gamma": 0.5}, softplus(-(0.5 * (-0.5 + 1) - 0.5))),
    "cpo": ({}, softplus(-1.5)),
    "orpo": ({}, 0.5 * math.log1p(ODDS[1] / ODDS[0])),
    # After the weakened image the chosen response has -1.5, and -1.1 under the reference: a log-ratio of -0.4.
    "mdpo": (
        {"mdpo_conditional_weight": 2.0, "mdpo_anchor_weight": 0.5, "mdpo_anchor": 0.2},
        softplus(-1) + 2 * softplus(-0.5 * 1.4) + 0.5 * softplus(-(0.5 - 0.2)),
    ),
}
WEAKENED = (-1.5, -1.1)


def scalars(*values):
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def weakened(loss_type, values=WEAKENED):
    names = ("weakened_logps", "ref_weakened_logps")
    return dict(zip(names, scalars(*values), strict=True)) if LOSSES[loss_type].reads_weakened else {}


def by_hand(**options):
    return preference_loss(
        *scalars(-1.0, -4.0, -2.0, -3.0),
        chosen_num_tokens=torch.tensor([2]),
        rejected_num_tokens=torch.tensor([4]),
        **{"beta": 0.5, **options},
    ).item()


@pytest.mark.parametrize("loss_type", LOSSES)
def test_by_hand(loss_type):
    options, expected = BY_HAND[loss_type]
    assert by_hand(loss_type=loss_type, **options, **weakened(loss_type)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # t = e and 1/e; f'(t) = 1 - 1/t, log(2 t / (1 + t)), (t^(alpha - 1) - 1) / (alpha - 1)
        ({"f_divergence_type": "forward_kl"}, softplus(-0.5 * (math.e - 1 / math.e))),
        ({"f_divergence_type": "js_divergence"}, softplus(-0.5 * (math.log(sigmoid(1)) - math.log(sigmoid(-1))))),
        (
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 3.0},
            softplus(-0.5 * (math.exp(2) - math.exp(-2)) / 2),
        ),
        ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}, softplus(-1)),
        ({"average_logps": True}, softplus(-0.5 * (0.5 + 0.25))),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [2.0, 0.5]}, 2 * softplus(-1) + 0.25),
    ],
)
def test_options_by_hand(options, expected):
    assert by_hand(**options) == pytest.approx(expected, abs=1e-12)


def test_sorted_losses_match_quantiles_of_the_batch():
    chosen, rejected, zero = torch.tensor([3.0, 1.0]), torch.tensor([0.0, 2.0]), torch.zeros(2)
    unpaired = preference_loss(chosen, rejected, zero, zero, beta=1.0, loss_type="aot_unpaired")
    assert unpaired.tolist() == pytest.approx([softplus(-(1 - 0)), softplus(-(3 - 2))], abs=1e-6)
    paired = preference_loss(chosen, rejected, torch.tensor([5.0, 0.0]), zero, beta=1.0, loss_type="aot")
    assert paired.tolist() == pytest.approx([softplus(-(-1 - 0)), softplus(-(3 - 5))], abs=1e-6)


def gradients(loss_type, chosen, rejected, **options):
    leaves = [value.requires_grad_() for value in scalars(chosen, rejected)]
    counts = {"chosen_num_tokens": torch.tensor([1]), "rejected_num_tokens": torch.tensor([1])}
    counts |= weakened(loss_type)
    loss = preference_loss(*leaves, *scalars(-3.0, -3.0), loss_type=loss_type, **counts, **options)
    grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    return [0.0 if grad is None else grad.item() for grad in grads]


@pytest.mark.parametrize("loss_type", [name for name in LOSSES if name not in ("apo_down", "discopop")])
def test_a_step_raises_the_chosen_and_lowers_the_rejected(loss_type):
    chosen, rejected = gradients(loss_type, -3.0, -3.0, label_smoothing=0.1 if loss_type == "exo_pair" else 0.0)
    assert chosen < 0
    assert rejected == 0 if loss_type == "sft" else rejected > 0


def test_discopop_turns_between_its_two_components():
    assert [gradients("discopop", -3.0 + r, -3.0, beta=1.0)[0] < 0 for r in (-1.0, 0.0, 1.0)] == [True, False, True]


def test_apo_down_lowers_both():
    assert min(gradients("apo_down", -3.0, -5.0, beta=1.0)) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("options", "chosen", "rejected"),
    [
        ({"loss_type": "orpo"}, 0.0, -1e-12),
        ({"loss_type": "orpo"}, -1e4, 0.0),
        ({"loss_type": "discopop", "beta": 1.0}, -1e4, 0.0),
        ({"f_divergence_type": "forward_kl"}, -1e4, -2e4),
        ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 3.0}, 1e4, 2e4),
        ({"loss_type": "exo_pair", "label_smoothing": 1e-3, "beta": 1.0}, -1e4, 1e4),
    ],
)
def test_extremes_stay_finite(options, chosen, rejected, dtype):
    leaves = [torch.tensor([value], dtype=dtype, requires_grad=True) for value in (chosen, rejected)]
    loss = preference_loss(*leaves, None, None, **options)
    assert loss.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss.sum(), leaves))


def test_log_odds_keep_their_digits_where_a_probability_is_near_one():
    # q = exp(-1e-9): odds 1e9, though exp(-1e-9) and 1 are one number in float32.
    loss = preference_loss(torch.tensor([-1e-6]), torch.tensor([-1e-4]), None, None, loss_type="orpo", beta=1.0).item()
    assert loss == pytest.approx(math.log1p(1e-2), rel=1e-4)


def test_every_loss_has_its_formula_and_source():
    for name, entry in LOSSES.items():
        assert entry.values.__doc__.endswith("."), name
        assert name == "sft" or re.search(r"\d{4}\.\d{5}", entry.paper), name


def test_the_kept_page_of_losses_is_what_the_table_makes():
    assert (Path(__file__).resolve().parents[2] / "docs" / "losses.md").read_text() == table_markdown()
