import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_within_contract, draw_targets, eager_linear_token_logps, gradients

from bpo_fast import linear_token_logps
from bpo_fast.ops import linear_token_logps as module


@pytest.fixture
def problem():
    """hidden [9, 6], weight [37, 6], bias [37], targets [9] with two ignored; float32."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((9, 6), (37, 6), (37,)))
    targets = torch.tensor([0, 36, -100, 4, 5, 36, -100, 7, 8])
    return hidden, weight, bias, targets


# 8209 is above WIDENED_ROWS and no multiple of anything; a scratch of one row makes as many chunks as tokens.
@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    shape=st.sampled_from([(0,), (1,), (13,), (2, 0), (2, 5)]),
    vocab_size=st.sampled_from([1, 2, 127, 8209]),
    scale=st.sampled_from([0.3, 3.0, 2000.0]),
    softcap=st.sampled_from([None, 5.0, 30.0]),
    with_bias=st.booleans(),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    chunk_tokens=st.sampled_from([1, 3, 1000]),
    seed=st.integers(0, 2**31),
)
def test_contract_against_float64(dtype, shape, vocab_size, scale, softcap, with_bias, ignored, chunk_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden_size = 24
    hidden = (torch.randn(*shape, hidden_size, generator=generator) * scale).to(dtype)
    weight = torch.randn(vocab_size, hidden_size, generator=generator).to(dtype)
    inputs = [hidden, weight] + ([torch.randn(vocab_size, generator=generator).to(dtype)] if with_bias else [])
    targets = draw_targets(shape, vocab_size, generator, ignored)
    upstream = torch.randn(shape, generator=generator)

    def ours(hidden, weight, bias=None):
        return linear_token_logps(hidden, weight, targets, bias=bias, logit_softcap=softcap)

    def eager(hidden, weight, bias=None):
        return eager_linear_token_logps(hidden, weight, targets, bias, softcap)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SCRATCH_BYTES", 4 * vocab_size * chunk_tokens)
        logps, grads = gradients(ours, inputs, upstream)
    plain, plain_grads = gradients(eager, inputs, upstream)
    exact, exact_grads = gradients(eager, [x.double() for x in inputs], upstream)
    assert logps.dtype == torch.float32
    assert_within_contract(logps, plain, exact)
    for grad, plain_grad, exact_grad in zip(grads, plain_grads, exact_grads, strict=True):
        assert grad.dtype == dtype
        assert_within_contract(grad, plain_grad, exact_grad)


def test_gradcheck(problem):
    *inputs, targets = problem
    inputs = [x.double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_token_logps(h, w, targets, bias=b, logit_softcap=2.0), inputs
    )


def test_half_precision_logits_are_not_rounded():
    # Through bfloat16 logits of about 100 the log-prob would be off by up to half a unit in the last place, 0.25.
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=generator).bfloat16() * 4
    weight = torch.randn(500, 32, generator=generator).bfloat16() * 4
    targets = torch.randint(0, 500, (64,), generator=generator)
    exact = eager_linear_token_logps(hidden.double(), weight.double(), targets)
    assert (linear_token_logps(hidden, weight, targets) - exact).abs().max() < 1e-3


def test_the_chunk_changes_nothing_beyond_rounding(problem, monkeypatch):
    *inputs, targets = problem
    results = []
    for tokens in (1, 2, 4, 1000):
        monkeypatch.setattr(module, "SCRATCH_BYTES", 4 * 37 * tokens)
        results.append(gradients(lambda h, w, b: linear_token_logps(h, w, targets, bias=b), inputs, torch.ones(9)))
    for logps, grads in results[1:]:
        torch.testing.assert_close(logps, results[0][0], rtol=1e-6, atol=1e-6)
        for grad, first in zip(grads, results[0][1], strict=True):
            torch.testing.assert_close(grad, first, rtol=1e-5, atol=1e-6)


def test_chunks_cover_all_tokens_within_the_budget():
    for num_tokens, vocab_size in ((1, 128256), (2048, 128256), (513, 128256), (7, 10**9), (0, 5)):
        chunks = module._token_chunks(num_tokens, vocab_size, 4)
        assert [t for chunk in chunks for t in range(chunk.start, chunk.stop)] == list(range(num_tokens))
        assert all(
            (c.stop - c.start) * vocab_size * 4 <= module.SCRATCH_BYTES or c.stop - c.start == 1 for c in chunks
        )


def test_ignored_tokens_do_not_meet_the_head(problem, monkeypatch):
    hidden, weight, _, targets = problem
    hidden = hidden.clone()
    hidden[targets == -100] = float("nan")
    seen = []
    fill = module._fill_logits
    monkeypatch.setattr(module, "_fill_logits", lambda out, h, w: (seen.append(len(h)), fill(out, h, w)))
    hidden.requires_grad_()
    weight = weight.clone().requires_grad_()
    logps = linear_token_logps(hidden, weight, targets)
    logps.sum().backward()
    assert seen == [7, 7]
    assert torch.equal(logps[targets == -100], torch.zeros(2))
    assert not hidden.grad[targets == -100].any()
    assert weight.grad.isfinite().all()


def test_work_that_nobody_asked_for_is_not_done(problem, monkeypatch):
    hidden, weight, _, targets = problem
    calls = []
    for name in ("_times_head", "_head_gradient"):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, name=name, original=original: (calls.append(name), original(*a))[1]
        )
    linear_token_logps(hidden, weight, targets)
    with torch.no_grad():
        linear_token_logps(hidden.clone().requires_grad_(), weight, targets)
    assert calls == []
    linear_token_logps(hidden.clone().requires_grad_(), weight, targets).sum().backward()
    assert calls == ["_times_head"]
    linear_token_logps(hidden, weight.clone().requires_grad_(), targets).sum().backward()
    assert calls == ["_times_head", "_head_gradient"]


def test_with_and_without_gradient_give_the_same_bits(problem):
    hidden, weight, bias, targets = problem
    with_gradient = linear_token_logps(hidden.clone().requires_grad_(), weight, targets, bias=bias)
    assert torch.equal(with_gradient.detach(), linear_token_logps(hidden, weight, targets, bias=bias))


@pytest.mark.parametrize("options", ["plain", "everything"])
def test_opcheck(problem, options):
    hidden, weight, bias, targets = problem
    everything = options == "everything"
    inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(everything), targets]
    inputs += [bias.clone().requires_grad_(), 3.0] if everything else [None, None]
    torch.library.opcheck(module._linear_token_logps, (*inputs, True))
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    torch.library.opcheck(module._head_gradient, (torch.randn(9), *detached))


def test_compiles_without_graph_break(problem):
    *inputs, targets = problem
    compiled = torch.compile(linear_token_logps, fullgraph=True, backend="aot_eager")
    ours = gradients(lambda h, w, b: compiled(h, w, targets, bias=b, logit_softcap=2.0), inputs, torch.ones(9))
    eager = gradients(
        lambda h, w, b: linear_token_logps(h, w, targets, bias=b, logit_softcap=2.0), inputs, torch.ones(9)
    )
    for a, b in zip([ours[0], *ours[1]], [eager[0], *eager[1]], strict=True):
        assert torch.equal(a, b)


INDICES = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((None, torch.zeros(5, 3), INDICES), {}, ValueError, "hidden must be a tensor"),
        ((torch.zeros(2, 3), torch.zeros(5, 4), INDICES), {}, ValueError, "weight must have shape [V, 3], got [5, 4]"),
        (
            (torch.zeros(2, 3), torch.zeros(5, 3).half(), INDICES),
            {},
            TypeError,
            "weight is float16 but hidden is float32",
        ),
        ((torch.zeros(2, 3), torch.zeros(0, 3), INDICES), {}, ValueError, "V = 0"),
        ((torch.zeros(2, 3), torch.zeros(5, 3), INDICES[:1]), {}, ValueError, "targets must have shape [2], got [1]"),
        ((torch.zeros(2, 3), torch.zeros(5, 3), INDICES + 5), {}, ValueError, "labels must be in [0, 5) or -100"),
        (
            (torch.zeros(2, 3), torch.zeros(5, 3), INDICES),
            {"bias": torch.zeros(4)},
            ValueError,
            "bias must have shape [5], got [4]",
        ),
        ((torch.zeros(2, 3), torch.zeros(5, 3), INDICES), {"logit_softcap": 0.0}, ValueError, "logit_softcap must be"),
    ],
)
def test_errors_name_the_argument(arguments, options, error, words):
    with pytest.raises(error) as caught:
        linear_token_logps(*arguments, **options)
    assert words in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_examples():
    assert doctest.testmod(module).failed == 0
