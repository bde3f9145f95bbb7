"""Quality filters: which pairs are not worth training on, each with a name to count by.

The texts are judged by `check` as soon as they are made, the log-probs of those that are left by the same function
once they are known. What is judged is how a text is written, never what it says of the image: a short answer ("2"), a
pair that differs in one word and an answer in any script are left alone.
"""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from rapidfuzz.distance import Indel

from bpo_fast.answers.score import Score
from bpo_fast.bootstrap.maker import Made
from bpo_fast.data.annotations import Annotation
from bpo_fast.data.responses import FAULTS
from bpo_fast.runs.numbers import COUNT, NOT_NEGATIVE, Range, check_numbers

# Characters of the stretches whose repetition is measured. "On the left there is a" recurs in good answers too, two
# such phrases in a row do not.
STRETCH = 20

# Bytes of the shortest question whose repetition counts: "Text?" may well be the first word of its answer. In bytes,
# since a script of words a letter says as much in four letters of three bytes each.
SHORTEST_ECHO = 12


@dataclass(frozen=True, slots=True)
class FilterOptions:
    """What is dropped. Both responses of a pair are judged, where it has two.

    Args:
        max_response_words: longer responses; None keeps all.
        max_similarity: pairs more alike than this, from 0 to 1: the share of both texts' characters that lies in their
            longest common subsequence. None keeps all but those that differ in case, punctuation and space alone, for
            an injected error may change one word of a hundred.
        max_repetition: responses in loops: most of the stretches of 20 characters, from 0 to 1, that may have occurred
            before in the response. None keeps all.
        drop_refusals: responses that say that there is no image to see, or that a language model does not answer.
        drop_echoes: responses that begin with the question, and made ones that go on with the other side's next turn.
        drop_truncated: rejected responses that were cut at max_new_tokens.
        min_logp_gap: pairs whose log-probs a token are closer than this, in nats, in whichever order; None keeps all.

    Raises:
        ValueError: a number out of its range.
    """

    max_response_words: int | None = 350
    max_similarity: float | None = None
    max_repetition: float | None = 0.5
    drop_refusals: bool = True
    drop_echoes: bool = True
    drop_truncated: bool = False
    min_logp_gap: float | None = None

    def __post_init__(self):
        share = Range("a number from 0 to 1", lambda x: 0 <= x <= 1)
        ranges = {"max_response_words": COUNT, "max_similarity": share, "max_repetition": share}
        check_numbers(self, ranges | {"min_logp_gap": NOT_NEGATIVE})


@dataclass(frozen=True, slots=True)
class Pair:
    """What a filter sees.

    Attributes:
        question: the last one of the prompt.
        chosen: the chosen response.
        rejected: the rejected one, None where there is none.
        annotated: the chosen one is the annotated answer, and not made.
        truncated: the rejected one was cut.
        scores: of chosen and rejected, once they are known.
    """

    question: str
    chosen: str
    rejected: str | None
    annotated: bool = True
    truncated: bool = False
    scores: tuple[Score, Score] | None = None

    @property
    def responses(self) -> tuple[str, ...]:
        return (self.chosen,) if self.rejected is None else (self.chosen, self.rejected)


def check(
    sample: Annotation, made: Made, options: FilterOptions, *, scores: tuple[Score, Score] | None = None
) -> str | None:
    """Why a pair is dropped, or None.

    Args:
        sample: what it is made of.
        made: what a kind made of it.
        options: what is dropped.
        scores: of chosen and rejected; with them the filters of log-probs are asked, and without them all others.

    Returns:
        "<name>: <reason>", the name one of `FILTERS` or the kind's own (`Made.fault`).

    Example:
        >>> sample = Annotation(0, "a", "1.png", "What is it?", "A red circle.")
        >>> check(sample, Made("a red circle"), FilterOptions())
        'identical: responses that differ in case, punctuation and space at most'
        >>> check(sample, Made("A red square."), FilterOptions()) is None
        True
    """
    if made.fault:
        return made.fault
    annotated = made.chosen is None
    chosen = sample.answer if annotated else made.chosen
    pair = Pair(sample.question, chosen, made.rejected, annotated, made.truncated, scores)
    for name, find in FILTERS.items():
        if (name in OF_SCORES) == (scores is not None) and (reason := find(pair, options)):
            return f"{name}: {reason}"
    return None


class _Words(dict):
    """Code point -> itself, or a space for punctuation; filled as characters are met.

    Not by what Python's `\\w` leaves, which has no vowel signs: two words of Hindi may differ in one.
    """

    _MEANT = frozenset("%#&@*/\\-")  # "5%" is not "5", nor "-5"

    def __missing__(self, code):
        letter = chr(code)
        is_punctuation = unicodedata.category(letter).startswith("P") and letter not in self._MEANT
        return self.setdefault(code, " " if is_punctuation else letter)


_WORDS = _Words()


