"""Annotated images: an (image, question, answer) a record, or several where a conversation is split.

`bpo_fast.data.conversations` has the forms of records, `bpo_fast.data.sources` the files and tables that they lie in.
A preference pair is a single question about a single image (BPO, arXiv 2403.08730, section 3): by default a record
gives its first question and answer, since later turns lean on earlier answers.
"""

import hashlib
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpo_fast.data.conversations import LLAVA, Columns, Unusable, exchanges
from bpo_fast.data.images import Embedded, image_path
from bpo_fast.data.responses import FAULTS
from bpo_fast.models.conversation import IMAGE_TAG, Messages
from bpo_fast.runs.json_records import JsonRecords
from bpo_fast.runs.text import is_text, printable, shown


@dataclass(frozen=True, slots=True)
class Annotation:
    """One annotated answer.

    Attributes:
        record: number of its record in its file.
        id: its id, a text of its own in the file.
        image: path of its image below the image folder.
        question, answer: the texts, the image's tag taken out.
        history: earlier (question, answer) turns of the same conversation, the first of which the image belongs to.
        source: name of the data set that it is of, where there are several.
    """

    record: int
    id: str
    image: str
    question: str
    answer: str
    history: tuple[tuple[str, str], ...] = ()
    source: str = ""

    @property
    def sample_id(self) -> int:
        """63-bit id made of the content alone, so that noise and order of a sample survive any change of the file.

        >>> first, moved = Annotation(0, "a", "1.png", "What?", "A cat."), Annotation(7, "a", "1.png", "What?", "")
        >>> first.sample_id == moved.sample_id
        True
        """
        text = "\0".join((*filter(None, [self.source]), self.id, self.image, *sum(self.history, ()), self.question))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1

    @property
    def prompt(self) -> Messages:
        """The conversation up to the question, as `models.prompt.render` takes it: the image in its first turn.

        >>> asked = Annotation(0, "a", "1.png", "What color?", "Red.", history=(("What is it?", "A cat."),))
        >>> [message["role"] for message in asked.prompt], asked.prompt[0]["content"][0]
        (['user', 'assistant', 'user'], {'type': 'image'})
        """
        texts = [text for turn in self.history for text in turn] + [self.question]
        roles = itertools.cycle(["user", "assistant"])
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for role, text in zip(roles, texts, strict=False)
        ]
        messages[0]["content"].insert(0, {"type": "image"})
        return messages


@dataclass(frozen=True, slots=True)
class Skip:
    """A record, or a question of it, that was left out, and why.

    Attributes:
        record: number of the record in its file.
        id: of the record, or of the question where a conversation is split.
        reason: the fault of this one.
        cause: a few words for all with this fault, for counting.
        source: name of the data set, where there are several.
    """

    record: int
    id: str
    reason: str
    cause: str = ""
    source: str = ""


