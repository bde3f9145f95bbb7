import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_within_contract, draw_targets, eager_statistics, eager_token_logps, gradients
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bpo_fast import token_logps
from bpo_fast.ops import rows
from bpo_fast.ops import token_logps as module

HALVES_AND_FLOAT = [torch.float32, torch.bfloat16, torch.float16]


# 127 and 5003: no power of two, one below and one above a vector; 1: a vocabulary of one token has log-prob 0.
@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(HALVES_AND_FLOAT),
    shape=st.sampled_from([(), (0,), (1,), (3, 0), (2, 9), (5, 1), (2, 2, 3)]),
    vocab_size=st.sampled_from([1, 2, 127, 5003]),
    scale=st.sampled_from([1.0, 30.0, 1e4]),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    minus_infinity=st.booleans(),
    softcap=st.sampled_from([None, 5.0, 30.0]),
    temperature=st.sampled_from([1.0, 0.7]),
    inplace_backward=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_contract_against_float64(
    dtype, shape, vocab_size, scale, ignored, minus_infinity, softcap, temperature, inplace_backward, seed
):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(*shape, vocab_size, generator=generator) * scale).to(dtype)
    targets = draw_targets(shape, vocab_size, generator, ignored)
    if minus_infinity:
        removed = torch.rand(vocab_size, generator=generator) < 0.5
        removed[targets[targets != -100].unique()] = False
        logits = logits.masked_fill(removed, float("-inf"))
    upstream = torch.randn(shape, generator=generator)
    transform = {"logit_softcap": softcap, "temperature": temperature}
    found = []

    def ours_with_statistics(x):
        # In place the leaf's own values would go: the op gets a copy of them.
        x = x.clone() if inplace_backward else x
        options = {"with_statistics": True, "inplace_backward": inplace_backward}
        logps, statistics = token_logps(x, targets, **transform, **options)
        found.append(torch.stack(tuple(statistics)))
        return logps

    def eager(x):
        return eager_token_logps(x, targets, **transform)

    ours, (grad,) = gradients(ours_with_statistics, [logits], upstream)
    plain, (plain_grad,) = gradients(eager, [logits], upstream)
    exact, (exact_grad,) = gradients(eager, [logits.double()], upstream)
    assert ours.dtype == torch.float32
    assert grad.dtype == dtype
    assert_within_contract(ours, plain, exact)
    plain_statistics, exact_statistics = (eager_statistics(x, targets, **transform) for x in (logits, logits.double()))
    for position, values in enumerate(found[0]):
        if position != 1:
            assert_within_contract(values, plain_statistics[position], exact_statistics[position])
        # Two logits may tie after the cap in one precision and not in another; exact ties have a test of their own.
        elif softcap is None:
            assert torch.equal(values.double(), exact_statistics[position])
    # Rows that are ignored have a gradient of exactly 0; in plain PyTorch -inf logits may make theirs NaN.
    assert not grad[targets == -100].any()
    kept = targets != -100
    assert_within_contract(grad[kept], plain_grad[kept], exact_grad[kept])


def test_target_with_probability_zero_is_minus_infinity():
    logits = torch.tensor([[0.0, float("-inf"), 1.0]], requires_grad=True)
    logps = token_logps(logits, torch.tensor([1]))
    assert logps.item() == float("-inf")
    logps.sum().backward()
    p = torch.tensor([1.0, torch.e]) / (1 + torch.e)
    torch.testing.assert_close(logits.grad, torch.tensor([[-p[0], 1.0, -p[1]]]))


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 33, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = draw_targets((2, 4), 33, generator)
    assert torch.autograd.gradcheck(lambda x: token_logps(x, targets), logits)
    assert torch.autograd.gradcheck(lambda x: token_logps(x, targets, logit_softcap=2.0, temperature=0.5), logits)


def test_gradient_of_a_nearly_certain_target_is_not_rounded_to_zero():
    # p = 1 - 2.3e-4: rounding p to bfloat16 before the subtraction from 1 would give 0.
    logits = torch.zeros(1, 100, dtype=torch.bfloat16)
    logits[0, 7] = 13.0
    logits.requires_grad_()
    token_logps(logits, torch.tensor([7])).sum().backward()
    exact = 1 - torch.softmax(logits.detach().double(), -1)[0, 7]
    assert abs(logits.grad[0, 7].double() / exact - 1) < 2**-8


def test_large_logits_keep_their_digits():
    # One unit in the last place of 1e4 is 1e-3: a saved log-sum-exp would lose the 4th digit of this log-prob.
    logits = torch.tensor([[1e4, 1e4 - 1, 1e4 - 3]])
    exact = torch.log_softmax(torch.tensor([0.0, -1.0, -3.0], dtype=torch.float64), -1)
    ours = torch.cat([token_logps(logits, torch.tensor([target])) for target in range(3)])
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)


def test_ignored_rows_are_not_read():
    logits = torch.randn(4, 11)
    logits[1] = float("nan")
    logits.requires_grad_()
    logps = token_logps(logits, torch.tensor([3, -100, 0, 10]))
    logps.sum().backward()
    assert logps.isfinite().all()
    assert logps[1] == 0
    assert logits.grad.isfinite().all()
    assert not logits.grad[1].any()


