"""Ranges of numeric options, said by name before a run starts."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """What an option may be.

    Attributes:
        words: of the error, after "expected".
        holds: whether a finite number lies in it.
        whole: only integers do.
    """

    words: str
    holds: Callable[[float], bool]
    whole: bool = False


COUNT = Range("a whole number of at least 1", lambda x: x >= 1, whole=True)
POSITIVE = Range("a positive number", lambda x: x > 0)
NOT_NEGATIVE = Range("a number of at least 0", lambda x: x >= 0)
SHARE = Range("a number in [0, 1)", lambda x: 0 <= x < 1)
SEED = Range("a whole number from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32, whole=True)


def check_numbers(options: object, ranges: Mapping[str, Range]) -> None:
    """Refuse an option out of its range; None is left to the option's type.

    Args:
        options: has the options as attributes.
        ranges: name of an option -> what it may be.

    Raises:
        ValueError: a value is out of its range, not finite or not a number.

    Example:

    >>> from types import SimpleNamespace
    >>> check_numbers(SimpleNamespace(lora_r=8, max_samples=None), {"lora_r": COUNT, "max_samples": COUNT})
    >>> check_numbers(SimpleNamespace(lora_r=0), {"lora_r": COUNT})
    Traceback (most recent call last):
    ValueError: lora_r: found 0, expected a whole number of at least 1.
    """
    for name, allowed in ranges.items():
        value = getattr(options, name)
        if value is None:
            continue
        numeric = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not numeric or (allowed.whole and not isinstance(value, int)) or not allowed.holds(value):
            raise ValueError(f"{name}: found {value!r}, expected {allowed.words}.")
