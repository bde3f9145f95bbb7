"""The reference's log-probs of every pair, kept: a step then runs the model once, with its adapter."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from bpo_fast.runs.tensor_cache import ENTRY_BYTES, TensorCache
from bpo_fast.train.cache_keys import ExampleKeys
from bpo_fast.train.check_pairs import each_row, workers_for
from bpo_fast.train.collator import PackedSequence, PreferenceCollator
from bpo_fast.train.examples import Examples

# Pairs that are collated together, and tokens of a packed sequence of them where the training has no budget of its
# own: enough that products bind the pass, which without gradients keeps one layer's activations at a time.
_PAIRS = 16
_TOKENS = 8192


def reference_items(keys: Sequence[Sequence[ExampleKeys]]) -> dict[tuple[str], tuple[int, int]]:
    """The pairs of all data sets, each once: (pair,) -> (data set, place) of an example."""
    found = {}
    for number, each in enumerate(keys):
        for place, example in enumerate(each):
            found.setdefault((example.pair,), (number, place))
    return found


def fill_reference(
    tensors: TensorCache,
    items: dict[tuple[str], tuple[int, int]],
    datasets: Sequence[Examples],
    collator: PreferenceCollator,
    compute: Callable[[PackedSequence], torch.Tensor],
    *,
    report: Callable[[str], object],
    progress: bool,
) -> None:
    """Compute the log-probs that are missing, many pairs at a time, packed to a token budget.

    Args:
        tensors: loaded with all keys of `items`.
        items: of `reference_items`.
        datasets: that the items name; features are read where they are kept.
        collator: of the training.
        compute: a packed sequence -> fp32 [N], the reference's log-probs of its tokens.
        report, progress: as those of `TensorCache.fill`.

    Raises:
        ValueError: there is no room for them on the disk.
    """
    keys, sources = list(items), list(items.values())
    collator = replace(collator, references=None)
    chunk_size = _PAIRS
    if collator.token_budget is None and collator.max_length is None:
        chunk_size = 1  # how long a pair is, nothing says
    elif collator.token_budget is None:
        branches = 2 if collator.weakening is None else 3  # a pair's, each with its prefix at most
        collator = replace(collator, token_budget=max(_TOKENS, branches * collator.max_length))

    def make(chunks):
        work = _Collated(chunks, sources, datasets, collator)
        num_workers = workers_for(sum(map(len, chunks)))
        for sequences in each_row(work, len(chunks), num_workers=num_workers, batch_size=1, progress=False):
            made = {}
            for sequence in sequences:
                lengths = [sum(branches) for branches in sequence.packing.branch_lengths]
                logps = compute(sequence).float().cpu().split(lengths)
                # Behind the groups of all pairs lie their second roots, if they have any.
                for place, number in enumerate(sequence.numbers):
                    made[keys[number][0]] = torch.cat(logps[place :: len(sequence.numbers)])
            yield made

    def num_bytes(missing: list[int]) -> int:
        sampled = missing[:: -(-len(missing) // _PAIRS)]
        total = 0
        for number in sampled:
            (sequence,) = _Collated([[number]], sources, datasets, collator)[0]
            total += ENTRY_BYTES + 4 * len(sequence.packing.targets)
        return -(-total * len(missing) // len(sampled))

    tensors.fill(keys, make, chunk_size=chunk_size, num_bytes=num_bytes, unit="pair", report=report, progress=progress)


class _Collated:
    """Number of a chunk -> its packed sequences, whose `numbers` are those of items. What the workers run."""

    def __init__(self, chunks, sources, datasets, collator):
        self.chunks, self.sources, self.datasets, self.collator = chunks, sources, datasets, collator

    def __getitem__(self, place: int) -> list[PackedSequence]:
        examples = []
        for number in self.chunks[place]:
            dataset, row = self.sources[number]
            examples.append({**self.datasets[dataset][row], "number": number})
        return self.collator(examples)["sequences"]
