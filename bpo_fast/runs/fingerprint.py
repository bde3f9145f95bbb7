"""Fingerprints: how the settings of a run tell one set of data from another."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any


def fingerprint(values: Iterable[Any]) -> str:
    """SHA-256 of a list or stream of values, each of JSON's types or a dataclass of them.

    One value is held at a time, so that a large data set can come batch by batch. The order of the values counts, the
    order of a dictionary's keys does not.

    Example:

    >>> fingerprint([{"a": 1, "b": 2}, 3]) == fingerprint(iter([{"b": 2, "a": 1}, 3]))
    True
    """
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, sort_keys=True, default=asdict).encode() + b"\n")
    return f"sha256:{digest.hexdigest()}"
