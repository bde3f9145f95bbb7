"""Published preference data, a record at a time, to TRL's columns.

A format is known by the keys of its records:

- BPO (arXiv 2403.08730): `prompt`, `image`, `completions` of {`score`, `response`, `type`}; each two completions of
  unequal score are a pair.
- RLAIF-V: `image`, `question`, `chosen`, `rejected`. RLHF-V: the last three inside a JSON string `text`.
- POVID: LLaVA-Instruct's `image` and `conversations`, and `rejected_conversations`.
- TRL's own columns, as `bpo_fast.data.pairs` writes them; text alone is taken for a message of one.
"""

import json
from itertools import product
from typing import Any

from bpo_fast.models.conversation import structured
from bpo_fast.runs.text import is_text, printable, shown


def preference_row(image: str, question: str, chosen: str, rejected: str, **extra: Any) -> dict:
    """One preference pair in TRL's columns; `extra` columns are kept beside them.

    >>> pair = preference_row("1.png", "What is this?", "A circle.", "A square.", id="1")
    >>> pair["prompt"]
    [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'What is this?'}]}]
    >>> pair["rejected"][0]["content"][0]["text"], pair["id"]
    ('A square.', '1')
    """

    if not isinstance(image, str):
        raise ValueError(f"found the image {shown(image)}, expected a path")
    for text in (question, chosen, rejected):
        _check_text(text)

    def turn(role, *content):
        return [{"role": role, "content": list(content)}]

    return {
        "images": [image],
        "prompt": turn("user", {"type": "image"}, {"type": "text", "text": question}),
        "chosen": turn("assistant", {"type": "text", "text": chosen}),
        "rejected": turn("assistant", {"type": "text", "text": rejected}),
        **extra,
    }


def to_pairs(record: dict, number: int) -> list[dict]:
    """The preference pairs of a record in any of the formats.

    Args:
        record: of a file of preference data.
        number: of the record in its file, the id of a record that has none.

    Returns:
        Pairs in TRL's columns, with `id` and, for BPO's, `rejected_type`; TRL's own records with messages of parts.

    Raises:
        ValueError: what was found and expected, where the record is in none of the formats or lacks a part of its own.

    Example:

    >>> record = {"image": "1.png", "question": "What is this?", "chosen": "A circle.", "rejected": "A square."}
    >>> to_pairs(record, 0)[0]["chosen"]
    [{'role': 'assistant', 'content': [{'type': 'text', 'text': 'A circle.'}]}]
    """
    if not isinstance(record, dict):
        raise ValueError(f"found a {type(record).__name__}, expected an object")
    for name, keys, convert in _FORMATS:
        if keys <= record.keys():
            found = record.get("id", record.get("idx"))
            try:
                return convert(record, str(number if found is None else found))
            except (KeyError, TypeError, IndexError, AttributeError, json.JSONDecodeError) as error:
                parts = ", ".join(sorted(keys))
                raise ValueError(f"found {parts} with a fault inside ({error!r}), expected those of {name}") from None
    known = ", ".join(dict.fromkeys(name for name, _, _ in _FORMATS))
    keys = printable(", ".join(map(str, record)))[:120]
    raise ValueError(f"found the keys {keys}, expected those of a known format ({known})")


def _from_trl(record, record_id):
    images = record["images"]
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError(f"found images {shown(images)}, expected a list of paths")
    return [record | {name: _messages(record, name) for name in ("prompt", "chosen", "rejected")}]


def _messages(record, name):
    try:
        messages = structured(record[name], name, num_images=len(record["images"]))
    except ValueError as error:
        raise ValueError(str(error).rstrip(".")) from None
    for message in messages:
        for part in message["content"]:
            _check_text(part.get("text", ""))
    return messages


def _check_text(text):
    if not is_text(text):
        raise ValueError(f"found the text {shown(text)}, expected one that a file takes")


def _from_bpo(record, record_id):
    image, question = record["image"], _untagged(record["prompt"])
    return [
        preference_row(
            image, question, better["response"], worse["response"], id=record_id, rejected_type=str(worse.get("type"))
        )
        for better, worse in product(record["completions"], repeat=2)
        if better["score"] > worse["score"]
    ]


def _from_rlaif_v(record, record_id):
    question = _untagged(record["question"])
    return [preference_row(record["image"], question, record["chosen"], record["rejected"], id=record_id)]


def _from_rlhf_v(record, record_id):
    path = record.get("image_path") or record["image"]
    return _from_rlaif_v(json.loads(record["text"]) | {"image": path}, record_id)


def _from_povid(record, record_id):
    question, chosen = record["conversations"][0]["value"], record["conversations"][1]["value"]
    rejected = record["rejected_conversations"][1]["value"]
    return [preference_row(record["image"], _untagged(question), chosen, rejected, id=record_id)]


def _untagged(question):
    return question.replace("<image>", "").replace("<img>", "").strip()


# Name, the keys that tell the format, and the pairs of a record.
_FORMATS = (
    ("TRL", {"images", "prompt", "chosen", "rejected"}, _from_trl),
    ("BPO", {"image", "prompt", "completions"}, _from_bpo),
    ("RLAIF-V", {"image", "question", "chosen", "rejected"}, _from_rlaif_v),
    ("POVID", {"image", "conversations", "rejected_conversations"}, _from_povid),
    ("RLHF-V", {"image_path", "text"}, _from_rlhf_v),
    ("RLHF-V", {"image", "text"}, _from_rlhf_v),
)
