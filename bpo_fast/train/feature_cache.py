"""Image features and the token ids of prompts, kept: no image is decoded and no vision tower run while training steps.

A prompt's ids are kept beside the features of its images, since how many image tokens it has is known to the processor
alone, when it sees the images. Features are those that the packed forward takes, behind the projector: it is frozen,
as `models.lora` refuses adapters outside the language model. They keep the type that they come in.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn
from transformers import TrainerCallback

from bpo_fast.models.load import base_model
from bpo_fast.models.prompt import encode, image_inputs, prompt_ids
from bpo_fast.runs.tensor_cache import ENTRY_BYTES, TensorCache
from bpo_fast.train.cache_keys import ExampleKeys
from bpo_fast.train.check_pairs import each_row
from bpo_fast.train.collator import PreferenceCollator, example_images
from bpo_fast.train.examples import Examples

# Images that are processed to say how large all will be.
_SAMPLED = 8


def feature_items(keys: Sequence[Sequence[ExampleKeys]]) -> dict[tuple[str, ...], list[tuple[int, int]]]:
    """What is made together: the features of an example's images with the ids of all prompts that show them.

    Args:
        keys: of each example of each data set.

    Returns:
        (images, prompt, prompt, ...) -> (data set, place) of an example of each prompt. Without images each prompt
        stands alone.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for number, each in enumerate(keys):
        for place, example in enumerate(each):
            found.setdefault(example.shown.key or example.prompt, {}).setdefault(example.prompt, (number, place))
    return {tuple(dict.fromkeys([first, *prompts])): list(prompts.values()) for first, prompts in found.items()}


def fill_features(
    tensors: TensorCache,
    items: dict[tuple[str, ...], list[tuple[int, int]]],
    datasets: Sequence[Examples],
    collator: PreferenceCollator,
    compute: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    *,
    report: Callable[[str], object],
    progress: bool,
) -> None:
    """Make the features and ids that are missing; images are processed by workers, one example's at a time.

    Args:
        tensors: loaded with all keys of `items`.
        items: of `feature_items`.
        datasets: that the items name.
        collator: of the training.
        compute: image inputs -> features [M, H].
        report, progress: as those of `TensorCache.fill`.

    Raises:
        ValueError: there is no room for them on the disk.
    """
    keys, sources = list(items), list(items.values())
    collator = replace(collator, features=None, references=None)

    def processed(numbers: Sequence[int]) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
        work = [
            (keys[number][0], _missing_prompts(tensors, keys[number], sources[number]), keys[number][0] not in tensors)
            for number in numbers
        ]
        return each_row(_Processed(work, datasets, collator), len(work), progress=False)

    def make(chunks):
        for (number,), (ids, inputs) in zip(chunks, processed([number for (number,) in chunks]), strict=True):
            features = {keys[number][0]: compute(inputs)} if inputs else {}
            yield ids | features

    def num_bytes(missing: list[int]) -> int:
        sampled = missing[:: -(-len(missing) // _SAMPLED)]
        row_bytes, total = None, 0
        for ids, inputs in processed(sampled):
            if inputs and row_bytes is None:
                row_bytes = compute(inputs)[0].nbytes
            shown = next(iter(ids.values()))
            if inputs:
                total += ENTRY_BYTES + row_bytes * int((shown == collator.image_token_id).sum())
            total += sum(ENTRY_BYTES + x.nbytes for x in ids.values())
        return -(-total * len(missing) // len(sampled))

    tensors.fill(keys, make, num_bytes=num_bytes, unit="image", report=report, progress=progress)


def _missing_prompts(tensors, keys, sources):
    prompts = keys[-len(sources) :]
    missing = [pair for pair in zip(prompts, sources, strict=True) if pair[0] not in tensors]
    return missing or [(prompts[0], sources[0])]


class _Processed:
    """Number -> ids by prompt key, and image inputs where features are missing. What the worker processes run."""

    def __init__(self, work, datasets, collator):
        self.work, self.datasets, self.collator = work, datasets, collator

    def __getitem__(self, number: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        _, prompts, without_features = self.work[number]
        ids, inputs = {}, {}
        for key, (dataset, place) in prompts:
            example = self.datasets[dataset].whole(place)
            images = example_images(example)
            prompt, _ = self.collator.render(example, len(images))
            encoded = encode(self.collator.processor, [prompt], [images])
            ids[key] = torch.tensor(prompt_ids(encoded)[0], dtype=torch.int32)
            if images and without_features and not inputs:
                inputs = image_inputs(encoded)
        return ids, inputs


class VisionOffDevice(TrainerCallback):
    """Keeps the vision part in the host's memory while training steps, which read its features from a cache.

    It comes back when the training ends, or when an image is shown to it all the same.

    Args:
        model: with or without an adapter.
    """

    def __init__(self, model: nn.Module):
        base = base_model(model)
        language = (base.get_decoder(), base.get_input_embeddings(), base.get_output_embeddings())
        used = {id(parameter) for part in language for parameter in part.parameters()}
        self._parameters = [parameter for parameter in base.parameters() if id(parameter) not in used]
        self._modules = [part for part in base.modules() if used.isdisjoint(map(id, part.parameters()))]
        self._devices, self._hooks = [], []

    def on_train_begin(self, args, state, control, **kwargs):
        self._devices = [parameter.device for parameter in self._parameters]
        self._hooks = [part.register_forward_pre_hook(lambda *_: self._restore()) for part in self._modules]
        self._move(["cpu"] * len(self._parameters))

    def on_train_end(self, args, state, control, **kwargs):
        self._restore()

    def _restore(self):
        self._move(self._devices)
        for hook in self._hooks:
            hook.remove()
        self._devices, self._hooks = [], []

    def _move(self, devices):
        for parameter, device in zip(self._parameters, devices, strict=False):
            parameter.data = parameter.data.to(device)
