"""Groups of (prefix, branches) packed into one sequence that holds every token once.

A group is one image-and-question prefix and the K responses to it. Its tokens lie in the packed sequence as
`[prefix][branch 1][branch 2]...[branch K]`; a branch attends to the prefix and to itself, and its positions go on from
the prefix's end, so it computes what K separate sequences would. K = 2 is DPO, K = 1 is SFT, K = n scores a pool
of candidates. This module knows no model and no device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch

from bpo_fast.models.one_buffer import together


@dataclass(frozen=True)
class Group:
    """One prefix and the responses that share it, as token ids.

    Args:
        prefix: ids of the prompt, image placeholders included; at least one.
        branches: ids of each response; at least one branch, each of at least one token.

    Raises:
        ValueError: the prefix, the list of branches or a branch is empty.
    """

    prefix: Sequence[int]
    branches: Sequence[Sequence[int]]

    def __post_init__(self):
        if len(self.prefix) == 0:
            raise ValueError("prefix: found no tokens, expected at least one; a response needs a context.")
        if len(self.branches) == 0:
            raise ValueError("branches: found none, expected at least one response for the prefix.")
        for number, branch in enumerate(self.branches):
            if len(branch) == 0:
                raise ValueError(f"branches[{number}]: found no tokens, expected at least one; drop the response.")

    def __len__(self) -> int:
        return len(self.prefix) + sum(map(len, self.branches))


@dataclass(frozen=True)
class Packing:
    """The index tensors of one packed sequence of S tokens, G groups, C branches and N response tokens.

    A *segment* is a run of queries with one set of keys: the prefix with the first branch is one causal segment,
    each further branch is a segment of its own whose keys are the prefix and itself. With the queries of a segment at
    the end of its keys (bottom-right causal alignment), one variable-length attention call over `kv_index` is exact.

    Attributes:
        input_ids: int64 [S].
        position_ids: int64 [S]; a branch starts at its prefix's length.
        kv_index: int64 [S_kv], the position each gathered key and value comes from, segment after segment.
        cu_seqlens_q: int32 [C + 1], bounds of the segments in the packed sequence.
        cu_seqlens_k: int32 [C + 1], bounds of the segments in `kv_index`.
        kv_rounds: int64 tensors that part the positions of `kv_index` so that within one a position occurs once at
            most: round k holds the k-th segment of every group; see `ops.gather_rows`.
        tail_rows: int64 [T], the positions that a last layer's outputs are needed of: of each group the prefix's end
            and all that comes behind it. They are the last queries of their segments.
        cu_seqlens_tail: int32 [C + 1], bounds of the segments in `tail_rows`.
        logit_rows: int64 [N], the position whose hidden state predicts each response token.
        logit_rounds: int64 tensors that part the positions of `logit_rows` in the same way, by branch number.
        targets: int64 [N], the response tokens, branch after branch.
        branch_index: int64 [N], the branch each response token belongs to.
        branch_offset: int64 [N], its place within that branch.
        num_tokens: int64 [C], tokens of each branch.
        prefix_lengths: per group, tokens of the prefix.
        branch_lengths: per group, tokens of each branch.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    kv_index: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    kv_rounds: tuple[torch.Tensor, ...]
    tail_rows: torch.Tensor
    cu_seqlens_tail: torch.Tensor
    logit_rows: torch.Tensor
    logit_rounds: tuple[torch.Tensor, ...]
    targets: torch.Tensor
    branch_index: torch.Tensor
    branch_offset: torch.Tensor
    num_tokens: torch.Tensor
    prefix_lengths: tuple[int, ...]
    branch_lengths: tuple[tuple[int, ...], ...]

    @property
    def num_branches(self) -> int:
        return len(self.cu_seqlens_q) - 1

    @property
    def num_unshared_tokens(self) -> int:
        """Tokens of the branches if each had its prefix to itself."""
        return sum(p * len(b) + sum(b) for p, b in zip(self.prefix_lengths, self.branch_lengths, strict=True))

    def segment_lengths(self, *, in_tail: bool = False) -> list[int]:
        """Queries of each segment, of all or of those in `tail_rows`."""
        return [
            (1 if in_tail else prefix) + length if number == 0 else length
            for prefix, branches in zip(self.prefix_lengths, self.branch_lengths, strict=True)
            for number, length in enumerate(branches)
        ]

    @property
    def max_seqlen_k(self) -> int:
        """Keys of the longest segment, which is also the number of positions in use."""
        return max(p + max(b) for p, b in zip(self.prefix_lengths, self.branch_lengths, strict=True))

    def to(self, device, non_blocking: bool = False) -> Packing:
        """The same packing with its tensors on `device`, copied there as one."""
        return self.with_tensors(together(self.tensors(), lambda x: x.to(device, non_blocking=non_blocking)))

    def tensors(self) -> list[torch.Tensor]:
        """Its tensors, field after field."""
        values = (getattr(self, item.name) for item in fields(self) if item.name not in _ON_THE_HOST)
        return [tensor for value in values for tensor in (value if isinstance(value, tuple) else (value,))]

    def with_tensors(self, tensors: Iterable[torch.Tensor]) -> Packing:
        """The same packing with others in the place of its `tensors`, in their order."""
        rest = iter(tensors)
        found = {}
        for name in (item.name for item in fields(self)):
            value = getattr(self, name)
            if name not in _ON_THE_HOST:
                value = tuple(next(rest) for _ in value) if isinstance(value, tuple) else next(rest)
            found[name] = value
        return Packing(**found)


