"""Preference pairs in the shapes that other trainers read.

- `llava`: LLaVA-Instruct's `id`, `image`, `conversations`, and `rejected_conversations` as POVID has them; a chosen
  response alone gives a record of LLaVA-Instruct.
- `rlaif`: RLAIF-V's `image`, `question`, `chosen`, `rejected`; single questions only.
- `llamafactory`: LLaMA-Factory's sharegpt form with ranking, and the `dataset_info.json` that names it.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpo_fast.data.pairs import load_preference_dataset, undecoded_rows
from bpo_fast.models.conversation import IMAGE_TAG
from bpo_fast.runs.files import json_text, replacing, write_json

_SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}
PAIRS_FILE, IMAGES_FOLDER = "pairs.json", "images"


@dataclass(frozen=True, slots=True)
class Exported:
    """What came of an export.

    Attributes:
        pairs: number of records written.
        left_out: pairs that the form has no place for.
    """

    pairs: int
    left_out: int


def export_pairs(dataset: str | os.PathLike, output_dir: str | os.PathLike, form: str) -> Exported:
    """Write preference pairs as `pairs.json` in another form.

    Images stay where they are, named by their absolute paths; those that lie inside the data set are written to
    `images/` beside `pairs.json` and named from there.

    Args:
        dataset: anything that `load_preference_dataset` takes.
        output_dir: folder of the files.
        form: one of `FORMS`.

    Raises:
        FileNotFoundError, ValueError: as of `load_preference_dataset`, or an unknown form, or one that has no place
            for any of the pairs.
    """
    if form not in FORMS:
        raise ValueError(f"format: found {form!r}, expected one of {', '.join(FORMS)}.")
    pairs, folder, left_out = load_preference_dataset(dataset), Path(output_dir), 0
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    with replacing(folder / PAIRS_FILE) as file:
        for number, row in enumerate(undecoded_rows(pairs)):
            images = [_image_file(image, folder) for image in row["images"]]
            record = FORMS[form](row, images, str(row.get("id", number)))
            if record is None:
                left_out += 1
                continue
            file.write(f"{',' if count else '['}\n{json_text(record)}")
            count += 1
        if not count:
            raise ValueError(f"format: found {len(pairs):,} pairs, none of which {form} has a place for.")
        file.write("\n]\n")
    if form == "llamafactory":
        columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "images": "images"}
        entry = {"file_name": PAIRS_FILE, "ranking": True, "formatting": "sharegpt", "columns": columns}
        write_json(folder / "dataset_info.json", {"bpo_fast": entry})
    return Exported(count, left_out)


def _image_file(image, folder):
    """Name of an image's file, which is written if there is none."""
    if image["bytes"] is None:
        return image["path"]
    suffix = Path(image["path"] or "").suffix
    name = f"{IMAGES_FOLDER}/{hashlib.sha256(image['bytes']).hexdigest()[:24]}{suffix}"
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        with replacing(path, binary=True) as file:
            file.write(image["bytes"])
    return name


def _text(message):
    """The text of a message, its images as tags at their places."""
    parts = (IMAGE_TAG if part["type"] == "image" else part["text"] for part in message["content"])
    return "\n".join(parts)


def _turns(messages):
    return [{"from": _SPEAKERS[message["role"]], "value": _text(message)} for message in messages]


def _llava(row, images, pair_id):
    prompt = _turns(row["prompt"])
    record = {"id": pair_id, "image": images[0], "conversations": [*prompt, *_turns(row["chosen"])]}
    if row["rejected"]:
        record["rejected_conversations"] = [*prompt, *_turns(row["rejected"])]
    return record


def _rlaif(row, images, pair_id):
    if not row["rejected"] or len(row["prompt"]) > 1:
        return None
    question = _text(row["prompt"][0]).replace(IMAGE_TAG, "").strip()
    chosen, rejected = (_text(row[name][0]) for name in ("chosen", "rejected"))
    return {"idx": pair_id, "image": images[0], "question": question, "chosen": chosen, "rejected": rejected}


def _llamafactory(row, images, pair_id):
    if not row["rejected"]:
        return None
    chosen, rejected = _turns(row["chosen"]), _turns(row["rejected"])
    return {"conversations": _turns(row["prompt"]), "chosen": chosen[0], "rejected": rejected[0], "images": images}


# Name -> what makes a record of a row, its image files and its id; None where the form has no place for it.
FORMS: dict[str, Callable[[dict[str, Any], list[str], str], dict[str, Any] | None]] = {
    "llava": _llava,
    "rlaif": _rlaif,
    "llamafactory": _llamafactory,
}
