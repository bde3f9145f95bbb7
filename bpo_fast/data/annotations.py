"""Annotated images: one (image, question, answer) a record.

The file is a JSON list or JSON lines. A format is known by a key of its records:

- LLaVA-Instruct, ShareGPT4V, LLaVAR: `conversations`, beside `id` and `image`.

    {"id": "...", "image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                            {"from": "gpt", "value": "A red circle."}]}

  A record gives its first question and answer: later turns lean on earlier answers, and a preference pair is a single
  question about a single image (BPO, arXiv 2403.08730, section 3).
"""

import hashlib
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpo_fast.data.images import image_path
from bpo_fast.data.responses import check_response
from bpo_fast.models.conversation import IMAGE_TAG, Messages
from bpo_fast.runs.files import read_json
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
    """A record that was left out, and why."""

    record: int
    id: str
    reason: str


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
    [Skip(record=1, id='2', reason="no 'image' path")]
    """
    image_folder = Path(image_folder)
    if not image_folder.is_dir():
        raise FileNotFoundError(f"image_folder: found no folder '{image_folder}', expected that of the images.")
    if max_response_words is not None and max_response_words < 1:
        raise ValueError(f"max_response_words: found {max_response_words}, expected at least 1 or None.")
    name = "annotations" if isinstance(source, list) else source
    records = source if isinstance(source, list) else read_json(source)
    if not isinstance(records, list):
        raise ValueError(f"{name}: found a {type(records).__name__}, expected a JSON list of records.")
    annotations, skipped = [], []
    for number, record in enumerate(records):
        record_id = _id_of(record, number)
        try:
            image, question, answer = _parse(record, max_response_words)
            if not os.path.isfile(image_path(image_folder, image)):
                raise ValueError(f"image {image} does not exist")
            if not is_text(record_id):
                raise ValueError(f"an id that no file takes, {shown(record_id)}")
        except ValueError as reason:
            skipped.append(Skip(number, printable(record_id)[:200], printable(str(reason))))
        else:
            annotations.append(Annotation(number, record_id, image, question, answer))
    if not annotations:
        first = f" (record {skipped[0].record} has {skipped[0].reason})" if skipped else ""
        raise ValueError(f"{name}: found no usable record among {len(records)}{first}, expected at least one.")
    return annotations, skipped


def _parse(record: Any, max_response_words: int | None) -> tuple[str, str, str]:
    """Image path, question and answer of a record in any of the formats, or ValueError with what it has wrong."""
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__} where an object is needed")
    convert = next((convert for key, convert in _FORMATS.items() if key in record), None)
    if convert is None:
        raise ValueError(f"no {' or '.join(map(repr, _FORMATS))}, which tells its format")
    image, question, answer = convert(record)
    if not isinstance(image, str) or not image:
        raise ValueError("no 'image' path")
    if not question:
        raise ValueError("an empty question")
    check_response(answer, max_response_words)
    if not is_text(question + answer):
        raise ValueError("half a surrogate pair in its text, which no file takes")
    return image, question, answer


def _id_of(record: Any, number: int) -> str:
    found = record.get("id") if isinstance(record, dict) else None
    return str(number if found is None else found)


def _from_llava(record):
    turns = record["conversations"]
    if not isinstance(turns, list) or len(turns) < 2:
        raise ValueError("no 'conversations' of a question and an answer")
    for turn, speaker in zip(turns[:2], ("human", "gpt"), strict=True):
        if not isinstance(turn, dict) or turn.get("from") != speaker or not isinstance(turn.get("value"), str):
            raise ValueError(f"no text from '{speaker}' where one is expected in the first two turns")
    question, answer = turns[0]["value"], turns[1]["value"]
    tags = question.count(IMAGE_TAG)
    if tags != 1:
        raise ValueError(f"{tags or 'no'} {IMAGE_TAG} in the first question where one is expected")
    return record.get("image"), question.replace(IMAGE_TAG, "").strip(), answer.strip()


# The key that tells a format -> image path, question and answer of a record; the texts without space around them.
_FORMATS = {"conversations": _from_llava}
