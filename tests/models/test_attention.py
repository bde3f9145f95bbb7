"""Packed attention against attention over each sequence by itself."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bpo_fast.models import attention, flash
from bpo_fast.models.attention import AttentionCalls, counted_attention, packed_attention, packed_attention_forward
from bpo_fast.models.flash import choose_backend
from bpo_fast.models.packing import Group, pack

lengths = st.lists(
    st.tuples(st.integers(1, 5), st.lists(st.integers(1, 4), min_size=1, max_size=5)), min_size=1, max_size=3
)


def naive_causal(q, k, v):
    """[T, heads, D] softmax attention, float64 when the inputs are; queries at the end of the keys."""
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    visible = torch.arange(len(k)) <= torch.arange(len(q))[:, None] + len(k) - len(q)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


def sequences_apart(q, k, v, packing):
    """Every (prefix + branch) on its own; rows of the prefix are the same in each and are taken from the first."""
    out = torch.empty_like(q)
    for rows in reversed(packing.kv_index.tensor_split(packing.cu_seqlens_k[1:-1].long())):
        out[rows] = naive_causal(q[rows], k[rows], v[rows])
    return out


def make(lengths, kv_heads=2, dtype=torch.float64):
    packing = pack([Group([0] * p, [[0] * n for n in branches]) for p, branches in lengths])
    generator = torch.Generator().manual_seed(len(packing.input_ids))
    shape = (1, 4, len(packing.input_ids), 8)
    q, k, v = (
        torch.randn(1, heads, *shape[2:], dtype=dtype, generator=generator).requires_grad_()
        for heads in (4, kv_heads, kv_heads)
    )
    return packing, q, k, v


def varlen_by_hand(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, enable_gqa=False):
    """What a variable-length FlashAttention with bottom-right causal alignment computes."""
    assert max_q == cu_q.diff().max()
    assert max_k == cu_k.diff().max()
    assert enable_gqa == (query.shape[1] != key.shape[1])
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    bounds = zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True)
    return torch.cat([naive_causal(query[a:b], key[c:d], value[c:d]) for a, b, c, d in bounds])


def flash_by_hand(*args, softmax_scale, causal, deterministic):
    """The same, called as FlashAttention's own packages are."""
    assert causal
    query, key = args[:2]
    return varlen_by_hand(*args, scale=softmax_scale, enable_gqa=query.shape[1] != key.shape[1])


def flash_3_of_old(*args, **kwargs):
    """As FlashAttention 3 gave it at first: with the log-sum-exp."""
    return flash_by_hand(*args, **kwargs), None


# Back end, and what stands in for its function; torch's varlen form with and without grouped heads of its own.
BACKENDS = {
    "sdpa": ("sdpa", None),
    "torch_varlen": ("torch_varlen", (varlen_by_hand, True)),
    "torch_varlen of 2.11": ("torch_varlen", (varlen_by_hand, False)),
    "flash_attn": ("flash_attn", (flash_by_hand, "")),
    "flash_attn_3": ("flash_attn_3", (flash_3_of_old, "")),
}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("case", BACKENDS)
@pytest.mark.parametrize("deterministic", [False, True])
@settings(max_examples=8, deadline=None)
@given(lengths=lengths)
def test_equals_sequences_apart_with_gradients(case, deterministic, kv_heads, lengths):
    backend, function = BACKENDS[case]
    packing, q, k, v = make(lengths, kv_heads)
    rows = [x[0].transpose(0, 1) for x in (q, k, v)]
    rows[1:] = [x.repeat_interleave(4 // kv_heads, dim=1) for x in rows[1:]]
    expected = sequences_apart(*rows, packing)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "choose_backend", lambda *_: (backend, "the test says so"))
        patch.setattr(flash, "torch_varlen", lambda: function)
        patch.setattr(flash, "flash_function", lambda name: function)
        out = packed_attention(q, k, v, packing, scaling=1 / math.sqrt(8), deterministic=deterministic)
        torch.testing.assert_close(out[0], expected, rtol=1e-10, atol=1e-10)
        weights = torch.randn_like(expected)
        ours = torch.autograd.grad((out[0] * weights).sum(), (q, k, v))
        tail = packed_attention(q, k, v, packing, deterministic=deterministic, only_tail=True)
        read = torch.zeros(len(weights), 1, 1).index_fill(0, packing.tail_rows, 1.0)
        torch.testing.assert_close(tail[0], read * expected, rtol=1e-10, atol=1e-10)
        ours_of_tail = torch.autograd.grad((tail[0] * weights).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weights).sum(), (q, k, v), retain_graph=True)
    theirs_of_tail = torch.autograd.grad((expected * weights * read).sum(), (q, k, v))
    for mine, reference in zip((*ours, *ours_of_tail), (*theirs, *theirs_of_tail), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-10)


def test_branches_do_not_see_each_other():
    packing, q, k, v = make([(3, [2, 2])])
    out = packed_attention(q, k, v, packing)
    (grad,) = torch.autograd.grad(out[0, 5:].sum(), v)  # rows 5, 6 are the second branch
    assert grad[0, :, 3:5].abs().max() == 0
    assert grad[0, :, :3].abs().min() > 0


