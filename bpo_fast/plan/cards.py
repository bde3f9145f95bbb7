"""Cards by name: what they hold, and how fast they read and multiply."""

import difflib
import re
from dataclasses import dataclass, replace

import torch

GIB = 1 << 30


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: as it is asked for.
        memory_gib: what PyTorch sees of its memory.
        bandwidth: of that memory, bytes a second; None where it is not known.
        rate: of dense bf16 products that are summed in float32, FLOPs a second; None where it is not known.
        processors: multiprocessors.
    """

    name: str
    memory_gib: float
    bandwidth: float | None
    rate: float | None
    processors: int

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * GIB)


# name: (GiB, GB/s, TFLOP/s, multiprocessors); the vendor's figures, without sparsity; memory as PyTorch sees it.
_FIGURES = {
    "a40": (44.3, 696, 149.7, 84),
    "a6000": (47.4, 768, 154.8, 84),
    "a100-40": (39.4, 1555, 312, 108),
    "a100-80": (79.2, 2039, 312, 108),
    "l4": (22.0, 300, 121, 58),
    "l40s": (44.4, 864, 362, 142),
    "rtx6000-ada": (47.4, 960, 364, 142),
    "h100": (79.1, 3350, 989, 132),
    "h200": (139.8, 4800, 989, 132),
    "b200": (178.3, 8000, 2250, 148),
    "rtx3090": (23.6, 936, 71, 82),
    "rtx4080": (15.6, 717, 97.5, 76),
    "rtx4090": (23.5, 1008, 165.2, 128),
    "rtx5090": (31.4, 1792, 209.5, 170),
}
CARDS = {
    name: Card(name, memory, bandwidth * 1e9, rate * 1e12, processors)
    for name, (memory, bandwidth, rate, processors) in _FIGURES.items()
}


def find_card(name: str) -> Card:
    """The card of a name such as "a40", "A100-80" or "rtx 4090"; "a40:16" is one with 16 GiB, "mine:16" any such.

    Raises:
        ValueError: there is none of that name, or its memory is no number.

    Example:
        >>> find_card("RTX 4090").memory_gib, find_card("a40:16").memory_gib
        (23.5, 16.0)
    """
    device, colon, memory = name.rpartition(":")
    if colon:
        try:
            size = float(memory)
        except ValueError:
            size = 0.0
        if not 0 < size < 1e6:
            raise ValueError(f"gpu: found '{name}', expected GiB behind the colon, as in a40:16.")
        known = CARDS.get(device) or as_card(device, int(size * GIB), 0)
        return replace(known, name=device, memory_gib=size)
    key = name.lower().removeprefix("nvidia ").replace(" ", "").replace("_", "-")
    if key not in CARDS:
        near = difflib.get_close_matches(key, CARDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(f"gpu: found '{name}', expected one of {', '.join(CARDS)}{hint}")
    return CARDS[key]


def card_here() -> Card:
    """The current CUDA device, with the rates of the card of its name.

    Raises:
        ValueError: there is none.
    """
    if not torch.cuda.is_available():
        raise ValueError(f"gpu: found no CUDA device here, expected --gpu with one of {', '.join(CARDS)}.")
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return as_card(found.name, found.total_memory, found.multi_processor_count)


def as_card(name: str, memory_bytes: int, processors: int) -> Card:
    """A device by what CUDA says of it; its rates are known where its name holds that of a card of its size.

    Example:
        >>> as_card("NVIDIA A100-SXM4-80GB", 79 << 30, 108).bandwidth
        2039000000000.0
    """
    words = re.sub("[^a-z0-9]+", "", name.lower())
    memory = memory_bytes / GIB
    alike = [
        card
        for key, card in CARDS.items()
        if key.partition("-")[0] in words and abs(card.memory_gib - memory) < 0.1 * card.memory_gib
    ]
    known = max(alike, key=lambda card: len(card.name.partition("-")[0]), default=None)
    return Card(name, memory, known and known.bandwidth, known and known.rate, processors)
