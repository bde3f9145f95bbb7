"""mDPO's three terms and token weights, from logits and hidden states, against plain PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_within_contract, draw_targets, eager_token_logps

from bpo_fast import dpo_loss, linear_dpo_loss
from bpo_fast.losses.config import LossConfig
from bpo_fast.losses.preference import Batch, Responses, token_preference

WEIGHTS = {"mdpo_conditional_weight": 0.7, "mdpo_anchor_weight": 1.5, "mdpo_anchor": 0.3}


def draw(pairs, length, vocab, generator, roots=3):
    """Labels [roots x pairs, length], the last third the first one's, and token weights of the same shape."""
    labels = draw_targets((2 * pairs, length), vocab, generator)
    labels[:, 1].clamp_(min=0)
    weights = torch.rand(labels.shape, generator=generator) * 3 * (torch.rand(labels.shape, generator=generator) > 0.2)
    if roots == 3:
        labels, weights = (torch.cat([x, x[:pairs]]) for x in (labels, weights))
    return labels, weights.masked_fill(labels == -100, torch.nan)  # what is not predicted is not read


def eager_ratios(hidden, ref_hidden, head, labels, weights):
    """Each response's log-ratio, token for token, in the dtype of its arguments."""
    ratios = []
    for row, ref_row, label, weight in zip(hidden, ref_hidden, labels, weights, strict=True):
        read = (label[1:] != -100).nonzero().flatten()
        logps, ref_logps = (eager_token_logps(x[read] @ head.t(), label[read + 1]) for x in (row, ref_row))
        ratios.append((weight[read + 1].to(hidden) * (logps - ref_logps)).sum())
    return torch.stack(ratios)


def eager_mdpo(ratios, beta):
    chosen, rejected, weakened = ratios.chunk(3)
    terms = (beta * (chosen - rejected), beta * (chosen - weakened), beta * chosen - WEIGHTS["mdpo_anchor"])
    factors = (1.0, WEIGHTS["mdpo_conditional_weight"], WEIGHTS["mdpo_anchor_weight"])
    return -sum(factor * F.logsigmoid(term) for factor, term in zip(factors, terms, strict=True)).mean()


def eager_sigmoid(ratios, beta):
    chosen, rejected = ratios.chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def ours_of(head, loss_type):
    """Both forms of the loss, as functions of hidden states."""
    options = {"loss_type": loss_type, "beta": 0.4} | (WEIGHTS if loss_type == "mdpo" else {})

    def from_logits(hidden, ref_hidden, labels, weights):
        logits, ref_logits = hidden @ head.t(), ref_hidden @ head.t()
        return dpo_loss(logits, labels, ref_logits=ref_logits, token_weights=weights, **options)

    def from_hidden(hidden, ref_hidden, labels, weights):
        return linear_dpo_loss(
            hidden, head.to(hidden), labels, ref_hidden=ref_hidden, token_weights=weights, **options
        )

    return from_logits, from_hidden


