"""Which token an answer goes on with, and whether rounding could have chosen another.

A sampled token is the inverse of the distribution function, tokens in the order of the vocabulary, at a uniform number
that belongs to the row and its place in the answer: neither the rest of the batch nor the device changes it.

The logits of a row differ from batch to batch by floating-point rounding, and where two tokens are all but level that
would be enough for another answer. Such a choice is reported as not sure, for the caller to make it again from logits
that no batch has touched.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# How near is too near: of logits, relative to the larger one, and of probabilities. Ten times what the logits of a
# row differ by in float32 between batches. In 16 bits rounding is no rarity to be made good one by one.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How to decode: greedy, as in the paper, or by sampling.

    Args:
        max_new_tokens: an answer is cut there.
        do_sample: sample instead of taking the likeliest token.
        temperature, top_p: of sampling; without effect, and hence refused, when decoding is greedy.

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> GenerationSettings(max_new_tokens=64, temperature=0.7)
        Traceback (most recent call last):
        ValueError: temperature: found 0.7, expected None with greedy decoding; set do_sample.
    """

    max_new_tokens: int = 512
    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None

    def __post_init__(self):
        check_count("max_new_tokens", self.max_new_tokens)
        if not isinstance(self.do_sample, bool):
            raise ValueError(f"do_sample: found {self.do_sample!r}, expected True or False.")
        for name, fits, wanted in (
            ("temperature", lambda x: x > 0, "a number above 0"),
            ("top_p", lambda x: 0 < x <= 1, "a number above 0 and at most 1"),
        ):
            value = getattr(self, name)
            if value is not None and not self.do_sample:
                raise ValueError(f"{name}: found {value}, expected None with greedy decoding; set do_sample.")
            if value is not None and not fits(value):
                raise ValueError(f"{name}: found {value}, expected {wanted}.")


def check_count(name: str, value: object, wanted: str = "at least 1") -> None:
    """Refuse what is not a whole number of at least 1.

    Raises:
        ValueError: with the `name` of the argument and what is `wanted`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: found {value!r}, expected {wanted}.")


class Choice:
    """Chooses the next token of each row.

    Args:
        settings: how to decode.
        seeds: R, one a row, of sampling.
        device: that logits come on.
    """

    def __init__(self, settings: GenerationSettings, seeds: Sequence[int], device: torch.device):
        self.settings = settings
        self.uniform = None
        if settings.do_sample:
            rows = [torch.Generator().manual_seed(seed) for seed in seeds]
            numbers = [torch.rand(settings.max_new_tokens, generator=row, dtype=torch.float64) for row in rows]
            self.uniform = torch.stack(numbers).to(device)

    def __call__(self, logits: Tensor, rows: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """Tokens of some rows, at one place of their answers.

        Args:
            logits: [B, V].
            rows: int64 [B], which of the R rows they are.
            place: tokens that these have already.

        Returns:
            Tokens, int64 [B], and whether they are sure, bool [B].
        """
        near = _TOLERANCE.get(logits.dtype, 0.0)
        logits = logits.float()
        if self.uniform is None:
            best = logits.topk(2).values
            gap = best[:, 0] - best[:, 1]
            return logits.argmax(-1), ~(gap < near * best[:, 0].abs().clamp(min=1))
        if self.settings.temperature is not None:
            logits = logits / self.settings.temperature
        mass, doubtful = logits.softmax(-1), 0.0
        if self.settings.top_p is not None:
            mass, doubtful = _nucleus(mass, self.settings.top_p, near)
        upper = mass.cumsum(-1, dtype=torch.float64)
        total = upper[:, -1:]
        at = self.uniform[rows, place][:, None] * total
        tokens = torch.searchsorted(upper, at, right=True).clamp(max=mass.shape[-1] - 1)
        above = upper.gather(1, tokens) - at
        below = mass.gather(1, tokens) - above
        margin = torch.minimum(above, below)[:, 0]
        return tokens[:, 0], ~(margin < near * total[:, 0] + 2 * doubtful)


def _nucleus(mass: Tensor, top_p: float, near: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens that have `top_p` together, the others set to 0; and what mass rounding could add or take.

    Args:
        mass: probabilities [B, V].
        top_p: of the nucleus.
        near: how near is too near.

    Returns:
        [B, V], and [B].
    """
    ordered, order = mass.sort(descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = before < top_p
    kept[:, 0] = True
    last = ordered.gather(1, kept.sum(-1, keepdim=True) - 1)
    # A swap of near-equal tokens at the border, where one of them is outside.
    level = (ordered - last).abs() <= near * last
    level &= (level & ~kept).any(-1, keepdim=True)
    in_doubt = level | ((before - top_p).abs() <= near)
    doubtful = (ordered * in_doubt).sum(-1) if near else ordered.new_zeros(len(ordered))
    return torch.zeros_like(mass).scatter(1, order, ordered * kept), doubtful
