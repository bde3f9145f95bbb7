"""The examples of a data set that are trained on, each with its row."""

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

# What training reads of an example.
EXAMPLE_COLUMNS = ("images", "image", "prompt", "chosen", "rejected", "tools", "chat_template_kwargs")


class Examples(Dataset):
    """Some rows of a data set in a given order; `number` of an example is its row there, for messages.

    Args:
        dataset: a `datasets.Dataset` or a sequence of examples.
        numbers: rows that are used.

    Example:
        >>> examples = Examples([{"prompt": "a"}, {"prompt": "b"}], [1])
        >>> len(examples), examples[0]
        (1, {'prompt': 'b', 'number': 1})
    """

    def __init__(self, dataset: Any, numbers: Sequence[int]):
        if hasattr(dataset, "select_columns"):
            dataset = dataset.select_columns([name for name in EXAMPLE_COLUMNS if name in dataset.column_names])
        self.dataset, self.numbers = dataset, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> dict:
        number = self.numbers[place]
        return {**self.dataset[number], "number": number}
