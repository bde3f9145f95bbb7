"""Every example of a data set tried before the first training step, so that none of them ends a run later.

An example is tried by the collator itself, alone, so that what passes here is what is trained on.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, DatasetDict, IterableDataset
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset as TorchIterableDataset
from tqdm.auto import tqdm

from bpo_fast.data.images import read_image
from bpo_fast.runs.files import read_json, write_json
from bpo_fast.runs.fingerprint import fingerprint
from bpo_fast.runs.text import printable
from bpo_fast.train.collator import PreferenceCollator
from bpo_fast.train.examples import EXAMPLE_COLUMNS
from bpo_fast.train.loading import available_cores

# Fewer examples than these are tried in this process: starting others would take longer.
_FEW = 256
# Examples between two writes of the cache file.
_BETWEEN_WRITES = 2048


@dataclass(frozen=True, slots=True)
class BadPair:
    """An example that cannot be trained on: number of its row in the data set, its id where it has one, and why."""

    number: int
    id: str | None
    reason: str


def check_columns(name: str, dataset: Any, responses: Sequence[str] = ("chosen", "rejected")) -> None:
    """Refuse a data set that cannot hold preference examples, by its kind and columns.

    Args:
        name: of the data set, for an error.
        dataset: a `datasets.Dataset`, or a sequence of dicts.
        responses: the columns of responses that are trained on.

    Raises:
        ValueError: it is a stream or a dictionary of splits, it is empty, or a column is missing.
    """
    if isinstance(dataset, IterableDataset | TorchIterableDataset):
        raise ValueError(
            f"{name}: found a streaming data set, expected one of known length, since every example is checked before "
            "the first step; load it without streaming."
        )
    if isinstance(dataset, dict):
        splits = f"DatasetDict of {', '.join(map(str, dataset))}" if isinstance(dataset, DatasetDict) else "dict"
        raise ValueError(f"{name}: found a {splits}, expected one data set; choose a split.")
    if isinstance(dataset, str) or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise ValueError(f"{name}: found a {type(dataset).__name__}, expected preference pairs; see bpo_fast.data.")
    if not len(dataset):
        raise ValueError(f"{name}: found no examples, expected at least one.")
    columns = getattr(dataset, "column_names", None)
    if columns is None:
        return
    missing = [column for column in ("prompt", *responses) if column not in columns]
    if not {"images", "image"} & set(columns):
        missing.append("images")
    if missing:
        raise ValueError(
            f"{name}: found columns {sorted(columns)}, expected {missing} too; TRL's vision preference columns are "
            "images, prompt, chosen, rejected."
        )


def check_pairs(
    dataset: Dataset | Sequence[dict],
    collator: PreferenceCollator,
    *,
    cache_file: str | os.PathLike | None = None,
    num_workers: int | None = None,
    strict: bool = False,
    desc: str = "checking pairs",
) -> list[BadPair]:
    """Try every example as training will read it: images decoded to their end, text rendered, tokens counted.

    Args:
        dataset: preference examples, as `PreferenceCollator` takes them.
        collator: of the training.
        cache_file: JSON file that keeps the outcome, so that examples are tried once: a later call with the same
            examples (by their text and the size and time of their image files), processor and lengths reads it, one
            that was killed goes on. A file of anything else is written anew. Not used for a data set of your own
            class.
        num_workers: processes; by default one a core, and none but this for a small data set.
        strict: raise for the first bad examples instead of listing them.
        desc: label of the progress bar.

    Returns:
        The examples that cannot be trained on, in order; empty where all can.

    Raises:
        ValueError: no example can be trained on, or, with `strict`, one cannot.

    Example (with a `dataset` of `load_preference_dataset` and a `collator`):

        bad = check_pairs(dataset, collator, cache_file="bpo/checked.json")
        dataset = dataset.select(sorted(set(range(len(dataset))) - {pair.number for pair in bad}))
    """
    check_columns("dataset", dataset, collator.responses)
    total = len(dataset)
    if not isinstance(dataset, Dataset | list):
        cache_file = None  # what its rows hold is known by reading them, which is what the file would save
    known = None if cache_file is None else _fingerprint(dataset, collator)
    checked, bad = _cached(cache_file, known)
    if checked < total:
        if cache_file is not None:
            Path(cache_file).parent.mkdir(parents=True, exist_ok=True)
        tried = each_row(_Tried(dataset, collator), total, checked, num_workers=num_workers, desc=desc)
        for done, fault in enumerate(tried, start=checked + 1):
            if fault is not None:
                bad.append(fault)
            if cache_file is not None and (done == total or done % _BETWEEN_WRITES == 0):
                write_json(cache_file, {"fingerprint": known, "checked": done, "bad": list(map(asdict, bad))})
    if bad and (strict or len(bad) == total):
        first = "; ".join(f"row {pair.number}: {pair.reason.rstrip('.')}" for pair in bad[:3])
        wanted = "none; mend or drop them" if strict else "at least one that can"
        raise ValueError(
            f"dataset: found {len(bad):,} of {total:,} rows that cannot be trained on ({first}), expected {wanted}."
        )
    return bad


class _Tried:
    """Example number -> what is wrong with it, or None. What the worker processes run."""

    def __init__(self, dataset, collator):
        self.dataset, self.collator = dataset, collator

    def __getitem__(self, number: int) -> BadPair | None:
        example, reason = None, None
        # Decoders, templates and processors report what is wrong with one example by nearly any error.
        try:
            example = self.dataset[number]
            self.collator([example])
        except Exception as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            reason = printable(f"{kind}{error}")[:1000]
        if reason is None:
            return None
        if example is None and isinstance(self.dataset, Dataset):
            example = next(_raw_rows(self.dataset.select([number]), (*EXAMPLE_COLUMNS, "id")))
            reason = _image_fault(example) or reason
        found = example.get("id") if isinstance(example, dict) else None
        return BadPair(number, None if found is None else printable(str(found)), reason)


def each_row(
    function: Any,
    total: int,
    start: int = 0,
    *,
    num_workers: int | None = None,
    batch_size: int = 16,
    desc: str | None = None,
    progress: bool = True,
) -> Iterator[Any]:
    """What `function[number]` gives for each row from `start` on, in order, under a progress bar.

    Args:
        function: an object with `__getitem__`, which worker processes run.
        total: rows.
        start: the first of them.
        num_workers: processes; by default `workers_for` all rows.
        batch_size: rows that a process hands over at once.
        desc: label of the progress bar.
        progress: show it.
    """
    if num_workers is None:
        num_workers = workers_for(total - start)
    workers = {"num_workers": num_workers, "prefetch_factor": 4} if num_workers else {}
    batches = DataLoader(
        function,
        batch_size=batch_size,
        sampler=range(start, total),
        collate_fn=list,
        generator=torch.Generator(),  # training's own random numbers stay as they are
        **workers,
    )
    with tqdm(total=total, initial=start, unit="pair", desc=desc, disable=not progress) as bar:
        for values in batches:
            yield from values
            bar.update(len(values))


def workers_for(num_examples: int) -> int:
    """Processes that read so many examples: one a core, and none but this for few."""
    cores = available_cores()
    return min(cores, 16) if num_examples >= _FEW else 0


def _image_fault(row: dict) -> str | None:
    """What is wrong with the first bad image file of a raw row; None if they are all well."""
    images = row.get("images", row.get("image"))
    for image in images if isinstance(images, list) else [images]:
        if isinstance(image, dict) and image.get("bytes") is None and image.get("path"):
            try:
                read_image(image["path"])
            except ValueError as error:
                return printable(str(error))
    return None


def _cached(cache_file, known: str | None) -> tuple[int, list[BadPair]]:
    """Number of examples that `cache_file` knows of, and the bad ones of those; none for a file that does not fit."""
    if cache_file is None or not Path(cache_file).is_file():
        return 0, []
    try:
        content = read_json(cache_file)
        if content["fingerprint"] != known:
            return 0, []
        return int(content["checked"]), [BadPair(**pair) for pair in content["bad"]]
    except (ValueError, TypeError, KeyError, OSError):
        return 0, []


def _fingerprint(dataset, collator: PreferenceCollator) -> str:
    """Fingerprint of the examples and of all that the outcome depends on."""
    options = [collator.image_token_id, collator.max_length, collator.token_budget, list(collator.responses)]
    options.append(collator.weakening is not None)
    settings = [*options, transformers.__version__, len(dataset), processor_state(collator.processor)]

    def values():
        yield settings
        for row in _raw_rows(dataset) if isinstance(dataset, Dataset) else dataset:
            yield [[name, _plain(row.get(name))] for name in EXAMPLE_COLUMNS] if isinstance(row, dict) else repr(row)

    return fingerprint(values())


def processor_state(processor) -> list[str]:
    """All that a processor's output depends on: its parts' settings, chat templates and vocabulary."""
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    # The last call's padding and truncation are a part of the second.
    words = {name: value for name, value in words.items() if name not in ("padding", "truncation")}
    template = [getattr(processor, "chat_template", None), getattr(tokenizer, "chat_template", None)]
    return [str(processor), json.dumps(template), json.dumps(words, sort_keys=True)]


def _raw_rows(dataset: Dataset, columns: Sequence[str] = EXAMPLE_COLUMNS) -> Iterator[dict]:
    """The rows with their images as they are kept: {"bytes", "path"}, undecoded."""
    names = [name for name in columns if name in dataset.column_names]
    for table in dataset.select_columns(names).with_format("arrow").iter(batch_size=1000):
        yield from table.to_pylist()


def _plain(value: Any) -> Any:
    """A value of a row as JSON has it: a file by size and time, bytes and images by their content."""
    if isinstance(value, dict):
        path = value.get("path")
        if value.keys() == {"bytes", "path"} and value["bytes"] is None and isinstance(path, str):
            return [path, _size_and_time(path)]
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_plain, value))
    if isinstance(value, bytes):
        return fingerprint([value.hex()])
    if isinstance(value, Image.Image):
        if path := getattr(value, "filename", ""):
            return [str(path), _size_and_time(path)]
        try:
            return [value.mode, value.size, fingerprint([value.tobytes().hex()])]
        except (OSError, SyntaxError, ValueError):
            return [value.mode, value.size]  # an image that cannot be decoded, whatever else it holds
    return value if value is None or isinstance(value, str | int | float) else repr(value)


def _size_and_time(path) -> list[int] | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns]