@pytest.mark.parametrize("view", ["transposed", "sliced", "expanded"])
def test_strides(view):
    base = torch.randn(6, 5, 13)
    logits = {"transposed": base.transpose(0, 1), "sliced": base[1:, ::2], "expanded": base[:1].expand(4, 5, 13)}[view]
    targets = torch.randint(0, 13, logits.shape[:-1])
    assert torch.equal(token_logps(logits, targets), token_logps(logits.contiguous(), targets))


def test_blocks_do_not_change_the_result(monkeypatch):
    logits, targets = torch.randn(3, 7, 50), torch.randint(0, 50, (3, 7))
    whole, (grad,) = gradients(lambda x: token_logps(x, targets), [logits], torch.ones(3, 7))
    monkeypatch.setattr(rows, "BLOCK_BYTES", 50 * 4)
    split, (row_grad,) = gradients(lambda x: token_logps(x, targets), [logits], torch.ones(3, 7))
    assert torch.equal(whole, split)
    assert torch.equal(grad, row_grad)


def test_bitwise_repeatable():
    logits, targets = torch.randn(40, 1009).bfloat16(), torch.randint(0, 1009, (40,))
    first, second = (gradients(lambda x: token_logps(x, targets), [logits], torch.ones(40)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1][0], second[1][0])


@pytest.mark.parametrize("dtype", [*HALVES_AND_FLOAT, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (4,), (16,), (2, 3), (0,)])
def test_the_bits_do_not_depend_on_what_else_is_asked(dtype, shape):
    # 5003: several vectors and a rest. Without a gradient few rows take PyTorch's own function, past the op.
    logits = torch.randn(*shape, 5003, generator=torch.Generator().manual_seed(1)).mul(9).to(dtype)
    targets = torch.randint(0, 5003, shape)
    found = token_logps(logits, targets)
    assert found.dtype == rows.accumulation_dtype(dtype)
    recorded = token_logps(logits.clone().requires_grad_(), targets)
    assert recorded.requires_grad
    assert not found.requires_grad
    with_statistics, _ = token_logps(logits, targets, with_statistics=True)
    beside = module.sequence_logps(logits.reshape(1, -1, 5003), logits.reshape(1, -1, 5003), targets.reshape(1, -1))
    for other in (recorded, with_statistics, beside.token_logps.reshape(shape), beside.ref_token_logps.reshape(shape)):
        assert torch.equal(found, other)
    assert torch.equal(token_logps(logits, targets.int()), found)
    with torch.no_grad():
        assert torch.equal(token_logps(logits.clone().requires_grad_(), targets), found)
    # Alone, or beside a row that is ignored, a row's bits are the same.
    if shape == (4,):
        assert torch.equal(torch.cat([token_logps(logits[i : i + 1], targets[i : i + 1]) for i in range(4)]), found)
        some = torch.where(torch.arange(4) == 2, -100, targets)
        assert torch.equal(token_logps(logits, some), torch.where(some == -100, 0, found))


def test_what_fakes_or_counts_sees_the_op():
    logits, targets = torch.randn(2, 9), torch.tensor([0, 8])
    with FakeTensorMode() as mode:
        fake = token_logps(mode.from_tensor(logits), mode.from_tensor(targets))
    assert isinstance(fake, FakeTensor)
    assert (fake.shape, fake.dtype) == ((2,), torch.float32)
    seen = []

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            seen.append(function.namespace)
            return function(*arguments, **(keywords or {}))

    with Seeing():
        token_logps(logits, targets)
    assert "bpo_fast" in seen


def test_int32_targets():
    logits, targets = torch.randn(5, 9), torch.tensor([0, 8, -100, 3, 3])
    assert torch.equal(token_logps(logits, targets.int()), token_logps(logits, targets))