def draw(seed: int, sample: Annotation, *salt: str | int) -> int:
    """A number of 63 bits of seed, sample and `salt` alone: seeds of sampling, and uniform draws of samples.

    >>> sample = Annotation(0, "a", "1.png", "What?", "A cat.")
    >>> draw(0, sample) == draw(0, sample), draw(0, sample) == draw(0, sample, "count")
    (True, False)
    """
    text = " ".join(map(str, (seed, sample.sample_id, *salt)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def read_annotations(
    source: str | os.PathLike | list, image_folder: str | os.PathLike, *, max_response_words: int | None = 350
) -> tuple[list[Annotation], list[Skip]]:
    """Read annotated images; a record that cannot be used is skipped, a file that cannot be read is an error.

    Args:
        source: path of a JSON or JSON-lines file, or the list of its records.
        image_folder: folder that the records' image paths start from.
        max_response_words: longer answers are skipped; None keeps all.

    Returns:
        The annotations and the skipped records, both in the order of the file.

    Raises:
        FileNotFoundError: the file or the image folder does not exist.
        ValueError: the file is not a JSON list, or no record of it can be used.

    Example:

    >>> import tempfile
    >>> from PIL import Image
    >>> folder = Path(tempfile.mkdtemp())
    >>> Image.new("RGB", (4, 4)).save(folder / "1.png")
    >>> turns = [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A black square."}]
    >>> records = [{"id": "1", "image": "1.png", "conversations": turns}, {"id": "2", "conversations": turns}]
    >>> annotations, skipped = read_annotations(records, folder)
    >>> annotations[0].question, annotations[0].answer
    ('What is this?', 'A black square.')
    >>> skipped
    [Skip(record=1, id='2', reason="no 'image' path", cause="no 'image' path", source='')]
    """
    image_folder = Path(image_folder)
    if not image_folder.is_dir():
        raise FileNotFoundError(f"image_folder: found no folder '{image_folder}', expected that of the images.")
    if max_response_words is not None and max_response_words < 1:
        raise ValueError(f"max_response_words: found {max_response_words}, expected at least 1 or None.")
    name = "annotations" if isinstance(source, list) else source
    records = source if isinstance(source, list) else (record for _, record in JsonRecords(source))
    annotations, skipped = [], []
    for number, record in enumerate(records):
        for found in read_record(record, number, image_folder, max_response_words=max_response_words):
            (annotations if isinstance(found, Annotation) else skipped).append(found)
    if not annotations:
        raise ValueError(f"{name}: {no_usable_record(len(skipped), skipped[0] if skipped else None)}")
    return annotations, skipped


def no_usable_record(count: int, first: Skip | None) -> str:
    """The sentence about a file of `count` records of which none can be used."""
    why = f" (record {first.record} has {first.reason})" if first else ""
    return f"found no usable record among {count}{why}, expected at least one."


def read_record(
    record: Any,
    number: int,
    image_folder: str | os.PathLike | None,
    *,
    columns: Columns = LLAVA,
    turns: str = "first",
    max_response_words: int | None = None,
    source: str = "",
) -> list[Annotation | Skip]:
    """The samples of a record, and what of it is left out.

    Args:
        record: an object of a file or a row of a table; anything else is left out.
        number: of the record in its file, its id where it has none.
        image_folder: folder that its image's path starts from; None where images are embedded.
        columns: where it keeps what.
        turns: what becomes of several questions, one of `conversations.TURNS`. The second question of a record "a"
            that is split has the id "a#2".
        max_response_words: a longer answer is left out.
        source: name of the data set.

    Returns:
        An entry a question that is to become a sample; for a record that has none, the reason.
    """
    record_id = _id_of(record, number, columns)
    try:
        image, pairs = _parse(record, image_folder, columns, turns)
        if not is_text(record_id):
            raise Unusable("an id that no file takes", f"an id that no file takes, {shown(record_id)}")
    except Unusable as error:
        return [_skip(number, record_id, error, source)]
    if turns == "keep":
        wanted = [(record_id, len(pairs) - 1)]
    else:
        wanted = [(f"{record_id}#{turn + 1}" if turn else record_id, turn) for turn in range(len(pairs))]
    found = []
    for sample_id, turn in wanted:
        history = tuple(pairs[:turn]) if turns == "keep" else ()
        question, answer = pairs[turn]
        try:
            for earlier in history:
                _check_exchange(*earlier, None)
            _check_exchange(question, answer, max_response_words)
        except Unusable as error:
            found.append(_skip(number, sample_id, error, source))
        else:
            found.append(Annotation(number, sample_id, image, question, answer, history, source))
    return found


def _parse(record, image_folder, columns, turns):
    """Image, and (question, answer) pairs; the image is there."""
    if not isinstance(record, dict):
        raise Unusable("no object", f"a {type(record).__name__} where an object is needed")
    pairs = exchanges(record, columns, turns)
    image = record.get(columns.image)
    if isinstance(image, Embedded):
        return str(image), pairs
    if not isinstance(image, str) or not image:
        raise Unusable(f"no {columns.image!r} path")
    if image_folder is None:
        raise Unusable("an image given by path, and no image_folder")
    try:
        path = image_path(image_folder, image)
    except ValueError as error:
        raise Unusable("an image path that cannot be followed", str(error)) from None
    if not os.path.isfile(path):
        raise Unusable("an image that does not exist", f"image {image} does not exist")
    return image, pairs


def _check_exchange(question, answer, max_response_words):
    if not question:
        raise Unusable("an empty question")
    if IMAGE_TAG in question:
        raise Unusable(f"{IMAGE_TAG} in a later question")
    for name, find in FAULTS.items():
        if reason := find(answer, max_response_words):
            raise Unusable(f"response: {name}", reason)
    if not is_text(question + answer):
        raise Unusable("half a surrogate pair in its text, which no file takes")


def _id_of(record, number, columns):
    found = record.get(columns.id) if isinstance(record, dict) else None
    return str(number if found is None else found)


def _skip(number, record_id, error, source):
    return Skip(number, printable(record_id)[:200], printable(str(error)), error.cause, source)