@pytest.mark.parametrize("loss_type", ["mdpo", "sigmoid"])
def test_values_and_gradients_are_those_of_plain_pytorch(loss_type):
    generator = torch.Generator().manual_seed(3)
    labels, weights = draw(3, 7, 19, generator, roots=3 if loss_type == "mdpo" else 2)
    hidden, ref_hidden = (torch.randn(*labels.shape, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    head = torch.randn(19, 5, dtype=torch.float64, generator=generator)
    leaf = hidden.clone().requires_grad_()
    ratios = eager_ratios(leaf, ref_hidden, head, labels, weights)
    expected = (eager_mdpo if loss_type == "mdpo" else eager_sigmoid)(ratios, beta=0.4)
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    for function in ours_of(head, loss_type):
        leaf = hidden.clone().requires_grad_()
        output = function(leaf, ref_hidden, labels, weights)
        (gradient,) = torch.autograd.grad(output.loss, leaf)
        torch.testing.assert_close(output.loss, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)
        rewards = [output.chosen_rewards, output.rejected_rewards, output.weakened_rewards]
        torch.testing.assert_close(torch.cat(rewards[: len(labels) // 3]), 0.4 * ratios.detach())
        named = output.metrics()
        assert ("rewards/weakened" in named) == ("logps/weakened" in named) == (loss_type == "mdpo")


@settings(max_examples=15, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    pairs=st.integers(1, 3),
    vocab=st.sampled_from([2, 127, 2053]),
    loss_type=st.sampled_from(["mdpo", "sigmoid"]),
    seed=st.integers(0, 2**31),
)
def test_within_contract(dtype, pairs, vocab, loss_type, seed):
    """Several draws of each, since plain PyTorch's error of one number may be next to nothing by luck."""
    generator = torch.Generator().manual_seed(seed)
    eager = eager_mdpo if loss_type == "mdpo" else eager_sigmoid
    losses, gradients = [], []
    for _ in range(8):
        labels, weights = draw(pairs, 5, vocab, generator, roots=3 if loss_type == "mdpo" else 2)
        hidden, ref_hidden = (torch.randn(*labels.shape, 6, generator=generator).to(dtype) for _ in range(2))
        head = torch.randn(vocab, 6, generator=generator).to(dtype)
        _, linear = ours_of(head, loss_type)
        functions = [
            (dtype, lambda *x, linear=linear: linear(*x).loss),
            *(
                (
                    cast,
                    lambda x, ref, *rest, head=head, cast=cast: eager(eager_ratios(x, ref, head.to(cast), *rest), 0.4),
                )
                for cast in (dtype, torch.float64)
            ),
        ]
        found = []
        for cast, function in functions:
            leaf = hidden.to(cast, copy=True).requires_grad_()
            loss = function(leaf, ref_hidden.to(cast), labels, weights)
            found.append((loss, torch.autograd.grad(loss, leaf)[0]))
        losses.append([loss for loss, _ in found])
        gradients.append([gradient for _, gradient in found])
    for results in (losses, gradients):
        assert_within_contract(*map(torch.stack, zip(*results, strict=True)))


def test_a_policy_that_is_its_reference_has_margins_of_zero_and_three_ln_2():
    generator = torch.Generator().manual_seed(0)
    labels, weights = draw(2, 6, 11, generator)
    logits = torch.randn(*labels.shape, 11, generator=generator)
    output = dpo_loss(logits, labels, ref_logits=logits, token_weights=weights, loss_type="mdpo")
    assert output.loss.item() == pytest.approx(3 * math.log(2), abs=1e-6)
    assert not torch.cat([output.chosen_rewards, output.rejected_rewards, output.weakened_rewards]).any()


def test_weights_of_one_change_no_bit_and_weights_of_zero_take_a_token_out():
    generator = torch.Generator().manual_seed(1)
    labels, _ = draw(2, 6, 11, generator, roots=2)
    logits, ref_logits = (torch.randn(*labels.shape, 11, generator=generator) for _ in range(2))

    def loss(labels, weights=None, loss_type=("sigmoid", "sft")):
        leaf = logits.clone().requires_grad_()
        found = dpo_loss(leaf, labels, ref_logits=ref_logits, token_weights=weights, loss_type=list(loss_type)).loss
        return found.detach(), *torch.autograd.grad(found, leaf)

    ones = torch.ones(labels.shape)
    for plain, weighted in zip(loss(labels), loss(labels, ones), strict=True):
        assert torch.equal(plain, weighted)
    labels[:, 1:3] = 5  # the last of two tokens at least
    fewer, zeros = labels.clone(), ones.clone()
    fewer[:, 2], zeros[:, 2] = -100, 0.0
    for plain, weighted in zip(loss(fewer, None, ["sigmoid"]), loss(labels, zeros, ["sigmoid"]), strict=True):
        torch.testing.assert_close(weighted, plain)
    # The likelihood of the chosen responses knows no weights.
    assert torch.equal(loss(labels, zeros, ["sft"])[0], loss(labels, None, ["sft"])[0])


def test_weights_go_with_averages_with_ld_alpha_and_with_given_log_probs():
    generator = torch.Generator().manual_seed(2)
    labels, weights = draw(2, 7, 11, generator)
    logits, ref_logits = (torch.randn(*labels.shape, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    options = {"loss_type": ["mdpo"], "ld_alpha": 0.25, "average_logps": True, "beta": 0.4} | WEIGHTS
    output = dpo_loss(logits, labels, ref_logits=ref_logits, token_weights=weights, **options)
    counts = (labels[:, 1:] != -100).sum(1)
    shorter = torch.minimum(*counts[:4].chunk(2)).repeat(3)
    place = (labels[:, 1:] != -100).cumsum(1) - 1
    factors = torch.where(place < shorter[:, None], 1.0, 0.25) * weights[:, 1:].nan_to_num()
    logps, ref_logps = ((eager_token_logps(x[:, :-1], labels[:, 1:]) * factors).sum(1) for x in (logits, ref_logits))
    torch.testing.assert_close(output.loss, eager_mdpo((logps - ref_logps) / counts, beta=0.4))
    given = dpo_loss(logits, labels, ref_logps=ref_logps, token_weights=weights, **options)
    torch.testing.assert_close(given.loss, output.loss)


def test_order_of_pairs_and_parts_of_a_batch_change_nothing():
    generator = torch.Generator().manual_seed(4)
    labels, weights = draw(4, 6, 11, generator)
    token_logps, ref_token_logps = (-torch.rand(12, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = weights.nan_to_num().double()
    config = LossConfig(["mdpo", "sft"], loss_weights=[1.0, 0.3], ld_alpha=0.5)

    def loss(pairs, batch=None):
        rows = torch.cat([pairs, pairs + 4, pairs + 8])
        mask = (labels != -100)[rows]
        places = torch.arange(len(rows))[:, None] % len(pairs)
        responses = Responses(lambda x: x.sum(1), lambda: (mask.cumsum(1) - 1, places), mask.sum(1))
        logps, ref_logps, factors = (x[rows] * mask for x in (token_logps, ref_token_logps, weights))
        return token_preference(
            logps, responses, config, ref_token_logps=ref_logps, token_weights=factors, batch=batch
        ).loss

    whole = loss(torch.arange(4))
    torch.testing.assert_close(loss(torch.tensor([2, 0, 3, 1])), whole)
    batch = Batch(num_pairs=4, num_chosen_tokens=int((labels[:4] != -100).sum()))
    torch.testing.assert_close(loss(torch.tensor([3]), batch) + loss(torch.tensor([0, 1, 2]), batch), whole)


@pytest.mark.parametrize("loss_type", ["mdpo", "sigmoid"])
def test_both_compile_without_graph_break(loss_type):
    generator = torch.Generator().manual_seed(5)
    labels, weights = draw(2, 5, 11, generator, roots=3 if loss_type == "mdpo" else 2)
    logits, ref_logits = (torch.randn(*labels.shape, 11, generator=generator) for _ in range(2))

    def function(x):
        return dpo_loss(x, labels, ref_logits=ref_logits, token_weights=weights, loss_type=loss_type).loss

    results = []
    for candidate in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        loss = candidate(leaf)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)
