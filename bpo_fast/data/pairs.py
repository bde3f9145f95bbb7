"""Preference pairs in TRL's vision columns, read as a `datasets.Dataset`.

A folder of `bpo-fast bootstrap` holds them as Parquet shards (`bpo_fast.data.parquet`) with a manifest. A file of JSON
lines has TRL's conversational columns, its images given by path below the image folder:

    {"images": ["coco/1.jpg"],
     "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}],
     "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "A red circle."}]}],
     "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "A red circle and a blue square."}]}],
     "id": "1", ...}

A folder of `pairs.jsonl` beside a `metadata.json` that names the `image_folder` is read as well.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetInfo, Features, Image, List, load_from_disk
from datasets.table import InMemoryTable

from bpo_fast.data.formats import to_pairs
from bpo_fast.data.images import image_path, read_image, upright_rgb
from bpo_fast.data.parquet import TURNS, read_shards
from bpo_fast.runs.files import read_json, write_jsonl
from bpo_fast.runs.fingerprint import fingerprint
from bpo_fast.runs.text import shown

PAIRS_FILE = "pairs.jsonl"
METADATA_FILE = "metadata.json"
SKIPPED_FILE = "skipped.jsonl"
MANIFEST_FILE = "manifest.json"  # the last file of a folder of shards: checksums, counts and settings
CARD_FILE = "README.md"
COLUMNS = ("images", "prompt", "chosen", "rejected")


@dataclass
class _UprightImage(Image):
    """datasets' image column, decoded as `read_image` does it."""

    def decode_example(self, value, token_per_repo_id=None):
        if isinstance(value, dict) and value["bytes"] is not None:
            return read_image(value["bytes"], value["path"] or "image")
        if isinstance(value, dict) and value["path"] is not None:
            return read_image(value["path"])
        return upright_rgb(super().decode_example(value, token_per_repo_id))


_FEATURES = {"images": List(_UprightImage()), "prompt": TURNS, "chosen": TURNS, "rejected": TURNS}


def write_pairs(path: str | os.PathLike, pairs: Iterable[dict]) -> None:
    """Write pairs of `preference_row` as JSON lines, whole or not at all."""
    write_jsonl(path, pairs)