def normalised(text: str) -> str:
    """`text` without case, punctuation, or more than single spaces, and in one form of Unicode.

    >>> normalised("  It\\u2019s RED, isn't it?\\n")
    'it s red isn t it'
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().translate(_WORDS).split())


def repetition(text: str) -> float:
    """The share of a text's stretches of `STRETCH` characters that have occurred in it before.

    >>> round(repetition("There is a cat. " * 5), 2), repetition("There is a cat. There is a dog.")
    (0.73, 0.0)
    """
    text = " ".join(text.casefold().split())
    count = len(text) - STRETCH + 1
    return 1 - len({text[start : start + STRETCH] for start in range(count)}) / count if count > 0 else 0.0


def similarity(first: str, second: str, at_least: float = 0.0) -> float:
    """How alike two normalised texts are, from 0 to 1, see `FilterOptions.max_similarity`; 0 if below `at_least`."""
    return Indel.normalized_similarity(first, second, score_cutoff=at_least)


# What a response is refused with, in normalised text. In the first person: an image may show "Please upload an image."
_CANNOT = "(?:can ?not|can t|could not|couldn t|(?:am|m) (?:not able|unable) to|(?:do not|don t) have the ability to)"
_SEE = "(?:see|view|access|open|display|process|analyze|analyse|look at)(?: or [a-z]+)?"
_IMAGE = "(?:image|picture|photo|photograph|figure)s?"
_REFUSALS = re.compile(
    "|".join(
        [
            rf"\bi {_CANNOT} (?:actually |directly |physically )?{_SEE} (?:the |this |that |your |any )?{_IMAGE}\b",
            rf"\bi (?:am|m) sorry (?:but )?i {_CANNOT} (?:assist|help|comply|answer|provide)\b",
            r"\bas an? (?:ai|artificial intelligence|text based|language model|large language model)\b"
            r"(?: [a-z]+){0,4} i\b",
            rf"\bno {_IMAGE} (?:was|is|has been|were|have been) (?:provided|attached|uploaded|given|shared)\b",
            rf"\byou (?:have not|haven t|did not|didn t) (?:provide|upload|attach|share)d? (?:an|the|any) {_IMAGE}\b",
            "我(?:无法|不能|没办法)(?:直接)?(?:查看|看到|看见|访问|打开|处理)(?:这张|该|您的|你的|任何)?(?:图片|图像|照片)",
            "我看不到(?:这张|该|您的|你的|任何)?(?:图片|图像|照片)",
            "作为(?:一个|一名|一款)?(?:ai|人工智能|大?语言模型)\\w* ?我",
        ]
    )
)

# Where a model goes on with the conversation by itself.
_NEXT_TURN = re.compile(r"\b(?:USER|ASSISTANT):|###\s*(?:Human|Assistant)\b")


def _fault(name):
    def find(pair, options):
        found = (FAULTS[name](response, options.max_response_words) for response in pair.responses)
        return next(filter(None, found), None)

    return find


def _identical(pair, options):
    if pair.rejected is not None and normalised(pair.chosen) == normalised(pair.rejected):
        return "responses that differ in case, punctuation and space at most"
    return None


def _similar(pair, options):
    most = options.max_similarity
    if pair.rejected is None or most is None:
        return None
    found = similarity(normalised(pair.chosen), normalised(pair.rejected), most)
    return f"{found:.3f} of both responses alike, over max_similarity={most}" if found > most else None


def _repetition(pair, options):
    if options.max_repetition is None:
        return None
    found = max(map(repetition, pair.responses))
    if found <= options.max_repetition:
        return None
    return f"{found:.2f} of a response said before, over max_repetition={options.max_repetition}"


def _refusal(pair, options):
    if not options.drop_refusals:
        return None
    found = filter(None, (_REFUSALS.search(normalised(response)) for response in pair.responses))
    return next((f"'{match[0]}'" for match in found), None)


def _echo(pair, options):
    if not options.drop_echoes:
        return None
    question = normalised(pair.question)
    counts = len(question.encode()) >= SHORTEST_ECHO
    for place, response in enumerate(pair.responses):
        if counts and f"{normalised(response)} ".startswith(f"{question} "):
            return "a response that begins with the question"
        # In an annotated answer it is text of the image.
        is_made = place > 0 or not pair.annotated
        if is_made and (match := _NEXT_TURN.search(response)):
            return f"a response with another turn in it, '{match[0]}'"
    return None


def _truncated(pair, options):
    return "cut at max_new_tokens" if options.drop_truncated and pair.truncated else None


def _logp_gap(pair, options):
    least = options.min_logp_gap
    chosen, rejected = pair.scores
    gap = abs(chosen.mean - rejected.mean)
    return f"{gap:.3g} nats a token, under min_logp_gap={least}" if least is not None and gap < least else None


# Name -> the reason to drop a pair, or None. The first one that has a reason is what is counted.
FILTERS: dict[str, Callable[[Pair, FilterOptions], str | None]] = {
    **{name: _fault(name) for name in FAULTS},
    "truncated": _truncated,
    "identical": _identical,
    "similar": _similar,
    "repetition": _repetition,
    "refusal": _refusal,
    "echo": _echo,
    "logp_gap": _logp_gap,
}

# Those that look at log-probs.
OF_SCORES = frozenset({"logp_gap"})