def test_backward_allocates_one_buffer_and_forward_none(monkeypatch):
    logits = torch.randn(64, 4099, requires_grad=True)
    targets = torch.randint(0, 4099, (64,))
    size = logits.numel() * logits.element_size()
    monkeypatch.setattr(rows, "BLOCK_BYTES", size // 8)

    def large_allocations(function):
        with torch.profiler.profile(profile_memory=True) as profile:
            result = function()
        memory = [event.self_cpu_memory_usage for event in profile.events()]
        return result, [used for used in memory if used >= size]

    logps, forward = large_allocations(lambda: token_logps(logits, targets))
    _, backward = large_allocations(lambda: logps.sum().backward())
    assert forward == []
    assert len(backward) == 1
    copy = logits * 1
    logps = token_logps(copy, targets, inplace_backward=True)
    _, backward = large_allocations(lambda: torch.autograd.grad(logps.sum(), copy))
    assert backward == []


def test_the_gradient_lies_in_the_memory_of_the_logits_where_allowed():
    logits = torch.randn(2, 3, 11)
    targets = torch.tensor([[0, -100, 10], [2, 2, -100]])
    _, (expected,) = gradients(lambda x: token_logps(x, targets), [logits], torch.ones(2, 3))
    for view in (logits.clone(), logits.transpose(0, 1).contiguous().transpose(0, 1)):
        leaf = view.requires_grad_()
        (grad,) = torch.autograd.grad(token_logps(leaf, targets, inplace_backward=True).sum(), leaf)
        assert grad.data_ptr() == leaf.data_ptr()
        assert torch.equal(grad, expected)
    # A row that is there four times cannot hold four gradients.
    row = torch.randn(11, requires_grad=True)
    fill = torch.tensor([1, 2, 3, -100])
    grads = [
        torch.autograd.grad(token_logps(row.expand(4, 11), fill, inplace_backward=flag).sum(), row)[0]
        for flag in (True, False)
    ]
    assert torch.equal(*grads)


def test_of_equal_logits_the_first_is_the_top_one():
    logits = torch.tensor([[3.0, 1.0, 3.0]]).expand(3, 3)
    _, statistics = token_logps(logits, torch.tensor([0, 2, 1]), with_statistics=True)
    assert statistics.is_top1.tolist() == [1.0, 0.0, 0.0]


def test_entropy_of_large_logits_keeps_its_digits():
    # log s - sum p x would subtract two numbers of 1e4, which are a thousandth apart in float32.
    logits = torch.tensor([[1e4, 1e4 - 1, 1e4 - 3]])
    exact = eager_statistics(logits.double(), torch.tensor([0]))
    _, statistics = token_logps(logits, torch.tensor([0]), with_statistics=True)
    torch.testing.assert_close(statistics.entropy.double(), exact[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(statistics.log_sum_sq_probs.double(), exact[2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [(None, 1.0, False, False), (5.0, 0.7, True, True)])
@pytest.mark.parametrize("with_reference", [False, True])
def test_opcheck(with_reference, options):
    logits = torch.randn(2, 3, 7, requires_grad=True)
    reference = torch.randn(2, 3, 7) if with_reference else None
    targets = torch.tensor([[0, -100, 6], [2, 2, -100]])
    arguments = (logits, reference, targets, *options, False)
    torch.library.opcheck(module._sequence_logps, arguments)
    row_numbers = module.Outputs(*module._sequence_logps(*arguments)).row_numbers.detach()
    backward = (torch.randn(2, 3), torch.randn(2), logits.detach(), targets, row_numbers, *options[:2])
    torch.library.opcheck(module._sequence_logps_backward, backward)
    torch.library.opcheck(module._sequence_logps_backward_, backward)


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_compiles_without_graph_break(inplace_backward):
    def function(x, targets):
        return token_logps(x * 2, targets, temperature=0.5, inplace_backward=inplace_backward)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    logits, targets = torch.randn(4, 9), torch.tensor([0, -100, 8, 3])
    ours, (grad,) = gradients(lambda x: compiled(x, targets), [logits], torch.ones(4))
    eager, (eager_grad,) = gradients(lambda x: function(x, targets), [logits], torch.ones(4))
    assert torch.equal(ours, eager)
    assert torch.equal(grad, eager_grad)


INT_LOGITS = "logits: found int64 [2, 3], expected a tensor [..., V] of a floating-point dtype."
FLOAT_TARGETS = "targets: found float32 [2], expected a tensor [2] of int64 or int32."


@pytest.mark.parametrize(
    ("logits", "targets", "error", "words"),
    [
        ([1.0], torch.tensor(0), TypeError, "logits: found list, expected a tensor [..., V] of a floating-point"),
        (torch.tensor(1.0), torch.tensor(0), ValueError, "logits: found float32 [], expected [..., V]."),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), TypeError, INT_LOGITS),
        (torch.zeros(2, 3), torch.zeros(2), TypeError, FLOAT_TARGETS),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), ValueError, "targets: found int64 [3], expected [2]."),
        (
            torch.zeros(2, 0),
            torch.zeros(2, dtype=torch.int64),
            ValueError,
            "logits: found float32 [2, 0], expected [..., V] with V of at least 1.",
        ),
        (torch.zeros(2, 3), torch.tensor([0, 3]), ValueError, "targets (labels): found 3, expected 0 to 2, or -100"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), ValueError, "targets (labels): found -1, expected 0 to 2, or -100"),
        (
            torch.zeros(2, 3),
            torch.zeros(2, dtype=torch.int64, device="meta"),
            ValueError,
            "targets: found on meta, expected on cpu like logits; move",
        ),
    ],
)
def test_errors_name_the_argument(logits, targets, error, words):
    with pytest.raises(error) as caught:
        token_logps(logits, targets)
    assert words in str(caught.value)
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(("option", "value"), [("logit_softcap", 0.0), ("temperature", -1.0)])
def test_transforms_that_make_no_sense(option, value):
    with pytest.raises(ValueError, match=f"^{option}: found {value}, expected a positive number"):
        token_logps(torch.zeros(2, 3), torch.tensor([0, 1]), **{option: value})
