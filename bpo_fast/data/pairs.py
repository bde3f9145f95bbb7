"""Preference pairs in TRL's vision columns: written as JSON lines beside metadata, read as a `datasets.Dataset`.

A line of `pairs.jsonl` has TRL's conversational columns, its pictures given by path below the image folder:

    {"images": ["coco/1.jpg"],
     "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}],
     "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "A red circle."}]}],
     "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "A red circle and a blue square."}]}],
     "id": "1", ...}

`metadata.json` holds `settings` (how the pairs were made), `image_folder` and `counts`.
"""

import hashlib
import json
import os
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, Features, Image, List, Value, load_from_disk
from datasets.table import InMemoryTable

from bpo_fast.data.formats import to_preference_rows
from bpo_fast.runs.files import read_json, write_jsonl

PAIRS_FILE = "pairs.jsonl"
METADATA_FILE = "metadata.json"
COLUMNS = ("images", "prompt", "chosen", "rejected")

_TURNS = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
_FEATURES = {"images": List(Image(mode="RGB")), "prompt": _TURNS, "chosen": _TURNS, "rejected": _TURNS}


def write_pairs(path, rows):
    """Write rows of `preference_row` as JSON lines, whole or not at all."""
    write_jsonl(path, rows)


def load_preference_dataset(path, *, image_folder=None):
    """Load preference pairs as a data set that TRL's and bpo-fast's trainers take.

    Args:
        path: folder that `bpo-fast bootstrap` wrote; a JSON or JSON-lines file in that form or in one of the published
            ones that `bpo_fast.data.formats` lists; or a folder written by `Dataset.save_to_disk` with TRL's columns.
        image_folder: folder that the picture paths start from; by default the one the metadata names, or for a lone
            file the folder it lies in. Not for `save_to_disk` folders, which hold their pictures.

    Returns:
        `datasets.Dataset` with columns `images` (list of RGB pictures, decoded when read), `prompt`, `chosen`,
        `rejected` (conversations) and whatever else the rows have.

    Raises:
        FileNotFoundError: nothing at `path`, or a picture of a row is missing.
        ValueError: the folder holds no pairs, an unfinished run, or rows without the columns.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"dataset {path} does not exist.")
    if (path / "dataset_info.json").is_file():
        if image_folder is not None:
            raise ValueError(f"image_folder is of no use for {path}, a saved data set that holds its pictures.")
        dataset = load_from_disk(str(path))
        _check_columns(dataset.column_names, path)
        return dataset
    if path.is_dir():
        pairs, folder = path / PAIRS_FILE, _folder_of(path)
    else:
        pairs, folder = path, path.parent
    rows = []
    records = read_json(pairs)
    if not isinstance(records, list):
        raise ValueError(f"{pairs} must hold a JSON list of rows, but it holds a {type(records).__name__}.")
    for number, record in enumerate(records):
        try:
            rows += to_preference_rows(record, number)
        except ValueError as error:
            raise ValueError(f"row {number} of {pairs} is no preference pair: {error}.") from None
    if not rows:
        raise ValueError(f"{pairs} holds no pairs.")
    return _to_dataset(rows, Path(image_folder or folder), pairs)


def fingerprint(dataset):
    """Hash of the questions and responses of a data set, which tells one set of pairs from another."""
    digest = hashlib.sha256()
    for batch in dataset.select_columns(["prompt", "chosen", "rejected"]).iter(batch_size=1000):
        digest.update(json.dumps(batch).encode())
    return f"sha256:{digest.hexdigest()}"


def _folder_of(path):
    if not (path / METADATA_FILE).is_file():
        raise ValueError(f"dataset {path} holds neither {METADATA_FILE} nor a saved data set.")
    if not (path / PAIRS_FILE).is_file():
        raise ValueError(
            f"dataset {path} is an unfinished bootstrap: run the same bootstrap command again to finish it."
        )
    return read_json(path / METADATA_FILE)["image_folder"]


def _check_columns(columns, path):
    missing = [name for name in COLUMNS if name not in columns]
    if missing:
        raise ValueError(f"{path} lacks the column {missing[0]!r}: it must have {', '.join(COLUMNS)}.")


def _to_dataset(rows, image_folder, path):
    columns = {name: [] for name in rows[0]}
    for number, row in enumerate(rows):
        if row.keys() != columns.keys():
            raise ValueError(f"pair {number} of {path} has other columns than the first one ({', '.join(columns)}).")
        for name, values in columns.items():
            values.append(row[name])
    paths = [[os.path.join(image_folder, image) for image in images] for images in columns["images"]]
    missing = [image for images in paths for image in images if not os.path.isfile(image)]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} images of {path} are missing, the first is {missing[0]}: give the image_folder."
        )
    columns["images"] = [[{"bytes": None, "path": image} for image in images] for images in paths]
    # Dataset.from_dict would encode value by value in Python: half a minute for the paper's 170,000 pairs.
    try:
        extra = pa.table({name: values for name, values in columns.items() if name not in COLUMNS})
        features = Features({**_FEATURES, **Features.from_arrow_schema(extra.schema)})
        table = pa.table(columns, schema=features.arrow_schema)
    except pa.ArrowException as error:
        raise ValueError(
            f"{path} has a value that is not of its column's type ({error}): prompt, chosen and rejected are lists of "
            "{role, content: [{type, text}]}, other columns of one type throughout."
        ) from None
    return Dataset(InMemoryTable(table))
