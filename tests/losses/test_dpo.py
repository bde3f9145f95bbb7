import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction
from numerics import assert_within_contract, draw_targets, eager_statistics, eager_token_logps, final_logits

from bpo_fast import PreferenceOutput, dpo_loss, linear_dpo_loss, preference_loss

LOSS_TYPES = ["hinge", "ipo", "sigmoid"]


def eager_loss(logits, ref_logits, labels, loss_type, beta, label_smoothing=0.0, average_logps=False):
    """The definitions written out on full logits, with the copies that the shift makes."""
    targets = labels[:, 1:]
    lengths = (targets != -100).sum(1).clamp(min=1)
    logratios = eager_token_logps(logits[:, :-1], targets).sum(1)
    if ref_logits is not None:
        logratios = logratios - eager_token_logps(ref_logits[:, :-1], targets).sum(1)
    if average_logps or loss_type == "ipo":
        logratios = logratios / lengths
    chosen, rejected = logratios.chunk(2)
    delta = chosen - rejected
    if loss_type == "hinge":
        return torch.relu(1 - beta * delta).mean()
    if loss_type == "ipo":
        return ((delta - 1 / (2 * beta)) ** 2).mean()
    return (-(1 - label_smoothing) * F.logsigmoid(beta * delta) - label_smoothing * F.logsigmoid(-beta * delta)).mean()


@pytest.mark.parametrize(
    ("loss_type", "margin"), [("sigmoid", 0.0), ("sigmoid", -3.0), ("hinge", 4.0), ("hinge", 20.0)]
)
def test_preference_loss_agrees_with_liger(loss_type, margin):
    # Liger's mean over one pair is that pair's loss.
    values = torch.tensor([-10.0 + margin, -12.0, -9.0, -11.0]).split(1)
    target = torch.zeros(2, 4)
    expected, _, _ = LigerFusedLinearDPOFunction.preference_loss_fn(
        values[0], values[1], target, values[2], values[3], beta=0.1, loss_type=loss_type
    )
    torch.testing.assert_close(preference_loss(*values, beta=0.1, loss_type=loss_type), expected[None])


@pytest.mark.parametrize(
    ("loss_type", "label_smoothing", "expected"),
    [
        # beta d = 0.5 * ((-1 + 2) - (-4 + 3)) = 1
        ("sigmoid", 0.0, math.log1p(math.exp(-1))),
        ("sigmoid", 0.2, 0.8 * math.log1p(math.exp(-1)) + 0.2 * math.log1p(math.exp(1))),
        ("hinge", 0.0, 0.0),
        ("ipo", 0.0, (2 - 1) ** 2),
    ],
)
def test_preference_loss_by_hand(loss_type, label_smoothing, expected):
    values = (torch.tensor([value], dtype=torch.float64) for value in (-1.0, -4.0, -2.0, -3.0))
    loss = preference_loss(*values, beta=0.5, loss_type=loss_type, label_smoothing=label_smoothing)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def draw_labels(shape, vocab_size, generator, ignored=0.3):
    """Labels with a response token at position 1 at least: a sequence without one is refused."""
    labels = draw_targets(shape, vocab_size, generator, ignored)
    labels[:, 1].clamp_(min=0)
    return labels


# A loss is one number, and so plain PyTorch's error of one may be next to nothing by luck: a draw is of several.
LOSSES_A_DRAW = 8


