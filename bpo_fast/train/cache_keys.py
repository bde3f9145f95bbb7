"""What the caches of a training are known by: the settings of a whole cache, and the keys of each example."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset
from PIL import Image
from torch import nn

from bpo_fast.models.load import base_model
from bpo_fast.models.tensors import tensors_fingerprint
from bpo_fast.runs.fingerprint import fingerprint
from bpo_fast.train.check_pairs import each_row, processor_state
from bpo_fast.train.collator import PreferenceCollator, example_images
from bpo_fast.train.examples import Examples, ImagesShown
from bpo_fast.train.kept import digest, pair_key, prompt_key

# Raised when what a cache holds under the same keys changes.
_FORMAT = 1


def default_cache_dir() -> Path:
    """`bpo_fast` in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "bpo_fast")


def cache_settings(
    model: nn.Module, processor: Any, mixed_precision: str, *, progress: bool = False
) -> dict[str, Any]:
    """All that features and reference log-probs depend on beside the data, as JSON values.

    Args:
        model: with its adapter, which does not count; one that was merged is a part of the weights.
        processor: its settings, vocabulary and chat template count.
        mixed_precision: of autocast: "no", "bf16" or "fp16".
        progress: show a bar while the weights are read.
    """
    base = base_model(model)
    quantization = getattr(base.config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    return {
        "format": _FORMAT,
        "model": tensors_fingerprint(model, progress=progress),
        "dtype": str(base.dtype).removeprefix("torch."),
        "autocast": mixed_precision,
        "quantization": json.loads(json.dumps(quantization, default=str)),
        "processor": fingerprint(processor_state(processor)),
        "transformers": transformers.__version__,
    }


@dataclass(frozen=True, slots=True)
class ExampleKeys:
    """What is kept for an example: features of the images it shows, ids of its prompt, log-probs of its pair."""

    shown: ImagesShown
    prompt: str
    pair: str


def example_keys(examples: Examples, collator: PreferenceCollator, *, desc: str, progress: bool) -> list[ExampleKeys]:
    """The keys of every example, in order.

    An image counts by the bytes of its file, or, where there is none, by its pixels as a model sees them; prompts and
    answers by the text that the chat template makes of them. No image of a file is decoded.
    """
    return list(each_row(_Keys(examples, collator), len(examples), desc=desc, progress=progress))


class _Keys:
    """Number of an example -> its keys. What the worker processes run."""

    def __init__(self, examples: Examples, collator: PreferenceCollator):
        self.examples, self.collator = examples, collator
        self.raw, dataset = None, examples.dataset
        # A transform of the user's own decides what an example is; its rows are read as training reads them.
        if isinstance(dataset, Dataset) and dataset.format["type"] is None:
            names = [name for name in ("images", "image") if name in dataset.column_names]
            self.raw = dataset.select_columns(names[:1]).with_format("arrow")
            self.text = dataset.select_columns([name for name in dataset.column_names if name not in names])

    def __getitem__(self, place: int) -> ExampleKeys:
        number = self.examples.numbers[place]
        marks = None if self.raw is None else _files(self.raw[number])
        if marks is None:
            example = self.examples.whole(place)
            marks = list(map(_pixels, example_images(example)))
        else:
            example = self.text[number]
        # Some families cut an image otherwise where a prompt shows several.
        shown = ImagesShown(f"images-{digest(marks)}" if marks else None, len(marks))
        prompt, answers = self.collator.render(example, shown.count)
        pair = pair_key(shown, prompt, answers, self.collator.max_length, self.collator.weakening)
        return ExampleKeys(shown, prompt_key(shown, prompt), pair)


def _files(row: Any) -> list[str] | None:
    """The SHA-256 of each image of an Arrow row as it is kept, its bytes or its file; None where that is neither."""
    (images,) = row.column(0).to_pylist()
    marks = []
    for image in images if isinstance(images, list) else [] if images is None else [images]:
        if not isinstance(image, dict) or (image["bytes"] is None and not os.path.isfile(image["path"])):
            return None
        if image["bytes"] is not None:
            marks.append(f"file {hashlib.sha256(image['bytes']).hexdigest()}")
        else:
            with open(image["path"], "rb") as file:
                marks.append(f"file {hashlib.file_digest(file, 'sha256').hexdigest()}")
    return marks


def _pixels(image: Image.Image) -> str:
    return f"pixels {image.size} {hashlib.sha256(image.tobytes()).hexdigest()}"
