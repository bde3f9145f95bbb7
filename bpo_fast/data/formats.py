"""Published preference data, a row at a time, to TRL's columns.

A format is known by the keys of its rows:

- BPO (arXiv 2403.08730): `prompt`, `image`, `completions` of {`score`, `response`, `type`}; each two completions of
  unequal score are a pair.
- RLAIF-V: `image`, `question`, `chosen`, `rejected`. RLHF-V: the last three inside a JSON string `text`.
- POVID: LLaVA-Instruct's `image` and `conversations`, and `rejected_conversations`.
- TRL's own columns, as `bpo_fast.data.pairs` writes them.
"""

import json
from itertools import product

_IMAGE_TAGS = ("<image>", "<img>")


def preference_row(image, question, chosen, rejected, **extra):
    """One preference pair in TRL's columns; `extra` columns are kept beside them.

    >>> row = preference_row("1.png", "What is this?", "A circle.", "A square.", id="1")
    >>> row["prompt"]
    [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'What is this?'}]}]
    >>> row["rejected"][0]["content"][0]["text"], row["id"]
    ('A square.', '1')
    """

    def turn(role, *content):
        return [{"role": role, "content": list(content)}]

    return {
        "images": [image],
        "prompt": turn("user", {"type": "image"}, {"type": "text", "text": question}),
        "chosen": turn("assistant", {"type": "text", "text": chosen}),
        "rejected": turn("assistant", {"type": "text", "text": rejected}),
        **extra,
    }


def to_preference_rows(row, number):
    """The preference pairs of a row in any of the formats.

    Args:
        row (`dict`): the row.
        number (`int`): its number, the id of a row that has none.

    Returns:
        `list[dict]` in TRL's columns, with `id` and, for BPO's, `rejected_type`; TRL's own rows come back as they are.

    Raises:
        ValueError: the row is in none of the formats, or lacks a part of its own.

    Example:

    >>> row = {"image": "1.png", "question": "What is this?", "chosen": "A circle.", "rejected": "A square."}
    >>> to_preference_rows(row, 0)[0]["chosen"]
    [{'role': 'assistant', 'content': [{'type': 'text', 'text': 'A circle.'}]}]
    """
    if not isinstance(row, dict):
        raise ValueError(f"it is a {type(row).__name__}, expected an object")
    for keys, convert in _FORMATS:
        if keys <= row.keys():
            try:
                return convert(row, str(row.get("id", row.get("idx", number))))
            except (KeyError, TypeError, IndexError, AttributeError) as error:
                raise ValueError(f"it has {', '.join(sorted(keys))} but not all of their parts ({error!r})") from None
    raise ValueError(
        f"it has the keys {', '.join(map(str, row))}, which are those of no known format (TRL, BPO, RLAIF-V, RLHF-V, "
        "POVID)"
    )


def _from_trl(row, row_id):
    images = row["images"]
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError(f"its images must be a list of paths, but they are {images!r}")
    return [row]


def _from_bpo(row, row_id):
    question = _untagged(row["prompt"])
    return [
        preference_row(
            row["image"],
            question,
            chosen["response"],
            rejected["response"],
            id=row_id,
            rejected_type=str(rejected.get("type")),
        )
        for chosen, rejected in product(row["completions"], repeat=2)
        if chosen["score"] > rejected["score"]
    ]


def _from_rlaif_v(row, row_id):
    return [preference_row(row["image"], _untagged(row["question"]), row["chosen"], row["rejected"], id=row_id)]


def _from_rlhf_v(row, row_id):
    path = row.get("image_path") or row["image"]
    return _from_rlaif_v(json.loads(row["text"]) | {"image": path}, row_id)


def _from_povid(row, row_id):
    question, chosen = row["conversations"][0]["value"], row["conversations"][1]["value"]
    rejected = row["rejected_conversations"][1]["value"]
    return [preference_row(row["image"], _untagged(question), chosen, rejected, id=row_id)]


def _untagged(question):
    for tag in _IMAGE_TAGS:
        question = question.replace(tag, "")
    return question.strip()


_FORMATS = (
    ({"images", "prompt", "chosen", "rejected"}, _from_trl),
    ({"image", "prompt", "completions"}, _from_bpo),
    ({"image", "question", "chosen", "rejected"}, _from_rlaif_v),
    ({"image", "conversations", "rejected_conversations"}, _from_povid),
    ({"image_path", "text"}, _from_rlhf_v),
    ({"image", "text"}, _from_rlhf_v),
)
