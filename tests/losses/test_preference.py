"""The losses and their options against TRL's own lines in float64, and their properties."""

from collections import defaultdict, namedtuple
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import draw_targets, eager_token_logps
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from bpo_fast import LossConfig, PreferenceOutput, dpo_loss, linear_dpo_loss
from bpo_fast.losses.preference import Batch, Responses, token_preference
from bpo_fast.losses.table import F_DIVERGENCES, LOSSES, losses_that
from bpo_fast.ops.rows import TokenStatistics

TRL_LOSSES = [name for name in LOSSES if name not in ("simpo", "cpo", "orpo", "mdpo")]
# TRL does not smooth these two.
TRL_SMOOTHED_LOSSES = losses_that("smoothed") - {"sigmoid", "sigmoid_norm"}
ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x, unwrap_model=lambda x: x
)


class Outputs(torch.nn.Module):
    """A model that returns what it is given."""

    is_gradient_checkpointing = False

    def __init__(self, **outputs):
        super().__init__()
        self.outputs = SimpleNamespace(**outputs)

    def forward(self, **inputs):
        return self.outputs


Case = namedtuple("Case", ["token_logps", "ref_token_logps", "mask", "statistics"])


def draw_case(num_pairs, num_tokens, scale, seed, dtype=torch.float64):
    """Token log-probs [2B, T-1] of policy and reference, responses of random place and length, token statistics."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)

    shape = (2 * num_pairs, num_tokens - 1)
    first = torch.randint(0, num_tokens - 1, shape[:1], generator=generator)
    length = torch.randint(1, num_tokens, shape[:1], generator=generator)
    place = torch.arange(num_tokens - 1)
    mask = (place >= first[:, None]) & (place < (first + length)[:, None])
    statistics = TokenStatistics(3 * uniform(*shape), uniform(*shape) < 0.5, -uniform(*shape), uniform(*shape) - 0.5)
    statistics = TokenStatistics(*(values * mask for values in statistics))
    return Case(-scale * uniform(*shape) * mask, -scale * uniform(*shape) * mask, mask, statistics)


def trl_loss(case, config):
    """Loss, gradient to the token log-probs and metrics of TRL's DPOTrainer, run on a stand-in for its model."""
    leaf = case.token_logps.clone().requires_grad_()
    attributes = {
        "model": Outputs(log_probs=leaf, **case.statistics._asdict()),
        "ref_model": Outputs(log_probs=case.ref_token_logps),
        "accelerator": ACCELERATOR,
        "args": SimpleNamespace(discopop_tau=config.discopop_tau, gradient_checkpointing_kwargs=None),
        "loss_types": config.loss_types,
        "loss_weights": config.weights,
        "aux_loss_enabled": False,
        "precompute_ref_logps": False,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    stand_in = SimpleNamespace(**vars(config) | attributes)
    mask = torch.nn.functional.pad(case.mask, (1, 0)).long()
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    default, relu = torch.get_default_dtype(), torch.relu
    torch.set_default_dtype(leaf.dtype)  # "exo_pair" makes a tensor of its label smoothing in it
    try:
        with pytest.MonkeyPatch.context() as patch:
            # TRL weighs the output of "hinge" in place, which autograd refuses for a relu's own output.
            patch.setattr(torch, "relu", lambda values: relu(values).clone())
            loss = DPOTrainer._compute_loss(stand_in, stand_in.model, inputs, return_outputs=False)
    finally:
        torch.set_default_dtype(default)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return (
        loss.detach(),
        gradient * case.mask,
        {name: values[0] for name, values in stand_in._metrics["train"].items()},
    )


def padded(mask):
    """Responses laid out as [2B, T], tokens where `mask`."""
    pairs = (torch.arange(len(mask)) % (len(mask) // 2))[:, None]
    return Responses(lambda values: values.sum(1), lambda: (mask.cumsum(1) - 1, pairs), mask.sum(1))


def our_loss(case, config):
    leaf = case.token_logps.clone().requires_grad_()
    output = token_preference(
        leaf, padded(case.mask), config, ref_token_logps=case.ref_token_logps, statistics=case.statistics
    )
    (gradient,) = torch.autograd.grad(output.loss, leaf)
    return output, gradient * case.mask


def assert_parity(case, config, tolerance=1e-12):
    output, gradient = our_loss(case, config)
    expected, expected_gradient, expected_metrics = trl_loss(case, config)
    torch.testing.assert_close(output.loss.detach(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=tolerance)
    metrics = output.metrics()  # TRL counts accuracies in float32
    # Means of logits may be near 0, where terms of about 0.1 have cancelled: 1e-7 of them in float32.
    smallest = max(1e-9, tolerance * 1e-3)
    assert metrics.keys() == expected_metrics.keys() - {"num_tokens"}
    for name, value in metrics.items():
        assert value == pytest.approx(expected_metrics[name], rel=max(tolerance, 1e-7), abs=smallest), name


CASES = {
    "num_pairs": st.integers(1, 5),
    "num_tokens": st.integers(2, 9),
    "scale": st.sampled_from([0.1, 2.0]),
    "seed": st.integers(0, 2**31),
}


@pytest.mark.parametrize("loss_type", TRL_LOSSES)
@settings(max_examples=30, deadline=None)
@given(
    **CASES,
    beta=st.sampled_from([0.05, 0.1, 1.0]),
    label_smoothing=st.sampled_from([0.0, 1e-3, 0.3]),
    ld_alpha=st.sampled_from([None, 0.0, 0.4, 1.0]),
    use_weighting=st.booleans(),
)
def test_parity_with_trl(
    loss_type, num_pairs, num_tokens, scale, seed, beta, label_smoothing, ld_alpha, use_weighting
):
    if loss_type == "exo_pair":
        label_smoothing = label_smoothing or 1e-3
    config = LossConfig(
        loss_type,
        beta=beta,
        label_smoothing=label_smoothing if loss_type in TRL_SMOOTHED_LOSSES else 0.0,
        ld_alpha=ld_alpha,
        # Both refuse to weigh sorted pairs; TRL fails on a weighted "sft" and ours refuses it.
        use_weighting=use_weighting and loss_type not in losses_that("sorts_batch") | {"sft"},
    )
    assert_parity(draw_case(num_pairs, num_tokens, scale, seed), config)


@pytest.mark.parametrize("loss_type", sorted(losses_that("of_score_differences")))
@pytest.mark.parametrize("f_divergence_type", F_DIVERGENCES)
@settings(max_examples=8, deadline=None)
@given(**CASES, alpha=st.sampled_from([0.0, 0.5, 1.0, 1.7]))
def test_parity_of_f_divergences_with_trl(loss_type, f_divergence_type, num_pairs, num_tokens, scale, seed, alpha):
    config = LossConfig(
        loss_type,
        label_smoothing=1e-3 if loss_type == "exo_pair" else 0.0,
        f_divergence_type=f_divergence_type,
        f_alpha_divergence_coef=alpha,
    )
    if f_divergence_type == "alpha_divergence" and alpha != 1.0:
        # TRL has no float64 there. It takes exp(x) - 1 where ours is expm1(x), which float32 rounds to one eps of 1.
        assert_parity(draw_case(num_pairs, num_tokens, scale, seed, torch.float32), config, tolerance=2e-5)
    else:
        assert_parity(draw_case(num_pairs, num_tokens, scale, seed), config)


@settings(max_examples=60, deadline=None)
@given(
    **CASES,
    loss_types=st.lists(st.sampled_from(TRL_LOSSES), min_size=1, max_size=4),
    weights=st.lists(st.sampled_from([0.0, 0.3, 1.0, 2.5]), min_size=4, max_size=4),
    ld_alpha=st.sampled_from([None, 0.25]),
)
def test_parity_of_several_losses_with_trl(num_pairs, num_tokens, scale, seed, loss_types, weights, ld_alpha):
    smoothed = not TRL_SMOOTHED_LOSSES.isdisjoint(loss_types)
    if smoothed and {"sigmoid", "sigmoid_norm"} & set(loss_types):
        loss_types = [name for name in loss_types if name not in ("sigmoid", "sigmoid_norm")]
    config = LossConfig(
        loss_types,
        loss_weights=weights[: len(loss_types)],
        label_smoothing=0.1 if smoothed else 0.0,
        ld_alpha=ld_alpha,
    )
    assert_parity(draw_case(num_pairs, num_tokens, scale, seed), config)


def reference_free_inputs(case, average):
    num_tokens = case.mask.sum(1)
    leaf = case.token_logps.clone().requires_grad_()
    logps = leaf.sum(1) / num_tokens if average else leaf.sum(1)
    pairs = len(leaf) // 2
    return leaf, logps, -leaf[:pairs].sum() / num_tokens[:pairs].sum()


@pytest.mark.parametrize(("loss_type", "trl_type"), [("cpo", "sigmoid"), ("simpo", "simpo")])
@settings(max_examples=30, deadline=None)
@given(**CASES, label_smoothing=st.sampled_from([0.0, 0.2]), alpha=st.sampled_from([0.0, 0.7]))
def test_parity_with_trls_cpo_trainer(loss_type, trl_type, num_pairs, num_tokens, scale, seed, label_smoothing, alpha):
    case = draw_case(num_pairs, num_tokens, scale, seed)
    leaf, logps, nll = reference_free_inputs(case, average=loss_type == "simpo")
    stand_in = SimpleNamespace(
        loss_type=trl_type,
        beta=0.3,
        simpo_gamma=0.8,
        label_smoothing=label_smoothing,
        alpha=0.0,
        cpo_alpha=alpha,
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        concatenated_forward=lambda model, batch: (*logps.chunk(2), leaf, leaf, nll),
    )
    stand_in.cpo_loss = lambda *logps: CPOTrainer.cpo_loss(stand_in, *logps)
    expected, _ = CPOTrainer.get_batch_loss_metrics(stand_in, None, {})
    expected_gradient = torch.autograd.grad(expected, leaf)[0] * case.mask
    config = LossConfig(
        [loss_type, "sft"], loss_weights=[1.0, alpha], beta=0.3, simpo_gamma=0.8, label_smoothing=label_smoothing
    )
    output, gradient = our_loss(case, config)
    torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(**CASES)
def test_parity_with_trls_orpo_trainer(num_pairs, num_tokens, scale, seed):
    case = draw_case(num_pairs, num_tokens, scale, seed)
    leaf, logps, nll = reference_free_inputs(case, average=True)
    stand_in = SimpleNamespace(
        beta=0.3,
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        concatenated_forward=lambda model, batch: (*logps.chunk(2), leaf, leaf, nll),
    )
    stand_in.odds_ratio_loss = lambda *logps: ORPOTrainer.odds_ratio_loss(stand_in, *logps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)  # TRL rounds to float32 first
        expected, _ = ORPOTrainer.get_batch_loss_metrics(stand_in, None, {})
    expected_gradient = torch.autograd.grad(expected, leaf)[0] * case.mask
    output, gradient = our_loss(case, LossConfig(["sft", "orpo"], beta=0.3))
    torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm"])
def test_conservative_dpo_is_trls_smoothed_logistic_loss_of_the_log_ratios(loss_type):
    case = draw_case(4, 7, 2.0, seed=3)
    lengths = case.mask.sum(1) if loss_type == "sigmoid_norm" else 1
    logratios = (case.token_logps - case.ref_token_logps).sum(1) / lengths
    stand_in = SimpleNamespace(loss_type="sigmoid", beta=0.5, label_smoothing=0.2, alpha=0.0, accelerator=ACCELERATOR)
    expected = CPOTrainer.cpo_loss(stand_in, *logratios.chunk(2))[0].mean()
    output, _ = our_loss(case, LossConfig(loss_type, beta=0.5, label_smoothing=0.2))
    torch.testing.assert_close(output.loss.detach(), expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(**CASES, loss_type=st.sampled_from(sorted(LOSSES.keys() - {"mdpo"})), average_logps=st.booleans())
def test_order_of_pairs_changes_nothing(num_pairs, num_tokens, scale, seed, loss_type, average_logps):
    case = draw_case(num_pairs, num_tokens, scale, seed)
    config = LossConfig(
        loss_type, average_logps=average_logps, label_smoothing=0.1 if loss_type == "exo_pair" else 0.0
    )
    order = torch.randperm(num_pairs, generator=torch.Generator().manual_seed(seed))
    rows = torch.cat([order, order + num_pairs])
    permuted = Case(*(x[rows] for x in case[:3]), TokenStatistics(*(x[rows] for x in case.statistics)))
    (output, gradient), (other, other_gradient) = our_loss(case, config), our_loss(permuted, config)
    torch.testing.assert_close(other.loss, output.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(other_gradient, gradient[rows], rtol=1e-12, atol=1e-12)


def test_average_logps_averages_once():
    case = draw_case(3, 6, 2.0, seed=1)
    for loss_type in ("ipo", "sigmoid_norm", "simpo", "orpo"):
        plain, averaged = (our_loss(case, LossConfig(loss_type, average_logps=flag))[0] for flag in (False, True))
        torch.testing.assert_close(averaged.loss, plain.loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(averaged.chosen_rewards, plain.chosen_rewards, rtol=0, atol=0)
    pair_losses = {
        name: our_loss(case, LossConfig(name, average_logps=flag))[0].loss.item()
        for name, flag in (("sigmoid", True), ("sigmoid_norm", False))
    }
    assert pair_losses["sigmoid"] == pytest.approx(pair_losses["sigmoid_norm"], abs=1e-12)


OPTIONS = [
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "ld_alpha": 0.3},
    {"loss_type": "sigmoid_norm", "f_divergence_type": "js_divergence", "ld_alpha": 0.0},
    {"loss_type": ["orpo", "sft"]},
    {"loss_type": "aot", "label_smoothing": 0.1},
    {"loss_type": ["sigmoid", "hinge"], "use_weighting": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: str(options["loss_type"]))
def test_losses_of_a_models_output_are_trls(options):
    """From logits and hidden states, gradients to both, against TRL's lines on the eager log-probs."""
    generator = torch.Generator().manual_seed(2)
    hidden, ref_hidden = (torch.randn(6, 8, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    head = torch.randn(13, 5, dtype=torch.float64, generator=generator)
    labels = draw_targets((6, 8), 13, generator)
    labels[:, 0] = -100
    leaf = hidden.clone().requires_grad_()
    token_logps = eager_token_logps((leaf @ head.t())[:, :-1], labels[:, 1:])
    ref_token_logps = eager_token_logps((ref_hidden @ head.t())[:, :-1], labels[:, 1:])
    empty, mask = torch.zeros_like(ref_token_logps), labels[:, 1:] != -100
    log_sum_sq_probs = torch.logsumexp(2 * torch.log_softmax(hidden @ head.t(), -1), -1)[:, :-1] * mask
    statistics = TokenStatistics(empty, empty.bool(), log_sum_sq_probs, empty)
    case = Case(token_logps.detach(), ref_token_logps, mask, statistics)
    config = LossConfig(**options)
    if not config.needs_reference:
        output, gradient = our_loss(case, config)
        expected = output.loss.detach()
    else:
        expected, gradient, _ = trl_loss(case, config)
    (expected_gradient,) = torch.autograd.grad(token_logps, leaf, gradient)
    for loss in (
        lambda x: dpo_loss(x @ head.t(), labels, ref_logits=ref_hidden @ head.t(), **options),
        lambda x: linear_dpo_loss(x, head, labels, ref_hidden=ref_hidden, **options),
    ):
        leaf = hidden.clone().requires_grad_()
        output = loss(leaf)
        (gradient,) = torch.autograd.grad(output.loss, leaf)
        torch.testing.assert_close(output.loss.detach(), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)
        assert torch.equal(output.num_tokens, mask.sum(1))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: str(options["loss_type"]))
def test_every_option_compiles_without_graph_break(options):
    logits, ref_logits = torch.randn(4, 5, 19), torch.randn(4, 5, 19)
    labels = torch.randint(0, 19, (4, 5))

    def function(x):
        return dpo_loss(x, labels, ref_logits=ref_logits, **options).loss

    results = []
    for candidate in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        loss = candidate(leaf)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_a_batch_in_parts_has_the_loss_of_the_whole():
    """The parts' shares of the batch's mean add up, as a token budget needs."""
    case = draw_case(4, 6, 2.0, seed=5)
    config = LossConfig(["sigmoid", "sft"], loss_weights=[1.0, 0.3], ld_alpha=0.5)
    whole, _ = our_loss(case, config)
    batch = Batch(num_pairs=4, num_chosen_tokens=int(case.mask[:4].sum()))
    total = 0.0
    for part in (slice(0, 1), slice(1, 4)):
        token_logps, ref_token_logps, mask = (torch.cat([x[:4][part], x[4:][part]]) for x in case[:3])
        output = token_preference(token_logps, padded(mask), config, ref_token_logps=ref_token_logps, batch=batch)
        total += output.loss
    torch.testing.assert_close(total, whole.loss, rtol=1e-12, atol=1e-12)


def test_statistics_may_be_summed_already():
    case = draw_case(3, 6, 2.0, seed=4)
    output, _ = our_loss(case, LossConfig())
    summed = TokenStatistics(*(values.sum(1) for values in case.statistics))
    fields = {name: getattr(output, name) for name in PreferenceOutput.__dataclass_fields__ if name != "statistics"}
    assert PreferenceOutput(**fields, statistics=summed).metrics() == output.metrics()
