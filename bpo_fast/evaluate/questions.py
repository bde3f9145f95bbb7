"""Questions of an evaluation, in one form whatever file they come from."""

from collections.abc import Mapping
from typing import Any

from bpo_fast.runs.text import is_text, shown

# Names of published question files -> ours: POPE's (Li et al., arXiv 2305.10355) and those of LLaVA's own evaluation.
_NAMES = {"question_id": "id", "text": "question"}


def normalise_question(record: Any, number: int) -> dict:
    """A record of a question file with the names that an evaluation reads: `id`, `image`, `question`, and its truth.

    Args:
        record: of the file: in these names, or with `question_id` and `text` as POPE's own files have them. Other
            fields stay. The tag <image>, by which some files mark the image's place, is taken out of the question.
        number: of the record in its file.

    Returns:
        The record under our names, its other values as they were.

    Raises:
        ValueError: the record is not an object, or its `id`, `image` or `question` is there and cannot be one.

    Example:

    >>> record = {"question_id": 1, "image": "1.jpg", "text": "Is there a dog?", "label": "Yes"}
    >>> normalise_question(record, 0)
    {'id': 1, 'image': '1.jpg', 'question': 'Is there a dog?', 'label': 'Yes'}
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"questions, record {number}: found a {type(record).__name__}, expected an object.")
    renamed = {old: new for old, new in _NAMES.items() if new not in record}
    question = {renamed.get(name, name): value for name, value in record.items()}
    if isinstance(question.get("question"), str):
        question["question"] = question["question"].replace("<image>", "", 1).strip()
    for name, wanted in (
        ("id", "a text or a whole number"),
        ("image", "the path of an image"),
        ("question", "a text"),
    ):
        if name not in question:
            continue
        value = question[name]
        whole = name == "id" and isinstance(value, int) and not isinstance(value, bool)
        if not whole and not (is_text(value) and value.strip()):
            raise ValueError(f"questions, record {number}: found {name} {shown(value)}, expected {wanted}.")
    if "<image>" in question.get("question", ""):
        raise ValueError(f"questions, record {number}: found several <image> in its question, expected one image.")
    return question
