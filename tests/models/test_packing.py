"""Packed rows: layout by hand, every token once, row plans."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bpo_fast.models.packing import Group, pack, plan_sequences

ids = st.lists(st.integers(0, 50), min_size=1, max_size=6)
groups = st.lists(st.builds(Group, ids, st.lists(ids, min_size=1, max_size=4)), min_size=1, max_size=4)


def test_two_groups_by_hand():
    packing = pack([Group([10, 11], [[20], [30, 31]]), Group([12], [[40, 41, 42]])])
    assert packing.input_ids.tolist() == [10, 11, 20, 30, 31, 12, 40, 41, 42]
    assert packing.position_ids.tolist() == [0, 1, 2, 2, 3, 0, 1, 2, 3]
    assert packing.cu_seqlens_q.tolist() == [0, 3, 5, 9]
    assert packing.cu_seqlens_k.tolist() == [0, 3, 7, 11]
    assert packing.kv_index.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 8]
    assert packing.tail_rows.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert packing.cu_seqlens_tail.tolist() == [0, 2, 4, 8]
    assert packing.logit_rows.tolist() == [1, 1, 3, 5, 6, 7]
    assert packing.targets.tolist() == [20, 30, 31, 40, 41, 42]
    assert packing.branch_index.tolist() == [0, 1, 1, 2, 2, 2]
    assert packing.branch_offset.tolist() == [0, 0, 1, 0, 1, 2]
    assert [positions.tolist() for positions in packing.kv_rounds] == [[0, 1, 2, 7, 8, 9, 10], [3, 4, 5, 6]]
    assert [positions.tolist() for positions in packing.logit_rounds] == [[0, 3, 4, 5], [1, 2]]
    assert (packing.segment_lengths(), packing.segment_lengths(in_tail=True)) == ([3, 2, 4], [2, 2, 4])
    assert (packing.max_seqlen_k, packing.num_branches) == (4, 3)


@given(groups)
def test_every_segment_reads_as_its_own_sequence(groups):
    packing = pack(groups)
    expected = [[*group.prefix, *branch] for group in groups for branch in group.branches]
    keys = packing.kv_index.tensor_split(packing.cu_seqlens_k[1:-1].long())
    assert [packing.input_ids[rows].tolist() for rows in keys] == expected
    assert all(packing.position_ids[rows].tolist() == list(range(len(rows))) for rows in keys)
    # Queries sit at the end of their keys: what bottom-right causal alignment takes for granted.
    queries = torch.arange(len(packing.input_ids)).tensor_split(packing.cu_seqlens_q[1:-1].long())
    for rows, seen in zip(queries, keys, strict=True):
        assert seen[-len(rows) :].tolist() == rows.tolist()
    # So do those of a last layer, which are all that the head reads.
    tails = packing.tail_rows.tensor_split(packing.cu_seqlens_tail[1:-1].long())
    for rows, tail in zip(queries, tails, strict=True):
        assert rows[-len(tail) :].tolist() == tail.tolist()
    assert set(packing.logit_rows.tolist()) <= set(packing.tail_rows.tolist())
    assert [len(tail) for tail in tails] == packing.segment_lengths(in_tail=True)
    assert packing.segment_lengths() == list(map(len, queries))
    assert packing.max_seqlen_k == max(map(len, keys))
    assert len(packing.input_ids) == sum(map(len, groups))


@given(groups)
def test_rounds_part_the_gathers_without_repeats(groups):
    packing = pack(groups)
    for index, rounds in ((packing.kv_index, packing.kv_rounds), (packing.logit_rows, packing.logit_rounds)):
        assert sorted(torch.cat(rounds).tolist()) == list(range(len(index)))
        assert all(len(index[positions].unique()) == len(positions) for positions in rounds)


@given(st.lists(st.integers(1, 100), max_size=30), st.integers(100, 250))
def test_plan_keeps_the_budget_and_every_group(lengths, budget):
    rows = plan_sequences(lengths, budget)
    assert sorted(n for row in rows for n in row) == list(range(len(lengths)))
    loads = [sum(lengths[n] for n in row) for row in rows]
    assert all(load <= budget for load in loads)
    # Best fit never leaves two rows that would go into one.
    assert all(a + b > budget for i, a in enumerate(loads) for b in loads[:i])


def test_plan_without_budget_is_one_row():
    assert plan_sequences([5, 6, 7], None) == [[0, 1, 2]]
    assert plan_sequences([], None) == []


def test_plan_refuses_a_group_over_the_budget():
    with pytest.raises(ValueError, match=r"token_budget: found 10, expected at least 12, the tokens of group 1;"):
        plan_sequences([3, 12], 10)


@pytest.mark.parametrize(
    ("prefix", "branches", "message"),
    [([], [[1]], "prefix: found no tokens"), ([1], [], "branches: found none"), ([1], [[2], []], r"branches\[1\]")],
)
def test_empty_parts_are_refused(prefix, branches, message):
    with pytest.raises(ValueError, match=message):
        Group(prefix, branches)


def test_no_groups_are_refused():
    with pytest.raises(ValueError, match="groups: found none"):
        pack([])


def test_moving_keeps_every_field():
    packing = pack([Group([1, 2], [[3], [4, 5]])])
    moved = packing.to("meta")
    assert moved.kv_rounds[1].device.type == "meta"
    assert moved.targets.device.type == "meta"
    assert moved.branch_lengths == ((1, 2),)
