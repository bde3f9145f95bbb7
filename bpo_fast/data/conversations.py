"""From a record to its image and the questions and answers about it, in any of the forms that data sets keep them.

    {"id": "1", "image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                          {"from": "gpt", "value": "A red circle."}]}

is the form of LLaVA-Instruct, ShareGPT4V and LLaVAR. Messages of `role` and `content`, the content a text or a list of
parts, are read too, as is a record with a question and an answer of its own: `Columns` says where.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bpo_fast.models.conversation import IMAGE_TAG

# What becomes of a conversation of several questions.
TURNS = {
    "first": "its first question and answer are a sample",
    "split": "each question with its answer is a sample of its own",
    "keep": "the conversation up to its last answer is a sample, the earlier turns its history",
}
_SPEAKERS = {"human": ("human", "user"), "gpt": ("gpt", "assistant")}


class Unusable(ValueError):
    """What a record has wrong.

    Args:
        cause: a few words that are the same for all records with this fault, for counting.
        reason: the fault of this one; by default `cause`.
    """

    def __init__(self, cause: str, reason: str | None = None):
        super().__init__(reason or cause)
        self.cause = cause


@dataclass(frozen=True)
class Columns:
    """Names of a record's keys, or of a table's columns.

    Attributes:
        id: a text or number that tells the record; where it is missing, the record's number does.
        image: a path; in a table also an embedded image.
        conversations: a list of turns. None where `question` and `answer` are given.
        question, answer: a text each.
    """

    id: str = "id"
    image: str = "image"
    conversations: str | None = None
    question: str | None = None
    answer: str | None = None

    def __post_init__(self):
        given = {name: value for name, value in asdict(self).items() if value is not None}
        for name, value in given.items():
            if not isinstance(value, str) or not value:
                raise ValueError(f"columns, '{name}': found {value!r}, expected the name of a column.")
        if self.question is None and self.answer is None:
            object.__setattr__(self, "conversations", self.conversations or "conversations")
        elif self.question is None or self.answer is None or self.conversations is not None:
            raise ValueError(f"columns: found {', '.join(given)}, expected question and answer, or conversations.")

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns of questions and answers."""
        return tuple(filter(None, (self.conversations, self.question, self.answer)))


LLAVA = Columns()


def exchanges(record: Mapping[str, Any], columns: Columns, turns: str) -> list[tuple[str, str]]:
    """Questions and answers of a record, without space around them and without the image's tag.

    Args:
        record: an object of a file, a row of a table.
        columns: where it keeps what.
        turns: one of `TURNS`; "first" looks at nothing behind the first two turns.

    Returns:
        At least one (question, answer), in their order. A last question without an answer is left out.

    Raises:
        Unusable: there is no question with an answer, or the image is not shown in the first question alone.

    Example:

    >>> turns = [{"from": "human", "value": "What is this?\\n<image>"}, {"from": "gpt", "value": "A cat. "}]
    >>> exchanges({"conversations": turns}, LLAVA, "first")
    [('What is this?', 'A cat.')]
    """
    missing = [name for name in columns.texts if name not in record]
    if missing:
        raise Unusable(f"no {missing[0]!r}")
    if columns.conversations is None:
        question, answer = (record[name] for name in columns.texts)
        if not isinstance(question, str) or not isinstance(answer, str):
            raise Unusable(f"no text in {columns.question!r} and {columns.answer!r}")
        pairs = [(question if IMAGE_TAG in question else f"{IMAGE_TAG}{question}", answer)]
    else:
        pairs = _pairs(record[columns.conversations], turns)
    first = pairs[0][0]
    tags = first.count(IMAGE_TAG)
    if tags != 1:
        raise Unusable(
            f"{'several' if tags else 'no'} {IMAGE_TAG} in the first question",
            f"{tags or 'no'} {IMAGE_TAG} in the first question where one is expected",
        )
    pairs[0] = (first.replace(IMAGE_TAG, ""), pairs[0][1])
    return [(question.strip(), answer.strip()) for question, answer in pairs]


def _pairs(said, turns):
    if isinstance(said, dict) and all(isinstance(values, list) for values in said.values()):
        # A list of objects, as Arrow may keep it: an object of lists.
        said = [dict(zip(said, values, strict=True)) for values in zip(*said.values(), strict=False)]
    if not isinstance(said, list) or len(said) < 2:
        raise Unusable("no 'conversations' of a question and an answer")
    whole = 2 if turns == "first" else len(said) // 2 * 2
    where = "the first two turns" if turns == "first" else "a list of questions and answers"
    texts = [_text(turn, ("human", "gpt")[number % 2], where) for number, turn in enumerate(said[:whole])]
    return list(zip(texts[::2], texts[1::2], strict=True))


def _text(turn, speaker, where):
    if isinstance(turn, dict):
        name, said = (turn.get(key) for key in (("from", "value") if "from" in turn else ("role", "content")))
        if isinstance(said, list) and all(isinstance(part, dict) for part in said):
            parts = [IMAGE_TAG if part.get("type") == "image" else part.get("text") for part in said]
            said = "".join(parts) if all(isinstance(part, str) for part in parts) else None
        if name in _SPEAKERS[speaker] and isinstance(said, str):
            return said
    raise Unusable(f"no text from '{speaker}' where one is expected in {where}")
