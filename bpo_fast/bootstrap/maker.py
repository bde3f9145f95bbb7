"""What a kind of negative is made by: the contract between the run, which batches, journals and writes, and a kind.

A kind is a frozen dataclass whose fields are its options, checked when it is made, and its entry in `kinds.KINDS`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image

from bpo_fast.data.annotations import Annotation, draw
from bpo_fast.models.conversation import Messages
from bpo_fast.ops.checks import is_int

__all__ = ["Made", "Maker", "check_seed", "draw"]


@dataclass(frozen=True, slots=True)
class Made:
    """One response that a kind has made of a sample.

    Attributes:
        rejected: its text; None where a pair has a chosen response alone (the SFT view).
        truncated: it was cut at max_new_tokens.
        variant: what tells it from the sample's others of this kind ("500" of several noise steps, "count" of several
            errors); empty where there is one.
        chosen: the chosen response, where the kind picks its own; None takes the annotated answer.
        details: provenance of this one response, of JSON's plain types: `step`, `error`, `m3p_score`, ...
        fault: why it gives no pair, "<name>: <reason>", counted by its name beside `filters.FILTERS`; empty where it
            does. It is kept like any other, so that it is not made again.
    """

    rejected: str | None
    truncated: bool = False
    variant: str = ""
    chosen: str | None = None
    details: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)
    fault: str = ""


class Maker(Protocol):
    """A kind with its options.

    Attributes:
        kind: its name, a key of `kinds.KINDS`; the `rejected_type` of its pairs.
        needs_model: the model is loaded for it. False for a kind that asks a server, or makes nothing.
        needs_images: it looks at the samples' images.
        needs_answer: it makes the responses of the annotated answer, so that they are made again where that changes.
    """

    kind: str
    needs_model: bool
    needs_images: bool
    needs_answer: bool

    def settings(self) -> dict[str, Any]:
        """All that decides what is made, beside the model's weights, as JSON: options, seed, template version, ...

        Not what leaves the responses as they are: batch size, concurrency, addresses, keys.
        """

    def check(self, model: Any, processor: Any) -> None:
        """Refuse a model that this kind cannot work with, before anything is made.

        Raises:
            ValueError: with what the model lacks.
        """

    def asks(self, sample: Annotation) -> list[str | Messages]:
        """What a model is asked about a sample, a prompt a request; with its image where `needs_images` is True."""

    def make(
        self, model: Any, processor: Any, samples: Sequence[Annotation], images: Sequence[Image.Image | None]
    ) -> list[list[Made]]:
        """The responses of a batch, one list a sample, which may be empty.

        What a sample gets depends on (settings, model, the sample) alone: not on the other samples, nor on their
        order.

        Args:
            model, processor: None where `needs_model` is False.
            samples: B samples.
            images: B decoded images, None each where `needs_images` is False.
        """


def check_seed(seed: object) -> None:
    """Refuse a seed that the noise op or a generator would not take.

    Raises:
        ValueError: no whole number of 64 bits.
    """
    if not is_int(seed) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: found {seed!r}, expected a whole number from -2**63 to 2**63 - 1.")