# Lengths that are read as numbers, which no step should have to wait for.
_ON_THE_HOST = ("prefix_lengths", "branch_lengths")


def pack(groups: Sequence[Group]) -> Packing:
    """Lay groups out in one sequence and compute its index tensors.

    Args:
        groups: at least one group.

    Raises:
        ValueError: `groups` is empty.

    Example:
        >>> packing = pack([Group(prefix=[1, 2, 3], branches=[[4, 5], [6]])])
        >>> packing.input_ids.tolist(), packing.position_ids.tolist()
        ([1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 3])
        >>> packing.logit_rows.tolist(), packing.targets.tolist()  # position 2 predicts the first of both
        ([2, 3, 2], [4, 5, 6])
        >>> packing.kv_index.tolist()  # the second segment gathers the prefix again
        [0, 1, 2, 3, 4, 0, 1, 2, 5]
    """
    if len(groups) == 0:
        raise ValueError("groups: found none, expected at least one group to pack.")
    input_ids, position_ids, kv_index, cu_seqlens_q, cu_seqlens_k = [], [], [], [0], [0]
    tail_rows, cu_seqlens_tail, logit_rows, targets, branch_index, branch_offset = [], [0], [], [], [], []
    most_branches = max(len(group.branches) for group in groups)
    kv_rounds: list[list[int]] = [[] for _ in range(most_branches)]
    logit_rounds: list[list[int]] = [[] for _ in range(most_branches)]
    for group in groups:
        prefix_start, prefix_length = len(input_ids), len(group.prefix)
        prefix_rows = range(prefix_start, prefix_start + prefix_length)
        input_ids.extend(group.prefix)
        position_ids.extend(range(prefix_length))
        for number, branch in enumerate(group.branches):
            start, length = len(input_ids), len(branch)
            input_ids.extend(branch)
            position_ids.extend(range(prefix_length, prefix_length + length))
            kv_rounds[number].extend(range(len(kv_index), len(kv_index) + prefix_length + length))
            kv_index.extend((*prefix_rows, *range(start, start + length)))
            logit_rounds[number].extend(range(len(logit_rows), len(logit_rows) + length))
            logit_rows.extend((prefix_rows[-1], *range(start, start + length - 1)))
            targets.extend(branch)
            branch_index.extend([len(cu_seqlens_q) - 1] * length)
            branch_offset.extend(range(length))
            cu_seqlens_q.append(len(input_ids))
            cu_seqlens_k.append(len(kv_index))
            tail_rows.extend(range(len(input_ids) - length - (number == 0), len(input_ids)))
            cu_seqlens_tail.append(len(tail_rows))
    return Packing(
        input_ids=torch.tensor(input_ids),
        position_ids=torch.tensor(position_ids),
        kv_index=torch.tensor(kv_index),
        cu_seqlens_q=torch.tensor(cu_seqlens_q, dtype=torch.int32),
        cu_seqlens_k=torch.tensor(cu_seqlens_k, dtype=torch.int32),
        kv_rounds=tuple(torch.tensor(positions) for positions in kv_rounds),
        tail_rows=torch.tensor(tail_rows),
        cu_seqlens_tail=torch.tensor(cu_seqlens_tail, dtype=torch.int32),
        logit_rows=torch.tensor(logit_rows),
        logit_rounds=tuple(torch.tensor(positions) for positions in logit_rounds),
        targets=torch.tensor(targets),
        branch_index=torch.tensor(branch_index),
        branch_offset=torch.tensor(branch_offset),
        num_tokens=torch.tensor([len(branch) for group in groups for branch in group.branches]),
        prefix_lengths=tuple(len(group.prefix) for group in groups),
        branch_lengths=tuple(tuple(map(len, group.branches)) for group in groups),
    )


def plan_sequences(lengths: Sequence[int], token_budget: int | None) -> list[list[int]]:
    """Assign groups to as few packed sequences as best-fit decreasing finds, none over the token budget.

    Args:
        lengths: tokens of each group, `len(group)`.
        token_budget: most tokens of a sequence; None puts all groups in one.

    Returns:
        Group numbers of each sequence, ascending; sequences are ordered by their first group, so that the plan depends
        on the lengths alone.

    Raises:
        ValueError: one group alone is over the budget.

    Example:
        >>> plan_sequences([50, 30, 40, 60], token_budget=100)
        [[0, 1], [2, 3]]
    """
    if token_budget is None:
        return [list(range(len(lengths)))] if lengths else []
    sequences: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        if lengths[number] > token_budget:
            raise ValueError(
                f"token_budget: found {token_budget}, expected at least {lengths[number]}, the tokens of group "
                f"{number}; raise the budget, or lower max_length so that responses are cut."
            )
        fitting = [n for n in range(len(sequences)) if room[n] >= lengths[number]]
        if fitting:
            best = min(fitting, key=lambda n: (room[n], n))
        else:
            best = len(sequences)
            sequences.append([])
            room.append(token_budget)
        sequences[best].append(number)
        room[best] -= lengths[number]
    return sorted(map(sorted, sequences))