@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    num_pairs=st.integers(1, 3),
    num_tokens=st.sampled_from([2, 3, 7]),
    vocab_size=st.sampled_from([2, 127, 2053]),
    scale=st.sampled_from([1.0, 30.0]),
    loss_type=st.sampled_from(LOSS_TYPES),
    with_reference=st.booleans(),
    average_logps=st.booleans(),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_dpo_loss_within_contract(
    dtype, num_pairs, num_tokens, vocab_size, scale, loss_type, with_reference, average_logps, ignored, seed
):
    generator = torch.Generator().manual_seed(seed)
    shape = (2 * num_pairs, num_tokens, vocab_size)
    options = {"beta": 0.1, "loss_type": loss_type, "label_smoothing": 0.1 if loss_type == "sigmoid" else 0.0}
    losses, gradients = [], []
    for _ in range(LOSSES_A_DRAW):
        logits, ref_logits = ((torch.randn(shape, generator=generator) * scale).to(dtype) for _ in range(2))
        ref_logits = ref_logits if with_reference else None
        labels = draw_labels(shape[:2], vocab_size, generator, ignored)

        def eager(leaf, reference, labels=labels):
            return eager_loss(leaf, reference, labels, average_logps=average_logps, **options)

        def ours(leaf, reference, labels=labels):
            output = dpo_loss(leaf, labels, ref_logits=reference, average_logps=average_logps, **options)
            assert output.token_logps.shape == (2 * num_pairs, num_tokens - 1)
            return output.loss

        found = []
        for function, cast in ((ours, dtype), (eager, dtype), (eager, torch.float64)):
            leaf = logits.to(cast, copy=True).requires_grad_()
            loss = function(leaf, None if ref_logits is None else ref_logits.to(cast))
            found.append((loss, torch.autograd.grad(loss, leaf)[0]))
        losses.append([loss for loss, _ in found])
        gradients.append([gradient for _, gradient in found])
    for results in (losses, gradients):
        assert_within_contract(*map(torch.stack, zip(*results, strict=True)))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("reference", ["hidden", "logps", "none"])
