"""The examples of a data set that are trained on, each with its row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from bpo_fast.train.loading import in_row

# What training reads of an example.
EXAMPLE_COLUMNS = (
    *("images", "image", "prompt", "chosen", "rejected", "tools", "chat_template_kwargs"),
    *("chosen_token_weights", "rejected_token_weights"),
)


@dataclass(frozen=True, slots=True)
class ImagesShown:
    """The images of an example, as caches know them: the key of what they hold (None without images), and how many."""

    key: str | None
    count: int


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
        self.dataset, self.numbers = _columns(dataset, EXAMPLE_COLUMNS), numbers
        self.shown, self._kept = None, None

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> dict:
        if self._kept is None:
            return self.whole(place)
        number = self.numbers[place]
        example = {name: value for name, value in self._kept[number].items() if name in self._names}
        return {**example, "number": number, "shown": self.shown[place]}

    def whole(self, place: int) -> dict:
        """The example with its images, whatever is kept of them."""
        number = self.numbers[place]
        with in_row(number):
            return {**self.dataset[number], "number": number}

    def keep(self, shown: Sequence[ImagesShown] | None, without_images: bool = False) -> None:
        """Give each example `shown`, by which a cache knows its images; None gives it no longer.

        Args:
            shown: of each example.
            without_images: leave the images themselves out, so that none is decoded.
        """
        left_out = ("images", "image") if without_images else ()
        self._names = [name for name in EXAMPLE_COLUMNS if name not in left_out]
        # A transform of the user's own may read a column to make another.
        free = getattr(self.dataset, "format", {"type": None})["type"] is None
        self.shown = shown
        self._kept = None if shown is None else _columns(self.dataset, self._names) if free else self.dataset


def _columns(dataset: Any, names: Sequence[str]) -> Any:
    if not hasattr(dataset, "select_columns"):
        return dataset
    return dataset.select_columns([name for name in names if name in dataset.column_names])
