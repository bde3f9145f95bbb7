"""Which losses the one launch may stand for. Its values are tested where it runs: tests/kernels/."""

import pytest

from bpo_fast import LossConfig


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "hinge"},
        {"loss_weights": [2.0]},
        {"loss_type": ["sigmoid", "sft"]},
        {"f_divergence_type": "js_divergence"},
        {"use_weighting": True},
    ],
)
def test_only_the_plain_sigmoid_takes_the_one_launch(options):
    assert LossConfig(label_smoothing=0.1, average_logps=True, ld_alpha=0.5).is_plain_sigmoid
    assert not LossConfig(**options).is_plain_sigmoid
