"""Attention over packed sequences whose branches share a prefix, registered with transformers as `bpo_fast_packed`.

The model's own modules call it through transformers' attention interface; the `Packing` reaches it as the keyword
argument `packing`. Without one (generation, an unpacked forward) it is transformers' SDPA attention, so a model can
keep this implementation switched on for its whole life. Some decoders drop the keyword on its way, and some layers
call no attention: `counted_attention` tells a packed forward what its layers did.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bpo_fast.models.flash import choose_backend, flash_attention
from bpo_fast.models.last_layer import in_place_of_all, last_layer_of
from bpo_fast.models.packing import Packing
from bpo_fast.ops.gather_rows import gather_rows
from bpo_fast.ops.precision import autocast_dtype

ATTENTION_NAME = "bpo_fast_packed"

# Tensors among an attention's keyword arguments that change nothing here: the packing has the positions.
_POSITIONS = {"position_ids", "cache_position"}


@dataclass
class AttentionCalls:
    """What the attention layers of one packed forward were given.

    Attributes:
        packed: calls with the packing.
        unpacked: calls without it, which saw the whole packed sequence.
        ignored: keyword arguments that packed attention does not compute with, such as the sinks of GPT-OSS (`s_aux`).
    """

    packed: int = 0
    unpacked: int = 0
    ignored: set[str] = field(default_factory=set)


# Of this thread's forward alone. What a backward pass recomputes comes after the forward and is not counted again.
_CALLS: ContextVar[AttentionCalls | None] = ContextVar("bpo_fast_attention_calls", default=None)


@contextmanager
def counted_attention() -> Iterator[AttentionCalls]:
    """Counts the attention calls of a packed forward that runs in the block."""
    calls = AttentionCalls()
    token = _CALLS.set(calls)
    try:
        yield calls
    finally:
        _CALLS.reset(token)


def _sdpa_segments(query, key, value, packing, scaling, lengths):
    """query [1, heads, T, D], key and value [1, kv_heads, S, D] -> [1, heads, T, D], segment by segment.

    The queries of a segment, as many as `lengths` says, are at the end of its keys.

    The keys are cut by `split`, whose backward is one concatenation; each slice would write a gradient of the whole
    sequence.
    """
    groups = list(zip(packing.prefix_lengths, packing.branch_lengths, strict=True))
    pieces = [n for p, b in groups for n in (p, *b)]
    keys, values = key.split(pieces, dim=2), value.split(pieces, dim=2)
    queries = iter(query.split(lengths, dim=2))
    grouped = query.shape[1] != key.shape[1]
    outputs, piece = [], 0
    for branches in packing.branch_lengths:
        prefix = piece
        for _ in branches:
            piece += 1
            q = next(queries)
            k = torch.cat([keys[prefix], keys[piece]], dim=2)
            v = torch.cat([values[prefix], values[piece]], dim=2)
            mask = None
            if q.shape[2] < k.shape[2]:
                mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=k.device)
                mask = mask.tril(k.shape[2] - q.shape[2])
            outputs.append(
                F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
                )
            )
        piece += 1
    return torch.cat(outputs, dim=2)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    *,
    scaling: float | None = None,
    deterministic: bool = False,
    only_tail: bool = False,
) -> Tensor:
    """Causal attention of one packed sequence: every branch sees its prefix and itself.

    Args:
        query: [1, heads, S, D].
        key, value: [1, kv_heads, S, D]; heads is a multiple of kv_heads.
        packing: of the S tokens.
        scaling: factor of the scores, 1 / sqrt(D) by default.
        deterministic: have the same bits of the gradients in every run on a GPU too, for some time and memory.
        only_tail: compute the queries of `packing.tail_rows` alone; the others' rows are 0.

    Returns:
        [1, S, heads, D], as transformers' attention functions give it; under autocast in its dtype.

    Raises:
        ValueError: the batch is not one sequence, or S is not the packing's.

    Example:
        >>> from bpo_fast.models.packing import Group, pack
        >>> q = torch.randn(1, 2, 5, 8)
        >>> packed_attention(q, q, q, pack([Group([1, 2], [[3], [4, 5]])])).shape
        torch.Size([1, 5, 2, 8])
    """
    length = len(packing.input_ids)
    if query.shape[0] != 1 or query.shape[2] != length:
        raise ValueError(
            f"query: found shape {tuple(query.shape)}, expected [1, heads, {length}, D], as its packing has; "
            "pass the packed sequence alone, without a cache."
        )
    # Under autocast rotary angles make queries and keys float32 beside 16-bit values.
    query, key, value = (x.to(autocast_dtype(x)) for x in (query, key, value))
    backend, _ = choose_backend(query.device, query.dtype, query.shape[-1], deterministic)
    lengths = packing.segment_lengths(in_tail=only_tail)
    if only_tail:
        query = query.index_select(2, packing.tail_rows)
    if backend == "sdpa":
        # SDPA's fused kernels add up by atomics on a GPU; plain products do not.
        plain = deterministic and query.is_cuda
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            out = _sdpa_segments(query, key, value, packing, scaling, lengths).transpose(1, 2)
    else:
        query, key, value = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        key, value = (gather_rows(x, packing.kv_index, packing.kv_rounds) for x in (key, value))
        cu_seqlens_q = packing.cu_seqlens_tail if only_tail else packing.cu_seqlens_q
        bounds = (cu_seqlens_q, packing.cu_seqlens_k, max(lengths), packing.max_seqlen_k)
        out = flash_attention(backend, query, key, value, bounds, scaling=scaling, deterministic=deterministic)[None]
    return in_place_of_all(out, packing.tail_rows, length) if only_tail else out


def check_reach(name: str, reach: int | None, packing: Packing) -> None:
    """Refuse sequences longer than what packed attention, or a position, computes alike for short and long ones.

    Args:
        name: of the model's setting.
        reach: most positions; None for no bound.
        packing: of the sequences.

    Raises:
        ValueError: the longest sequence has more positions.
    """
    if reach is not None and reach < packing.max_seqlen_k:
        raise ValueError(
            f"{name}: found {reach}, expected None or at least the {packing.max_seqlen_k} positions of the longest "
            "sequence; lower max_length."
        )


def packed_attention_forward(
    module,
    query,
    key,
    value,
    attention_mask,
    *,
    scaling=None,
    dropout=0.0,
    packing: Packing | None = None,
    deterministic_attention: bool = False,
    **kwargs,
):
    """The attention function that transformers calls; see `packed_attention`. Without `packing`, plain SDPA."""
    calls = _CALLS.get()
    if calls is not None:
        calls.packed += packing is not None
        calls.unpacked += packing is None
        tensors = (name for name, value in kwargs.items() if isinstance(value, Tensor))
        calls.ignored.update(name for name in tensors if name not in _POSITIONS)
    last = last_layer_of(module)
    if last is not None:
        last.packing = packing
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if dropout:
        raise ValueError(
            f"attention_dropout: found {dropout}, expected 0; preference training compares log-probs of one "
            "policy, so set config.attention_dropout = 0."
        )
    check_reach("sliding_window", kwargs.get("sliding_window"), packing)
    if kwargs.get("softcap") is not None:
        raise ValueError(
            f"softcap: found {kwargs['softcap']} on the attention scores, expected None; packed attention does not "
            "compute capped scores."
        )
    options = {"scaling": scaling, "deterministic": deterministic_attention, "only_tail": last is not None}
    return packed_attention(query, key, value, packing, **options), None


AttentionInterface.register(ATTENTION_NAME, packed_attention_forward)
# Unpacked calls fall through to SDPA and so need its mask. A packed forward passes a ready 4-D mask, which
# transformers hands on as it is, and no [S, S] mask is ever made.
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