def load_preference_dataset(path: str | os.PathLike, *, image_folder: str | os.PathLike | None = None) -> Dataset:
    """Load preference pairs as a data set that TRL's and bpo-fast's trainers take.

    Args:
        path: folder that `bpo-fast bootstrap` wrote; a JSON or JSON-lines file in that form or in one of the published
            ones that `bpo_fast.data.formats` lists; or a folder written by `Dataset.save_to_disk` with TRL's columns.
        image_folder: folder that the image paths start from; by default the one the metadata names, or for a lone file
            the folder it lies in. Not for `save_to_disk` folders, which hold their images.

    Returns:
        Columns `images` (list of RGB images, decoded when read, as `read_image` does it), `prompt`, `chosen`,
        `rejected` (conversations) and whatever else the records have. An image may be missing or damaged; its row
        then cannot be read, and `bpo_fast.train.check_pairs` lists it.

    Raises:
        FileNotFoundError: nothing at `path`, or no pair has its image.
        ValueError: the folder holds no pairs, an unfinished run, or records without the columns; a path leaves the
            image folder.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"dataset: found nothing at '{path}', expected preference pairs.")
    if (path / "dataset_dict.json").is_file():
        raise ValueError(f"dataset: found several splits saved in '{path}', expected one; give the folder of a split.")
    if (path / "dataset_info.json").is_file():
        if image_folder is not None:
            raise ValueError(f"image_folder: found '{image_folder}', expected None for the saved data set '{path}'.")
        try:
            dataset = load_from_disk(str(path))
        # A damaged Arrow or JSON file, or one that lacks.
        except (OSError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
            raise ValueError(
                f"dataset: found a saved data set in '{path}' that cannot be read ({shown(str(error))}), expected a "
                "whole one; save it again."
            ) from None
        missing = [name for name in COLUMNS if name not in dataset.column_names]
        if missing:
            raise ValueError(f"{path}: found no column '{missing[0]}', expected {', '.join(COLUMNS)}.")
        return dataset
    if (path / MANIFEST_FILE).is_file():
        return _from_shards(path, image_folder)
    if path.is_dir():
        file, metadata = path / PAIRS_FILE, path / METADATA_FILE
        if not metadata.is_file():
            raise ValueError(f"dataset: found no {METADATA_FILE} in '{path}', expected pairs or a saved data set.")
        if not file.is_file():
            raise ValueError(
                f"dataset: found an unfinished bootstrap in '{path}', expected {MANIFEST_FILE}; run the same "
                "bootstrap command again to finish it."
            )
        content = read_json(metadata)
        default_folder = content.get("image_folder") if isinstance(content, dict) else None
        if image_folder is None and not isinstance(default_folder, str):
            raise ValueError(f"{metadata}: found no image_folder, expected that of the pairs; give one yourself.")
    else:
        file, default_folder = path, path.parent
    records = read_json(file)
    if not isinstance(records, list):
        raise ValueError(f"{file}: found a {type(records).__name__}, expected a JSON list of records.")
    pairs = []
    for number, record in enumerate(records):
        try:
            pairs += to_pairs(record, number)
        except ValueError as error:
            raise ValueError(f"{file}, record {number}: {error}.") from None
    if not pairs:
        raise ValueError(f"{file}: found no pairs, expected at least one.")
    return _to_dataset(pairs, Path(default_folder if image_folder is None else image_folder), file)


def dataset_fingerprint(dataset: Dataset) -> str:
    """Fingerprint of what a data set's examples are made of, which tells one set of pairs from another.

    Conversations count whole, an image by the name and size of its file, or the size of its bytes: the folder may
    move, and the files of a large data set are not read again each time.
    """
    made_of = ("images", "image", "prompt", "chosen", "rejected", "tools", "chat_template_kwargs")
    made_of += ("chosen_token_weights", "rejected_token_weights")
    names = [name for name in made_of if name in dataset.column_names]

    def rows():
        for row in undecoded_rows(dataset.select_columns(names)):
            images = [row.pop(name) for name in ("images", "image") if name in row]
            yield [row, [list(map(_image_mark, each if isinstance(each, list) else [each])) for each in images]]

    return fingerprint(rows())


def count_skipped(path: str | os.PathLike) -> Counter:
    """Why records gave no pair -> how many, of a folder that `bpo-fast bootstrap` wrote; nothing of other pairs."""
    file = Path(path) / SKIPPED_FILE
    return Counter(skip.get("cause") or skip["reason"] for skip in read_json(file)) if file.is_file() else Counter()


def undecoded_rows(dataset: Dataset) -> Iterator[dict]:
    """The rows of a data set, few at a time, with each image as {bytes, path}: its file is not read."""
    for table in dataset.with_format("arrow").iter(batch_size=100):
        yield from table.to_pylist()


def _image_mark(image):
    if not isinstance(image, dict):
        return None
    path, content = image.get("path"), image.get("bytes")
    try:
        size = len(content) if content is not None else os.stat(path).st_size
    except (OSError, TypeError, ValueError):
        size = None
    return [None if path is None else os.path.basename(path), size]


def _from_shards(folder, image_folder):
    """The pairs of a folder whose manifest says that it is whole."""
    manifest = read_json(folder / MANIFEST_FILE)
    try:
        files, embedded = manifest["files"], manifest["embed_images"]
        sizes = {name: (each["bytes"], each["rows"]) for name, each in files.items()}
    except (KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{folder / MANIFEST_FILE}: found no list of files, expected that of a bootstrap; run the same bootstrap "
            "command again."
        ) from None
    if embedded and image_folder is not None:
        raise ValueError(
            f"image_folder: found '{image_folder}', expected None for '{folder}', which holds its images."
        )
    table = read_shards(folder, sizes, in_memory=not embedded)
    features = Features({**Features.from_arrow_schema(table.schema), **_FEATURES})
    if not embedded:
        table = _with_paths(table, image_folder, folder)
    return Dataset(table, info=DatasetInfo(features=features))


def _with_paths(table, image_folder, folder):
    """The table with its images below `image_folder`, or where they were."""
    if image_folder is None:
        paths = pc.list_flatten(table["images"]).combine_chunks().field("path").to_pylist()
    else:
        paths = [str(image_path(image_folder, name)) for name in table["image_name"].to_pylist()]
        images = [[{"bytes": None, "path": path}] for path in paths]
        place = table.schema.get_field_index("images")
        field = table.schema.field(place)
        table = InMemoryTable(table.table.set_column(place, field, pa.array(images, type=field.type)))
    _check_images(folder, dict.fromkeys(paths))
    return table


def _check_images(where, paths):
    """Refuse pairs none of whose images is there."""
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing and len(missing) == len(paths):
        raise FileNotFoundError(
            f"{where}: found none of its {len(paths)} images, the first is {missing[0]}, expected them; give the "
            "image_folder."
        )


def _to_dataset(pairs, image_folder, file):
    columns = {name: [] for name in pairs[0]}
    for number, pair in enumerate(pairs):
        if pair.keys() != columns.keys():
            raise ValueError(
                f"{file}, pair {number}: found the columns {', '.join(pair)}, expected those of the first pair "
                f"({', '.join(columns)})."
            )
        for name, values in columns.items():
            values.append(pair[name])
    paths = {}
    for number, images in enumerate(columns["images"]):
        for name in images:
            if name not in paths:
                try:
                    paths[name] = str(image_path(image_folder, name))
                except ValueError as error:
                    raise ValueError(f"{file}, pair {number}: {error}") from None
    _check_images(file, paths.values())
    columns["images"] = [[{"bytes": None, "path": paths[image]} for image in images] for images in columns["images"]]
    # Dataset.from_dict would encode value by value in Python: half a minute for the paper's 170,000 pairs.
    try:
        extra = pa.table({name: values for name, values in columns.items() if name not in COLUMNS})
        features = Features({**_FEATURES, **Features.from_arrow_schema(extra.schema)})
        table = pa.table(columns, schema=features.arrow_schema)
    except (pa.ArrowException, UnicodeError, OverflowError, TypeError) as error:
        raise ValueError(
            f"{file}: found a value that is not of its column's type ({error}), expected prompt, chosen and rejected "
            "as lists of {role, content: [{type, text}]} and other columns of one type throughout."
        ) from None
    return Dataset(InMemoryTable(table), info=DatasetInfo(features=features))
