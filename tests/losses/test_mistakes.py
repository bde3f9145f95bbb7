"""A mistake in a loss's options or arguments is named in one sentence."""

import pytest
import torch

from bpo_fast import LossConfig, dpo_loss, linear_dpo_loss, preference_loss
from bpo_fast.losses.preference import Responses, token_preference

ONE = torch.zeros(1)
COUNTS = {"chosen_num_tokens": torch.ones(1, dtype=torch.int64), "rejected_num_tokens": torch.ones(1)}
RESPONSES = Responses(lambda values: values.sum(1), None, torch.tensor([3, 3]))
LOGITS, LABELS, HEAD = torch.zeros(4, 3, 5), torch.zeros(4, 3, dtype=torch.int64), torch.zeros(7, 5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: dpo_loss(LOGITS[0], LABELS), ValueError, "policy_logits: found float32 [3, 5], expected [2B, T, V]."),
        (
            lambda: dpo_loss(LOGITS[:3], LABELS[:3]),
            ValueError,
            "policy_logits: found shape [3, 3, 5], expected [2B, T, V]",
        ),
        (
            lambda: dpo_loss(LOGITS[:0], LABELS[:0]),
            ValueError,
            "policy_logits: found shape [0, 3, 5], expected [2B, T, V]",
        ),
        (lambda: dpo_loss(LOGITS[:, :, :0], LABELS), ValueError, "V of at least 1"),
        (lambda: dpo_loss(LOGITS, LABELS[:, 1:]), ValueError, "labels: found int64 [4, 2], expected [4, 3]."),
        (
            lambda: dpo_loss(LOGITS, LABELS + 5),
            ValueError,
            "(labels): found 5, expected 0 to 4, or -100 where ignored;",
        ),
        (
            lambda: dpo_loss(LOGITS, torch.where(torch.tensor([[0], [1], [0], [1]]) == 1, -100, LABELS)),
            ValueError,
            "labels: found none but -100 after position 0 in sequence 1, 3 of 4, expected a response token in each",
        ),
        (
            lambda: linear_dpo_loss(LOGITS, HEAD, torch.tensor([[1, -100, -100]] * 4)),
            ValueError,
            "labels: found none but -100 after position 0 in sequence 0, 1, 2, 3 of 4",
        ),
        (
            lambda: dpo_loss(LOGITS, LABELS, average_logps="no"),
            TypeError,
            "average_logps: found 'no', expected True or False.",
        ),
        (lambda: LossConfig(use_weighting=1), TypeError, "use_weighting: found 1, expected True or False."),
        (lambda: LossConfig(use_weighting=None), TypeError, "use_weighting: found None, expected True or False."),
        (lambda: LossConfig(beta=True), ValueError, "beta: found True, expected a positive number"),
        (lambda: LossConfig(beta="0.1"), ValueError, "beta: found '0.1', expected a positive number"),
        (lambda: LossConfig(beta=None), ValueError, "beta: found None, expected a positive number"),
        (lambda: LossConfig(loss_type=["sigmoid", 3]), ValueError, "loss_type: found 3, expected one of sigmoid"),
        (lambda: LossConfig(loss_type=[["sigmoid"]]), ValueError, "loss_type: found ['sigmoid'], expected one of"),
        (lambda: LossConfig(loss_weights=[True]), ValueError, "loss_weights: found [True], expected a finite number"),
        (lambda: LossConfig(loss_weights=["1"]), ValueError, "loss_weights: found ['1'], expected a finite number"),
        (lambda: LossConfig(f_divergence_type=None), ValueError, "f_divergence_type: found None, expected one of"),
        (
            lambda: dpo_loss(LOGITS, LABELS.float()),
            TypeError,
            "labels: found float32 [4, 3], expected a tensor [4, 3] of int64 or int32.",
        ),
        (
            lambda: dpo_loss(LOGITS, LABELS, loss_type="mdpo"),
            ValueError,
            "policy_logits: found shape [4, 3, 5], expected [3B, T, V]; give B chosen sequences, then B rejected "
            "ones, then the B chosen ones after their weakened images, B at least 1.",
        ),
        (
            lambda: dpo_loss(LOGITS[:3], torch.tensor([[1, 2, 3], [1, 4, 4], [1, 3, 2]]), loss_type="mdpo"),
            ValueError,
            "labels: found other tokens in the last third than in the first, expected the chosen responses again",
        ),
        (
            lambda: preference_loss(ONE, ONE, ONE, ONE, loss_type="mdpo", ref_weakened_logps=ONE),
            ValueError,
            "chosen_logps and rejected_logps and weakened_logps: found chosen_logps, rejected_logps, expected all or",
        ),
        (
            lambda: preference_loss(ONE, ONE, ONE, ONE, weakened_logps=ONE),
            ValueError,
            "weakened_logps: found log-probs with loss_type='sigmoid', expected None, since it does not read them",
        ),
        (lambda: LossConfig("mdpo", mdpo_conditional_weight=0.0), ValueError, "expected a positive number"),
        (
            lambda: LossConfig("mdpo", f_divergence_type="js_divergence"),
            ValueError,
            "f_divergence_type: found 'js_divergence', expected 'reverse_kl' for 'mdpo'",
        ),
        (
            lambda: linear_dpo_loss(LOGITS, HEAD, LABELS, token_weights=torch.ones(4, 2)),
            ValueError,
            "token_weights: found float32 [4, 2], expected [4, 3].",
        ),
        (
            lambda: dpo_loss(LOGITS, LABELS, token_weights=LABELS),
            TypeError,
            "token_weights: found int64 [4, 3], expected a tensor [4, 3] of a floating-point dtype.",
        ),
        (
            lambda: dpo_loss(LOGITS, LABELS, token_weights=LABELS - 0.5),
            ValueError,
            "token_weights: found -0.5, expected finite numbers of at least 0 where a label is predicted.",
        ),
        (
            lambda: dpo_loss(LOGITS, LABELS, ref_logits=LOGITS, ref_logps=torch.zeros(4)),
            ValueError,
            "ref_logits and ref_logps: found both, expected one",
        ),
        (
            lambda: dpo_loss(LOGITS, LABELS, ref_logits=LOGITS.half()),
            TypeError,
            "ref_logits: found float16, expected float32 like policy",
        ),
        (
            lambda: dpo_loss(LOGITS, LABELS, ref_logits=LOGITS[:2]),
            ValueError,
            "ref_logits: found float32 [2, 3, 5], expected [4, 3, 5].",
        ),
        (
            lambda: dpo_loss(LOGITS, LABELS, ref_logps=torch.zeros(2)),
            ValueError,
            "ref_logps: found float32 [2], expected [4].",
        ),
        (lambda: dpo_loss(LOGITS, LABELS, loss_type="dpo"), ValueError, "expected one of sigmoid, hinge, ipo"),
        (lambda: dpo_loss(LOGITS, LABELS, beta=0.0), ValueError, "beta: found 0.0, expected a positive number"),
        (lambda: dpo_loss(LOGITS, LABELS, label_smoothing=0.5), ValueError, "expected a number in [0, 0.5)"),
        (
            lambda: dpo_loss(LOGITS, LABELS, loss_type="ipo", label_smoothing=0.1),
            ValueError,
            "expected 0 for loss_type='ipo'",
        ),
        (
            lambda: linear_dpo_loss(LOGITS, HEAD[:, 1:], LABELS),
            ValueError,
            "lm_head_weight: found float32 [7, 4], expected [V, 5].",
        ),
        (
            lambda: linear_dpo_loss(LOGITS, HEAD.half(), LABELS),
            TypeError,
            "lm_head_weight: found float16, expected float32 like policy_hidden; cast",
        ),
        (
            lambda: linear_dpo_loss(LOGITS, HEAD, LABELS, logit_softcap=-1),
            ValueError,
            "logit_softcap: found -1, expected a positive number or None.",
        ),
        (
            lambda: linear_dpo_loss(LOGITS, HEAD, LABELS, lm_head_bias=torch.zeros(5)),
            ValueError,
            "lm_head_bias: found float32 [5], expected [7].",
        ),
        (
            lambda: linear_dpo_loss(LOGITS, HEAD, LABELS, ref_hidden=LOGITS, ref_logps=torch.zeros(4)),
            ValueError,
            "ref_hidden and ref_logps: found both, expected one",
        ),
        (
            lambda: preference_loss(torch.zeros(2), torch.zeros(3), None, None),
            ValueError,
            "rejected_logps: found float32 [3], expected [2].",
        ),
        (
            lambda: preference_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), None),
            ValueError,
            "ref_chosen_logps and ref_rejected_logps: found one of them, expected both or neither",
        ),
    ],
)
def test_errors_name_the_argument(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": "sigmod"}, "loss_type: found 'sigmod', expected one of sigmoid, .*; did you mean 'sigmoid'?"),
        ({"loss_type": []}, "loss_type: found an empty list, expected the name of at least one loss."),
        ({"loss_type": ["sigmoid", 3]}, "loss_type: found 3, expected one of sigmoid, "),
        ({"beta": 0.0}, "beta: found 0.0, expected a positive number."),
        ({"beta": float("nan")}, "beta: found nan, expected a positive number."),
        ({"beta": "0.1"}, "beta: found '0.1', expected a positive number."),
        ({"label_smoothing": 0.5}, r"label_smoothing: found 0.5, expected a number in \[0, 0.5\)."),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing: found 0.1, expected 0 for .*'hinge'"),
        ({"loss_type": "robust", "label_smoothing": 0.6}, "label_smoothing: found 0.6, expected a number in"),
        ({"loss_type": "exo_pair"}, "label_smoothing: found 0, expected above 0 for 'exo_pair'; .* recommends 1e-3."),
        ({"ld_alpha": 1.5}, r"ld_alpha: found 1.5, expected None or a number in \[0, 1\]."),
        (
            {"loss_weights": [1.0, 2.0]},
            r"loss_weights: found \[1.0, 2.0\], expected a finite number for each of sigmoid.",
        ),
        ({"loss_weights": [float("inf")]}, r"loss_weights: found \[inf\], expected a finite number"),
        ({"f_divergence_type": "kl"}, "f_divergence_type: found 'kl', expected one of reverse_kl, "),
        (
            {"loss_type": ["sigmoid", "bco_pair"], "f_divergence_type": "forward_kl"},
            "f_divergence_type: found 'forward_kl', expected 'reverse_kl' for 'bco_pair'; ",
        ),
        ({"loss_type": "simpo", "f_divergence_type": "js_divergence"}, "expected 'reverse_kl' for 'simpo'"),
        ({"f_alpha_divergence_coef": float("inf")}, "f_alpha_divergence_coef: found inf, expected a finite number."),
        ({"discopop_tau": 0}, "discopop_tau: found 0, expected a positive number."),
        ({"simpo_gamma": -1.0}, "simpo_gamma: found -1.0, expected a number of at least 0."),
        ({"loss_type": "aot", "use_weighting": True}, "use_weighting: found True, expected False for 'aot'"),
        ({"loss_type": ["sigmoid", "sft"], "use_weighting": True}, "expected False for 'sft'"),
    ],
)
def test_mistakes_of_a_config_are_named(options, words):
    with pytest.raises(ValueError, match=words) as caught:
        LossConfig(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: preference_loss(ONE, ONE, ONE, ONE, simpo_gama=1.0), TypeError, "did you mean 'simpo_gamma'?"),
        (
            lambda: dpo_loss(torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64), zzz=1.0),
            TypeError,
            "zzz: found no such option of a loss, expected one of loss_type, beta",
        ),
        (
            lambda: LossConfig(None),
            TypeError,
            "loss_type: found None, expected the name of a loss or a list of names.",
        ),
        (lambda: LossConfig([["sigmoid"]]), ValueError, "loss_type: found ['sigmoid'], expected one of"),
        (lambda: LossConfig(loss_weights=0.5), TypeError, "loss_weights: found 0.5, expected a list of numbers or"),
        (lambda: preference_loss(ONE, ONE, ONE, ONE, ld_alpha=0.5), ValueError, "ld_alpha: found 0.5 without"),
        (lambda: preference_loss(ONE, ONE, None, None, use_weighting=True), ValueError, "use_weighting: found True"),
        (
            lambda: preference_loss(ONE, ONE, None, None, loss_type="sft"),
            ValueError,
            "chosen_num_tokens and rejected_num_tokens: found None, expected both for 'sft' and means.",
        ),
        (
            lambda: preference_loss(ONE, ONE, None, None, **COUNTS),
            TypeError,
            "rejected_num_tokens: found float32 [1], expected a tensor [1] of int64 or int32.",
        ),
        (
            lambda: preference_loss(ONE, ONE, None, None, chosen_num_tokens=COUNTS["chosen_num_tokens"]),
            ValueError,
            "chosen_num_tokens and rejected_num_tokens: found one of them, expected both or neither.",
        ),
        (
            lambda: token_preference(torch.zeros(2, 3), RESPONSES, LossConfig(use_weighting=True)),
            ValueError,
            "statistics: found None, expected those of the policy's tokens for use_weighting.",
        ),
    ],
)
def test_mistakes_of_a_call_are_named(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
