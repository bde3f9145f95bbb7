"""The pairs of a step that is planned: how long prompts and answers are, an assumption that is said with the plan."""

import math
from dataclasses import dataclass
from statistics import NormalDist

from bpo_fast.models.packing import Group


@dataclass(frozen=True)
class LengthMix:
    """Lengths of a data set's pairs, in tokens: log-normal in each of its parts.

    Attributes:
        source: what is assumed, and where it comes from.
        prompt: tokens of a prompt's text.
        parts: (share of the pairs, mean tokens of an answer) of each part.
        spread: standard deviation of the logarithm of an answer's length.
        ratio: of the two answers of a pair, the longer over the shorter; either is the chosen one in turn.
    """

    source: str
    prompt: int
    parts: tuple[tuple[float, float], ...]
    spread: float
    ratio: float

    def pairs(self, count: int) -> list[tuple[int, int, int]]:
        """(prompt, chosen, rejected) tokens of `count` pairs that stand for all, at evenly spread quantiles.

        Example:
            >>> PAPER_MIX.pairs(2)
            [(55, 84, 70), (55, 184, 220)]
        """
        shares = sum(share for share, _ in self.parts)
        mean = sum(share * mean for share, mean in self.parts) / shares
        lengths = [self._quantile((number + 0.5) / count) for number in range(count)]
        # Chosen and rejected together have the mean.
        scale = mean * count / sum(lengths) * 2 / (self.ratio**0.5 + self.ratio**-0.5)
        pairs = []
        for number, length in enumerate(lengths):
            skew = self.ratio ** (0.5 if number % 2 == 0 else -0.5)
            answers = (max(1, round(scale * length * skew)), max(1, round(scale * length / skew)))
            pairs.append((self.prompt, *answers))
        return pairs

    def _quantile(self, share):
        """The length that this share of all answers is shorter than, by bisection."""
        low, high = 1e-3, 1e6
        while high / low > 1 + 1e-9:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self._shorter(middle) < share else (low, middle)
        return low

    def _shorter(self, length):
        total = sum(share for share, _ in self.parts)
        # The mean of a log-normal is exp(mu + spread^2 / 2).
        z = [(math.log(length / mean) + self.spread**2 / 2) / self.spread for _, mean in self.parts]
        return sum(share / total * NormalDist().cdf(x) for (share, _), x in zip(self.parts, z, strict=True))


PAPER_MIX = LengthMix(
    source="assumed of BPO's 57,906 ShareGPT4V, 55,445 LLaVAR and 54,359 LLaVA-Instruct samples (arXiv 2403.08730): "
    "answers of 220 (942 characters, arXiv 2311.12793), 65 and 130 tokens on average, prompts of 55 beside the image",
    prompt=55,
    parts=((57906, 220), (55445, 65), (54359, 130)),
    spread=0.4,
    ratio=1.2,
)


@dataclass(frozen=True)
class GivenLengths:
    """The lengths of one batch, in place of a mix.

    Attributes:
        source: where they come from.
        given: tokens of prompt, chosen and rejected of each pair.
    """

    source: str
    given: tuple[tuple[int, int, int], ...]

    def pairs(self, count: int) -> list[tuple[int, int, int]]:
        """The first `count` pairs, over again where there are fewer."""
        return [self.given[number % len(self.given)] for number in range(count)]


def read_lengths(texts: list[str], image_tokens: int) -> GivenLengths:
    """Lengths of a batch from "prefix,chosen,rejected" texts, whose prefix holds the image.

    Raises:
        ValueError: a text is no three numbers, or a prefix is no longer than its image.

    Example:
        >>> read_lengths(["631,100,120"], 576).given
        ((55, 100, 120),)
    """
    given = []
    for text in texts:
        try:
            prefix, chosen, rejected = map(int, text.split(","))
        except ValueError:
            raise ValueError(
                f"batch_lengths: found '{text}', expected prefix,chosen,rejected as in 631,100,120."
            ) from None
        if prefix <= image_tokens or chosen < 1 or rejected < 1:
            raise ValueError(
                f"batch_lengths: found '{text}', expected a prefix longer than its image's {image_tokens} tokens and "
                "answers of at least one."
            )
        given.append((prefix - image_tokens, chosen, rejected))
    return GivenLengths("those of the batch that was given", tuple(given))


def groups_of(pairs: list[tuple[int, int, int]], image_tokens: int) -> list[Group]:
    """Groups of token ids for pairs of these lengths, with an image each."""
    return [Group([1] * (prompt + image_tokens), [[2] * chosen, [3] * rejected]) for prompt, chosen, rejected in pairs]
