"""Annotated images in LLaVA-Instruct's form: one (image, question, answer) a row.

The file is a JSON list, as LLaVA-Instruct, ShareGPT4V and LLaVAR are published (JSON lines are read too):

    {"id": "...", "image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                            {"from": "gpt", "value": "A red circle."}]}

A row gives its first question and answer. Later turns lean on earlier answers, and a preference pair is a single
question about a single image (BPO, arXiv 2403.08730, section 3).
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from bpo_fast.runs.files import read_json

IMAGE_TAG = "<image>"


@dataclass(frozen=True, slots=True)
class Annotation:
    """One annotated answer: row number in the file, id, image path below the image folder, question and answer."""

    row: int
    id: str
    image: str
    question: str
    answer: str

    @property
    def sample_id(self):
        """63-bit id made of the content alone, so that noise and order of a sample survive any change of the file.

        >>> first, moved = Annotation(0, "a", "1.png", "What?", "A cat."), Annotation(7, "a", "1.png", "What?", "")
        >>> first.sample_id == moved.sample_id
        True
        """
        text = "\0".join((self.id, self.image, self.question))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True, slots=True)
class Skip:
    """A row that was left out, and why."""

    row: int
    id: str
    reason: str


def read_annotations(source, image_folder, *, max_response_words=350):
    """Read annotated images; a row that cannot be used is skipped and listed, a file that cannot be read is an error.

    Args:
        source: path of a JSON or JSON-lines file, or the list of its rows.
        image_folder: folder that the rows' `image` paths start from.
        max_response_words (`int` or `None`): longer answers are skipped; None keeps all.

    Returns:
        `tuple[list[Annotation], list[Skip]]`, both in the order of the file.

    Raises:
        FileNotFoundError: the file or the image folder does not exist.
        ValueError: the file is not a JSON list, or no row of it can be used.

    Example:

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> Image.new("RGB", (4, 4)).save(folder / "1.png")
    >>> turns = [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A black square."}]
    >>> rows = [{"id": "1", "image": "1.png", "conversations": turns}, {"id": "2", "conversations": turns}]
    >>> annotations, skipped = read_annotations(rows, folder)
    >>> annotations[0].question, annotations[0].answer
    ('What is this?', 'A black square.')
    >>> skipped
    [Skip(row=1, id='2', reason="no 'image' path")]
    """
    image_folder = Path(image_folder)
    if not image_folder.is_dir():
        raise FileNotFoundError(f"image_folder {image_folder} does not exist or is not a folder.")
    if max_response_words is not None and max_response_words < 1:
        raise ValueError(f"max_response_words must be at least 1 or None, but it is {max_response_words}.")
    rows = source if isinstance(source, list) else read_json(source)
    name = "the list of annotations" if isinstance(source, list) else str(source)
    if not isinstance(rows, list):
        raise ValueError(f"{name} must hold a JSON list of rows, but it holds a {type(rows).__name__}.")
    annotations, skipped = [], []
    for row, record in enumerate(rows):
        try:
            annotation = _parse(row, record, max_response_words)
            if not (image_folder / annotation.image).is_file():
                raise ValueError(f"image {annotation.image} does not exist")
        except ValueError as reason:
            skipped.append(Skip(row, _id_of(row, record), str(reason)))
        else:
            annotations.append(annotation)
    if not annotations:
        first = f": row {skipped[0].row} has {skipped[0].reason}" if skipped else ""
        raise ValueError(f"{name} has no usable row among {len(rows)}{first}.")
    return annotations, skipped


def read_image(path):
    """Read a picture whole, upright and in RGB.

    Raises:
        ValueError: the file is missing, or is not a picture that can be decoded to its end.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"image {path} does not exist") from None
    # Pillow's decoders report a damaged file by any of these, by format.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path} cannot be decoded ({error})") from None


def _id_of(row, record):
    return str(record.get("id", row)) if isinstance(record, dict) else str(row)


def _parse(row, record, max_response_words):
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__} where an object is needed")
    image = record.get("image")
    if not isinstance(image, str) or not image:
        raise ValueError("no 'image' path")
    turns = record.get("conversations")
    if not isinstance(turns, list) or len(turns) < 2:
        raise ValueError("no 'conversations' of a question and an answer")
    for turn, speaker in zip(turns[:2], ("human", "gpt"), strict=True):
        if not isinstance(turn, dict) or turn.get("from") != speaker or not isinstance(turn.get("value"), str):
            raise ValueError(f"no text from '{speaker}' where one is expected in the first two turns")
    question, answer = turns[0]["value"], turns[1]["value"].strip()
    tags = question.count(IMAGE_TAG)
    if tags != 1:
        raise ValueError(f"{tags or 'no'} {IMAGE_TAG} in the first question where one is expected")
    question = question.replace(IMAGE_TAG, "").strip()
    if not question:
        raise ValueError("an empty question")
    if IMAGE_TAG in answer:
        raise ValueError(f"{IMAGE_TAG} in the answer")
    check_response(answer, max_response_words)
    # JSON can hold half a surrogate pair, which no file takes later on.
    "".join((image, question, answer)).encode()
    return Annotation(row, _id_of(row, record), image, question, answer)


def check_response(response, max_response_words):
    """Raise ValueError with the reason if `response` is empty or has more words than `max_response_words`."""
    if not response.strip():
        raise ValueError("an empty response")
    words = len(response.split())
    if max_response_words is not None and words > max_response_words:
        raise ValueError(f"a response of {words} words, over max_response_words={max_response_words}")
