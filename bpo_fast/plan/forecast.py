"""What a training will hold and how long it will take: counted terms, and what is assumed beside them."""

from dataclasses import dataclass

from bpo_fast.plan.cards import GIB, Card
from bpo_fast.plan.meter import INSIDE, KEPT, TRANSIENT
from bpo_fast.plan.step import ADAPTER, GRADIENTS, OPTIMIZER, TABLES, VISION, WEIGHTS, Step

# What no count of tensors shows, assumed: CUDA's context with the kernels and cuBLAS' workspace; memory between blocks
# that the allocator cannot use; shares of a card's rate and bandwidth that its products and everything else reach.
CONTEXT_BYTES = int(0.75 * GIB)
FRAGMENTED_SHARE = 0.1
RATE_SHARE = 0.6
BANDWIDTH_SHARE = 0.7

# The paper trained 13B for 28 h and 7B for 17 h on eight A40s: two epochs of 167,710 pairs.
PAPER_PAIRS, PAPER_EPOCHS, PAPER_CARDS = 167_710, 2, 8
PAPER_HOURS = {"llava-1.5-13b": 28, "llava-1.5-7b": 17}

CONTEXT, FRAGMENTED = "CUDA context and workspaces (assumed)", "between blocks (assumed)"
_LASTING = (WEIGHTS, TABLES, VISION, ADAPTER, GRADIENTS, OPTIMIZER)
_MOVING = (KEPT, TRANSIENT, INSIDE)


@dataclass(frozen=True)
class Forecast:
    """Memory at a step's peak and the time of a pair, on a card.

    Attributes:
        terms: bytes at the peak, by what they are.
        flops_per_pair: of matrix products.
        product_seconds, other_seconds: a pair's time in products, and in everything else; None where the card's rates
            are not known.
    """

    card: Card
    terms: dict[str, int]
    flops_per_pair: float
    product_seconds: float | None
    other_seconds: float | None

    @property
    def peak_bytes(self) -> int:
        return sum(self.terms.values())

    @property
    def tensor_bytes(self) -> int:
        """Without what is assumed."""
        return sum(size for name, size in self.terms.items() if name not in (CONTEXT, FRAGMENTED))

    @property
    def without_optimizer(self) -> int:
        return self.peak_bytes - self.terms[OPTIMIZER]

    @property
    def seconds_per_pair(self) -> float | None:
        return None if self.product_seconds is None else self.product_seconds + self.other_seconds

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.card.memory_bytes

    @property
    def epoch_hours(self) -> float | None:
        """Of the paper's pairs."""
        return None if self.seconds_per_pair is None else self.seconds_per_pair * PAPER_PAIRS / 3600


def forecast(step: Step, card: Card) -> Forecast:
    """The forecast of a counted step on a card."""
    at_peak = step.peak.at_peak
    terms = {name: at_peak.get(name, 0) for name in (*_LASTING, *_MOVING)}
    terms[CONTEXT] = CONTEXT_BYTES
    terms[FRAGMENTED] = int(FRAGMENTED_SHARE * sum(terms[name] for name in _MOVING))
    flops, moved = step.flops / step.num_pairs, step.loss.other_bytes / step.num_pairs
    return Forecast(
        card=card,
        terms=terms,
        flops_per_pair=flops,
        product_seconds=card.rate and flops / (RATE_SHARE * card.rate),
        other_seconds=card.bandwidth and moved / (BANDWIDTH_SHARE * card.bandwidth),
    )
