import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_within_contract, draw_targets, eager_linear_token_logps, eager_statistics, gradients

from bpo_fast import linear_token_logps
from bpo_fast.ops import head_sweep
from bpo_fast.ops import linear_token_logps as module


@pytest.fixture
def problem():
    """hidden [9, 6], weight [37, 6], bias [37], targets [9] with two ignored; float32."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((9, 6), (37, 6), (37,)))
    targets = torch.tensor([0, 36, -100, 4, 5, 36, -100, 7, 8])
    return hidden, weight, bias, targets


@pytest.fixture
def chunk_rows(monkeypatch):
    """Sets the most rows of a chunk."""
    return lambda rows: monkeypatch.setattr(head_sweep, "chunk_rows", lambda *_: rows)


# Some forty tokens: of a few, either error may be the larger by luck.
# 8209 is above WIDENED_ROWS and no multiple of anything; a scratch of one row makes as many chunks as tokens.
@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    shape=st.sampled_from([(0,), (1,), (40,), (2, 0), (2, 25)]),
    vocab_size=st.sampled_from([1, 2, 127, 8209]),
    scale=st.sampled_from([0.3, 3.0, 2000.0]),
    softcap=st.sampled_from([None, 5.0, 30.0]),
    temperature=st.sampled_from([1.0, 0.7]),
    with_bias=st.booleans(),
    with_lora=st.booleans(),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    chunk_tokens=st.sampled_from([1, 3, 1000]),
    seed=st.integers(0, 2**31),
)
def test_contract_against_float64(
    dtype, shape, vocab_size, scale, softcap, temperature, with_bias, with_lora, ignored, chunk_tokens, seed
):
    generator = torch.Generator().manual_seed(seed)
    hidden_size = 24
    # Logits of 1e4: float16 has no room for their gradients, and in float32 the error is that of the order in which a
    # product is summed, alike on average but not draw by draw; `test_logits_of_ten_thousand` bounds that.
    scale = min(scale, 3.0) if dtype != torch.bfloat16 else scale
    hidden = (torch.randn(*shape, hidden_size, generator=generator) * scale).to(dtype)
    weight = torch.randn(vocab_size, hidden_size, generator=generator).to(dtype)
    shapes = [(vocab_size,)] * with_bias + [(3, hidden_size), (vocab_size, 3)] * with_lora
    inputs = [hidden, weight] + [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]
    targets = draw_targets(shape, vocab_size, generator, ignored)
    upstream = torch.randn(shape, generator=generator)

    def options(further):
        further = list(further)
        return {
            "bias": further.pop(0) if with_bias else None,
            "lora": (*further, 0.5) if with_lora else None,
            "logit_softcap": softcap,
            "temperature": temperature,
        }

    def ours(hidden, weight, *further):
        return linear_token_logps(hidden, weight, targets, **options(further))

    def eager(hidden, weight, *further):
        return eager_linear_token_logps(hidden, weight, targets, **options(further))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_sweep, "chunk_rows", lambda *_: chunk_tokens)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_ten_thousand(dtype):
    # A product of such size has an error of some units in its last place, whoever multiplies: about 1e-3.
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(40, 24, generator=generator) * 2000).to(dtype)
    weight = torch.randn(501, 24, generator=generator).to(dtype)
    targets = torch.randint(0, 501, (40,), generator=generator)
    exact = eager_linear_token_logps(hidden.double(), weight.double(), targets)
    assert exact.abs().max() > 1e4
    assert (linear_token_logps(hidden, weight, targets) - exact).abs().max() < 4 * 2**-23 * 2e4


def test_half_precision_logits_are_not_rounded():
    # Through bfloat16 logits of about 100 the log-prob would be off by up to half a unit in the last place, 0.25.
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=generator).bfloat16() * 4
    weight = torch.randn(500, 32, generator=generator).bfloat16() * 4
    targets = torch.randint(0, 500, (64,), generator=generator)
    exact = eager_linear_token_logps(hidden.double(), weight.double(), targets)
    assert (linear_token_logps(hidden, weight, targets) - exact).abs().max() < 1e-3


def test_the_chunk_changes_nothing_beyond_rounding(problem, chunk_rows):
    *inputs, targets = problem
    results = []
    for tokens in (1, 2, 4, 1000):
        chunk_rows(tokens)
        results.append(gradients(lambda h, w, b: linear_token_logps(h, w, targets, bias=b), inputs, torch.ones(9)))
    for logps, grads in results[1:]:
        torch.testing.assert_close(logps, results[0][0], rtol=1e-6, atol=1e-6)
        for grad, first in zip(grads, results[0][1], strict=True):
            torch.testing.assert_close(grad, first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_tokens", [0, 1, 127, 128, 257, 2048, 5000])
@pytest.mark.parametrize("vocab_size", [100, 32064, 128256, 10**7])
def test_the_rule_of_chunks(num_tokens, vocab_size):
    most = head_sweep.chunk_rows(vocab_size, torch.float32, torch.device("cpu"))
    assert most % head_sweep.TILE_ROWS == 0
    assert most * vocab_size * 4 <= head_sweep.CPU_SCRATCH_BYTES or most == head_sweep.LEAST_ROWS
    chunks = head_sweep.token_chunks(num_tokens, most)
    sizes = [chunk.stop - chunk.start for chunk in chunks]
    assert [t for chunk in chunks for t in range(chunk.start, chunk.stop)] == list(range(num_tokens))
    assert len(chunks) == -(-num_tokens // most)
    assert all(size <= most and size % head_sweep.TILE_ROWS == 0 for size in sizes[:-1])
    assert sum(sizes[-1:]) <= (sizes or [0])[0]


# Multiprocessors of an A40, A100, H100 and a consumer card.
@pytest.mark.parametrize("processors", [84, 108, 132, 46])
@pytest.mark.parametrize(("num_tokens", "most", "width"), [(8192, 1280, 4096), (4001, 768, 5120), (700, 2944, 4096)])
def test_chunks_fit_the_waves_of_a_gpu(num_tokens, most, width, processors):
    def total_waves(sizes):
        # A tile is 128 x 256: counted one by one.
        return sum(-(-(-(-size // 128) * -(-width // 256)) // processors) for size in sizes)

    def sizes(chunks):
        return [chunk.stop - chunk.start for chunk in chunks]

    even = head_sweep.token_chunks(num_tokens, most)
    chunks = head_sweep.token_chunks(num_tokens, most, width, processors)
    assert [t for chunk in chunks for t in range(chunk.start, chunk.stop)] == list(range(num_tokens))
    assert all(size <= most and size % 128 == 0 for size in sizes(chunks)[:-1])
    assert total_waves(sizes(chunks)) <= total_waves(sizes(even))
    for step in range(128, most + 1, 128):
        other = [min(step, num_tokens - start) for start in range(0, num_tokens, step)]
        assert total_waves(sizes(chunks)) < total_waves(other) or len(chunks) <= len(other) or len(even) == len(chunks)


def test_chunks_of_an_h100_are_whole_waves():
    # 1,024 rows of 4,096 are 128 tiles for 132 multiprocessors; 1,280 would be 160, a second wave for 28 of them.
    found = head_sweep.token_chunks(8192, 1280, 4096, 132)
    assert [chunk.stop - chunk.start for chunk in found] == [1024] * 8


def test_statistics(problem, chunk_rows):
    hidden, weight, bias, targets = problem
    chunk_rows(2)
    options = {"logit_softcap": 3.0, "temperature": 0.6}
    logps, statistics = linear_token_logps(hidden, weight, targets, bias=bias, with_statistics=True, **options)
    logits = hidden.double() @ weight.double().t() + bias.double()
    exact = eager_statistics(logits, targets, **options)
    torch.testing.assert_close(torch.stack(tuple(statistics)).double(), exact, rtol=1e-6, atol=1e-6)
    assert torch.equal(logps, linear_token_logps(hidden, weight, targets, bias=bias, **options))
    assert not statistics.entropy.requires_grad


def test_a_tied_head_gets_both_gradients(problem):
    _, weight, _, targets = problem
    tokens = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 36])
    results = []
    for function, dtype in ((linear_token_logps, torch.float32), (eager_linear_token_logps, torch.float64)):
        embeddings = weight.to(dtype).requires_grad_()
        logps = function(torch.nn.functional.embedding(tokens, embeddings), embeddings, targets)
        results.append(torch.autograd.grad(logps.sum(), embeddings)[0])
    torch.testing.assert_close(results[0].double(), results[1], rtol=1e-5, atol=1e-6)


def test_an_adapter_of_zeros_changes_nothing_and_the_head_is_not_swept_twice(problem, monkeypatch):
    hidden, weight, _, targets = problem
    lora = (torch.randn(2, 6), torch.zeros(37, 2), 4.0)
    assert torch.equal(
        linear_token_logps(hidden, weight, targets, lora=lora), linear_token_logps(hidden, weight, targets)
    )
    made = []
    original = head_sweep.add_head_gradient_
    monkeypatch.setattr(
        head_sweep, "add_head_gradient_", lambda grad, *rest: (made.append(grad.shape), original(grad, *rest))
    )
    leaves = [lora[0].requires_grad_(), lora[1].requires_grad_()]
    linear_token_logps(hidden, weight, targets, lora=(*leaves, 4.0)).sum().backward()
    assert made == [(37, 2)]
    assert leaves[1].grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 17, 128, 200])
def test_policy_and_reference_stacked_or_not(num_tokens, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, ref_hidden = (torch.randn(2, num_tokens, 40, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(1003, 40, generator=generator).to(dtype)
    lora = (torch.randn(3, 40, generator=generator), torch.randn(1003, 3, generator=generator), 0.1)
    targets = draw_targets((2, num_tokens), 1003, generator)
    sweeps = []
    original = head_sweep._stacked_sweep
    monkeypatch.setattr(head_sweep, "_stacked_sweep", lambda *a: (sweeps.append(1), original(*a))[1])

    def both():
        leaf = hidden.clone().requires_grad_()
        found = module.linear_sequence_logps(leaf, ref_hidden, weight, targets, lora=lora)
        return [*found[:4], torch.autograd.grad(found.logps.sum(), leaf)[0]]

    stacked = both()
    assert sweeps == [1]
    same = module.linear_sequence_logps(hidden, hidden.clone(), weight, targets)
    assert torch.equal(same.token_logps, same.ref_token_logps)
    monkeypatch.setattr(head_sweep, "chunk_rows", lambda *_: 128)
    apart = both()
    assert len(sweeps) == 2
    for a, b in zip(stacked, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if a.dtype == torch.float32 else 2**-7, atol=1e-5)


def test_ignored_tokens_do_not_meet_the_head(problem, monkeypatch):
    hidden, weight, _, targets = problem
    hidden = hidden.clone()
    hidden[targets == -100] = float("nan")
    seen = []
    fill = head_sweep.fill_logits_
    monkeypatch.setattr(head_sweep, "fill_logits_", lambda out, h, w: (seen.append(len(h)), fill(out, h, w)))
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
    for name in ("times_head", "head_gradient_op"):
        original = getattr(head_sweep, name)
        monkeypatch.setattr(
            head_sweep, name, lambda *a, name=name, original=original: (calls.append(name), original(*a))[1]
        )
    linear_token_logps(hidden, weight, targets)
    with torch.no_grad():
        linear_token_logps(hidden.clone().requires_grad_(), weight, targets)
    assert calls == []
    linear_token_logps(hidden.clone().requires_grad_(), weight, targets).sum().backward()
    assert calls == ["times_head"]
    linear_token_logps(hidden, weight.clone().requires_grad_(), targets).sum().backward()
    assert calls == ["times_head", "head_gradient_op"]


def test_with_and_without_gradient_give_the_same_bits(problem):
    hidden, weight, bias, targets = problem
    with_gradient = linear_token_logps(hidden.clone().requires_grad_(), weight, targets, bias=bias)
    assert torch.equal(with_gradient.detach(), linear_token_logps(hidden, weight, targets, bias=bias))


@pytest.mark.parametrize("options", ["plain", "everything", "no targets"])
def test_opcheck(problem, options):
    hidden, weight, bias, targets = problem
    everything = options == "everything"
    leaf = hidden.clone().requires_grad_()
    low_rank, low_rank_weight = torch.randn(9, 2, requires_grad=True), torch.randn(37, 2, requires_grad=True)
    inputs = [leaf, hidden + 1 if everything else None, weight.clone().requires_grad_(everything)]
    inputs += [None if options == "no targets" else targets]
    inputs += [bias.clone().requires_grad_(), low_rank, low_rank_weight, 3.0] if everything else [None] * 4
    dense = options == "no targets"
    torch.library.opcheck(head_sweep.linear_token_logps_op, (*inputs, 0.7, True, everything, dense))
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    torch.library.opcheck(head_sweep.head_gradient_op, (torch.randn(9), detached[0], *detached[2:], 0.7, True, dense))


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
        ((None, torch.zeros(5, 3), INDICES), {}, TypeError, "hidden: found NoneType, expected a tensor [..., H]"),
        (
            (torch.zeros(2, 3), torch.zeros(5, 4), INDICES),
            {},
            ValueError,
            "weight: found float32 [5, 4], expected [V, 3].",
        ),
        (
            (torch.zeros(2, 3), torch.zeros(5, 3).half(), INDICES),
            {},
            TypeError,
            "weight: found float16, expected float32 like hidden; cast one of them.",
        ),
        ((torch.zeros(2, 3), torch.zeros(0, 3), INDICES), {}, ValueError, "weight: found V = 0, expected"),
        (
            (torch.zeros(2, 3), torch.zeros(5, 3), INDICES[:1]),
            {},
            ValueError,
            "targets: found int64 [1], expected [2].",
        ),
        ((torch.zeros(2, 3), torch.zeros(5, 3), INDICES + 5), {}, ValueError, "found 5, expected 0 to 4, or -100"),
        (
            (torch.zeros(2, 3), torch.zeros(5, 3), INDICES),
            {"bias": torch.zeros(4)},
            ValueError,
            "bias: found float32 [4], expected [5].",
        ),
        (
            (torch.zeros(2, 3), torch.zeros(5, 3), INDICES),
            {"logit_softcap": 0.0},
            ValueError,
            "logit_softcap: found 0.0, expected",
        ),
        (
            (torch.zeros(2, 3), torch.zeros(5, 3), INDICES),
            {"temperature": 0.0},
            ValueError,
            "temperature: found 0.0, expected",
        ),
        (
            (torch.zeros(2, 3), torch.zeros(5, 3), INDICES),
            {"lora": (torch.zeros(2, 3), torch.zeros(4, 2), 1.0)},
            ValueError,
            "lora's lora_B: found float32 [4, 2], expected [5, 2].",
        ),
        (
            (torch.zeros(2, 3), torch.zeros(5, 3), INDICES),
            {"lora": 1.0},
            TypeError,
            "lora: found float, expected (lora_A, lora_B",
        ),
    ],
)
def test_errors_name_the_argument(arguments, options, error, words):
    with pytest.raises(error) as caught:
        linear_token_logps(*arguments, **options)
    assert words in str(caught.value)
    assert str(caught.value).count("\n") == 0