def test_a_row_of_the_wrong_length_is_refused():
    packing, q, k, v = make([(3, [2])])
    with pytest.raises(ValueError, match=r"query: found shape \(1, 4, 4, 8\), expected \[1, heads, 5, D\]"):
        packed_attention(q[:, :, :4], k[:, :, :4], v[:, :, :4], packing)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, "attention_dropout: found 0.1"),
        ({"sliding_window": 4}, "sliding_window: found 4, expected None or at least the 5 positions"),
        ({"softcap": 50.0}, "softcap: found 50.0"),
    ],
)
def test_what_cannot_be_computed_is_refused(options, message):
    packing, q, k, v = make([(3, [2])])
    with pytest.raises(ValueError, match=message):
        packed_attention_forward(torch.nn.Module(), q, k, v, None, packing=packing, **options)


def test_calls_are_counted_in_the_block_and_thread_of_their_forward():
    packing, q, k, v = make([(3, [2])], kv_heads=4)
    module = torch.nn.Module()

    def call(**options):
        packed_attention_forward(module, q, k, v, None, **options)

    with counted_attention() as outer:
        call(packing=packing, position_ids=packing.position_ids)
        with counted_attention() as inner:
            call(packing=packing, s_aux=torch.zeros(4), cu_seqlens=7)
        call()
        with ThreadPoolExecutor() as pool:
            pool.submit(call, packing=packing).result()
    call(packing=packing)
    assert outer == AttentionCalls(packed=1, unpacked=1)
    assert inner == AttentionCalls(packed=1, ignored={"s_aux"})


def test_counting_ends_with_an_error():
    packing, q, k, v = make([(3, [2])], kv_heads=4)
    with pytest.raises(ValueError, match="softcap"), counted_attention() as calls:
        packed_attention_forward(torch.nn.Module(), q, k, v, None, packing=packing, softcap=3.0)
    packed_attention_forward(torch.nn.Module(), q, k, v, None, packing=packing)
    assert calls.packed == 1


def test_under_autocast_all_of_attention_is_in_its_dtype(monkeypatch):
    # Rotary angles leave queries and keys of a float32 or float16 model in float32; values come of a linear.
    packing, q, k, v = make([(7, [3, 2])], dtype=torch.float32)
    v = v.detach().to(torch.bfloat16).requires_grad_()
    seen = []

    def choose(device, dtype, head_dim, deterministic):
        seen.append(dtype)
        return "torch_varlen", "the test says so"

    def function(query, key, value, *bounds, **options):
        seen.extend(x.dtype for x in (query, key, value))
        return varlen_by_hand(*(x.double() for x in (query, key, value)), *bounds, **options).to(query.dtype)

    monkeypatch.setattr(attention, "choose_backend", choose)
    monkeypatch.setattr(flash, "torch_varlen", lambda: (function, True))
    with torch.autocast("cpu", torch.bfloat16):
        out = packed_attention(q, k, v, packing)
    assert seen == [torch.bfloat16] * 4
    assert out.dtype == torch.bfloat16
    rows = [x[0].transpose(0, 1).double() for x in (q, k, v)]
    rows[1:] = [x.repeat_interleave(2, dim=1) for x in rows[1:]]
    torch.testing.assert_close(out[0].double(), sequences_apart(*rows, packing), rtol=2e-2, atol=2e-2)
    grads = torch.autograd.grad(out.float().sum(), (q, k, v))
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32, torch.bfloat16]


@pytest.mark.gpu("FlashAttention")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU for variable-length FlashAttention")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flash_equals_sdpa_on_a_gpu(kv_heads):
    packing, q, k, v = make([(130, [40, 7, 90]), (64, [1, 33])], kv_heads, dtype=torch.float32)
    q, k, v = (
        torch.nn.functional.pad(x.detach(), (0, 56)).to("cuda", torch.bfloat16).requires_grad_() for x in (q, k, v)
    )
    assert choose_backend("cuda")[0] != "sdpa"
    packing = packing.to("cuda")
    out = packed_attention(q, k, v, packing, scaling=0.3)
    expected = packed_attention(q.float(), k.float(), v.float(), packing, scaling=0.3)
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((out.float() * weights).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    again = torch.autograd.grad((packed_attention(q, k, v, packing, scaling=0.3).float() * weights).sum(), (k, v))
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.float(), reference.float(), rtol=5e-2, atol=5e-2)
    assert torch.equal(ours[1], again[0])
    assert torch.equal(ours[2], again[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU for variable-length FlashAttention")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_deterministic_gradients_have_the_same_bits_in_every_run_on_a_gpu(kv_heads, dtype):
    packing, q, k, v = make([(700, [300, 200]), (640, [100, 330])], kv_heads, dtype=torch.float32)
    q, k, v = (torch.nn.functional.pad(x.detach(), (0, 56)).to("cuda", dtype).requires_grad_() for x in (q, k, v))
    packing = packing.to("cuda")
    weights = torch.randn(1, q.shape[2], 4, 64, device="cuda")

    def gradients():
        out = packed_attention(q, k, v, packing, deterministic=True)
        return torch.autograd.grad((out.float() * weights).sum(), (q, k, v))

    first = gradients()
    for _ in range(10):
        for mine, reference in zip(gradients(), first, strict=True):
            assert torch.equal(mine, reference)
    assert not torch.are_deterministic_algorithms_enabled()