def test_linear_dpo_loss_is_dpo_loss_of_its_logits(loss_type, reference):
    generator = torch.Generator().manual_seed(1)
    hidden, ref_hidden = (torch.randn(4, 6, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    head, bias = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((31, 8), (31,)))
    labels = draw_targets((4, 6), 31, generator)
    given = {
        "hidden": ({"ref_hidden": ref_hidden}, {"ref_logits": 4 * torch.tanh((ref_hidden @ head.t() + bias) / 4)}),
        "logps": ({"ref_logps": torch.arange(-9.0, -5.0)}, {"ref_logps": torch.arange(-9.0, -5.0)}),
        "none": ({}, {}),
    }[reference]
    leaves = [x.clone().requires_grad_() for x in (hidden, head, bias)]
    ours = linear_dpo_loss(
        leaves[0], leaves[1], labels, lm_head_bias=leaves[2], logit_softcap=4.0, loss_type=loss_type, **given[0]
    )
    grads = torch.autograd.grad(ours.loss, leaves)
    logits = 4 * torch.tanh((leaves[0] @ leaves[1].t() + leaves[2]) / 4)
    other = dpo_loss(logits, labels, loss_type=loss_type, **given[1])
    torch.testing.assert_close(ours.loss, other.loss)
    for grad, expected in zip(grads, torch.autograd.grad(other.loss, leaves), strict=True):
        torch.testing.assert_close(grad, expected)
    for name in ("chosen_logps", "rejected_logps", "chosen_rewards", "rejected_rewards", "token_logps"):
        torch.testing.assert_close(getattr(ours, name), getattr(other, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_policy_equal_to_reference_gives_ln_2_and_margins_of_exactly_zero(dtype):
    logits = torch.randn(6, 9, 1003).to(dtype)
    hidden, head = torch.randn(6, 9, 16).to(dtype), torch.randn(1003, 16).to(dtype)
    labels = torch.randint(0, 1003, (6, 9))
    for output in (
        dpo_loss(logits.requires_grad_(), labels, ref_logits=logits.detach().clone()),
        linear_dpo_loss(hidden.requires_grad_(), head, labels, ref_hidden=hidden.detach().clone()),
    ):
        assert output.metrics()["rewards/margins"] == 0
        assert torch.equal(output.chosen_rewards, torch.zeros(3))
        assert output.loss.item() == pytest.approx(math.log(2), abs=1e-7)
        assert output.loss.requires_grad


def test_loss_leaves_ln_2_when_trained():
    torch.manual_seed(0)
    hidden, head = torch.randn(4, 8, 16), torch.randn(50, 16)
    labels = torch.randint(0, 50, (4, 8))
    adapted = hidden.clone().requires_grad_()
    optimizer = torch.optim.SGD([adapted], lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        output = linear_dpo_loss(adapted, head, labels, ref_hidden=hidden)
        output.loss.backward()
        optimizer.step()
    assert output.loss < 0.6
    assert output.metrics()["rewards/accuracies"] == 1.0


def test_reference_log_probs_given_or_computed_are_the_same():
    logits, ref_logits = torch.randn(4, 7, 99), torch.randn(4, 7, 99)
    labels = draw_targets((4, 7), 99, torch.Generator().manual_seed(0))
    computed = dpo_loss(ref_logits, labels)
    ref_logps = torch.cat([computed.chosen_logps, computed.rejected_logps])
    live = dpo_loss(logits, labels, ref_logits=ref_logits)
    cached = dpo_loss(logits, labels, ref_logps=ref_logps)
    assert torch.equal(live.loss, cached.loss)
    assert torch.equal(live.chosen_rewards, cached.chosen_rewards)


@pytest.mark.parametrize("loss", ["dpo_loss", "linear_dpo_loss"])
def test_temperature_cap_adapter_and_statistics_reach_the_loss(loss):
    generator = torch.Generator().manual_seed(5)
    shapes = ((4, 6, 8), (4, 6, 8), (31, 8), (3, 8), (31, 3))
    hidden, ref_hidden, head, lora_A, lora_B = (
        torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes
    )
    labels = draw_targets((4, 6), 31, generator)
    transform = {"logit_softcap": 4.0, "temperature": 0.6}
    adapted = hidden @ head.t() + 0.5 * hidden @ lora_A.t() @ lora_B.t()
    if loss == "dpo_loss":
        leaf = adapted.clone().requires_grad_()
        output = dpo_loss(leaf, labels, ref_logits=ref_hidden @ head.t(), with_statistics=True, **transform)
    else:
        leaf = lora_B.clone().requires_grad_()
        lora = {"lm_head_lora": (lora_A, leaf, 0.5)}
        output = linear_dpo_loss(
            hidden, head, labels, ref_hidden=ref_hidden, with_statistics=True, **transform, **lora
        )
        adapted = hidden @ head.t() + 0.5 * hidden @ lora_A.t() @ leaf.t()
    logits = final_logits(leaf if loss == "dpo_loss" else adapted, **transform)
    expected = eager_loss(logits, final_logits(ref_hidden @ head.t(), **transform), labels, "sigmoid", 0.1)
    torch.testing.assert_close(output.loss, expected)
    for found, wanted in zip(torch.autograd.grad(output.loss, leaf), torch.autograd.grad(expected, leaf), strict=True):
        torch.testing.assert_close(found, wanted)
    statistics = eager_statistics(logits.detach()[:, :-1], labels[:, 1:])
    torch.testing.assert_close(torch.stack(tuple(output.statistics)), statistics)
    assert output.metrics()["entropy"] == pytest.approx((statistics[0].sum() / (labels[:, 1:] != -100).sum()).item())


def test_the_gradient_takes_the_place_of_the_logits_where_allowed():
    logits, ref_logits, labels = torch.randn(2, 5, 9), torch.randn(2, 5, 9), torch.randint(0, 9, (2, 5))
    grads = []
    for inplace_backward in (False, True):
        leaf = logits.clone().requires_grad_()
        output = dpo_loss(leaf, labels, ref_logits=ref_logits, inplace_backward=inplace_backward)
        grads.append(torch.autograd.grad(output.loss, leaf)[0])
        assert (grads[-1].data_ptr() == leaf.data_ptr()) == inplace_backward
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_repeatable(dtype):
    generator = torch.Generator().manual_seed(3)
    hidden, ref_hidden = (torch.randn(4, 40, 24, generator=generator).to(dtype) for _ in range(2))
    head = torch.randn(1003, 24, generator=generator).to(dtype)
    labels = draw_targets((4, 40), 1003, generator)

    def results(x, weight):
        outputs = (
            linear_dpo_loss(x, weight, labels, ref_hidden=ref_hidden, with_statistics=True),
            dpo_loss(x @ weight.t(), labels, ref_logits=ref_hidden @ head.t(), loss_type=["sigmoid", "sft", "aot"]),
        )
        grads = [torch.autograd.grad(output.loss, (x, weight)) for output in outputs]
        return [*(output.loss for output in outputs), *grads[0], *grads[1], *outputs[0].statistics]

    first, second = (results(hidden.clone().requires_grad_(), head.clone().requires_grad_()) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_no_gradient_goes_to_the_reference():
    logits, ref_logits = torch.randn(2, 4, 9, requires_grad=True), torch.randn(2, 4, 9, requires_grad=True)
    labels = torch.randint(0, 9, (2, 4))
    dpo_loss(logits, labels, ref_logits=ref_logits).loss.backward()
    assert logits.grad.any()
    assert ref_logits.grad is None


def test_average_touches_the_loss_but_not_rewards():
    logits, labels = torch.randn(2, 5, 9), torch.tensor([[-100, 1, 2, 3, 4], [-100, -100, -100, 3, 4]])
    total, average = (dpo_loss(logits, labels, beta=0.5, average_logps=flag) for flag in (False, True))
    assert torch.equal(total.chosen_rewards, average.chosen_rewards)
    delta = total.chosen_logps / 4 - total.rejected_logps / 2
    torch.testing.assert_close(average.loss, -F.logsigmoid(0.5 * delta).mean())


def test_labels_are_at_the_positions_of_their_tokens():
    # Position 0 predicts the token at position 1; the label at position 0 and the logits of the last are not used.
    logits = torch.zeros(2, 3, 4)
    logits[0, 0, 2] = 5.0
    logits[:, 2] = float("nan")
    labels = torch.tensor([[3, 2, -100], [3, -100, 1]])
    output = dpo_loss(logits, labels)
    expected = torch.tensor([[5 - math.log(math.exp(5) + 3), 0.0], [0.0, -math.log(4)]])
    torch.testing.assert_close(output.token_logps, expected)


def test_metrics():
    output = PreferenceOutput(
        torch.tensor(0.5),
        torch.tensor([-1.0, -3.0]),
        torch.tensor([-5.0, -7.0]),
        torch.tensor([0.5, 0.25]),
        torch.tensor([0.0, 0.75]),
        torch.zeros(4, 2),
        torch.ones(4, dtype=torch.int64),
    )
    assert output.metrics() == {
        "rewards/chosen": 0.375,
        "rewards/rejected": 0.375,
        "rewards/accuracies": 0.5,
        "rewards/margins": 0.0,
        "logps/chosen": -2.0,
        "logps/rejected": -6.0,
    }


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_order_of_pairs_and_padding_change_nothing(seed):
    generator = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(6, 5, 17, generator=generator), draw_labels((6, 5), 17, generator)
    output = dpo_loss(logits, labels)
    order = torch.randperm(3, generator=generator)
    rows = torch.cat([order, order + 3])
    permuted = dpo_loss(logits[rows], labels[rows])
    assert torch.equal(permuted.chosen_logps, output.chosen_logps[order])
    assert torch.equal(permuted.token_logps, output.token_logps[rows])
    padded = dpo_loss(F.pad(logits, (0, 0, 0, 4)), F.pad(labels, (0, 4), value=-100))
    torch.testing.assert_close(padded.loss, output.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(padded.rejected_logps, output.rejected_logps, rtol=1e-6, atol=1e-6)


def test_the_shift_copies_no_logits_and_half_precision_is_not_widened(monkeypatch):
    from bpo_fast.ops import rows as module

    logits, ref_logits = (torch.randn(2, 64, 4099).bfloat16() for _ in range(2))
    logits.requires_grad_()
    labels = torch.randint(0, 4099, (2, 64))
    size = logits.numel() * logits.element_size()
    monkeypatch.setattr(module, "BLOCK_BYTES", size // 8)
    with torch.profiler.profile(profile_memory=True) as profile:
        dpo_loss(logits, labels, ref_logits=ref_logits).loss.backward()
    large = [event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage >= size // 2]
    assert len(large) == 1
    assert size <= large[0] < 1.01 * size


@pytest.mark.parametrize("loss", ["dpo_loss", "linear_dpo_loss"])
def test_compiles_without_graph_break(loss):
    hidden, ref_hidden, head = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(19, 8)
    labels = torch.randint(0, 19, (2, 5))

    def from_logits(x):
        return dpo_loss(x @ head.t(), labels, ref_logits=ref_hidden @ head.t()).loss

    def from_hidden(x):
        return linear_dpo_loss(x, head, labels, ref_hidden=ref_hidden).loss

    function = {"dpo_loss": from_logits, "linear_dpo_loss": from_hidden}[loss]
    results = []
    for candidate in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaf = hidden.clone().requires_grad_()
        value = candidate(leaf)
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)
