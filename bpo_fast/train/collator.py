"""Preference examples to packed sequences: prompts, images, groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import ProcessorMixin

from bpo_fast.losses.preference import Batch
from bpo_fast.models.packing import Group, Packing, pack, plan_sequences
from bpo_fast.models.prompt import answer_ids, encode, image_inputs, prompt_ids, render, shorten


@dataclass
class PackedSequence:
    """One packed sequence of a batch and the images that its prefixes show.

    Attributes:
        packing: its index tensors.
        image_inputs: the processor's image tensors (`pixel_values`, ...), empty without images.
        image_rows: int64 [M], the positions of its image tokens.
        batch: the whole batch, of which this sequence holds some groups; means are over the batch.
    """

    packing: Packing
    image_inputs: dict[str, torch.Tensor]
    image_rows: torch.Tensor
    batch: Batch

    def _map(self, function) -> PackedSequence:
        images = {name: function(tensor) for name, tensor in self.image_inputs.items()}
        return PackedSequence(function(self.packing), images, function(self.image_rows), self.batch)

    def to(self, device, non_blocking: bool = False) -> PackedSequence:
        """The same sequence with its tensors on `device`."""
        return self._map(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedSequence:
        """The same sequence with its tensors in page-locked memory."""
        return self._map(lambda value: value.pin_memory())


@dataclass
class PreferenceCollator:
    """Makes packed sequences of examples in TRL's vision preference columns.

    An example has `prompt`, `chosen` and, unless only the chosen answers are trained on, `rejected` as lists of chat
    messages, and `images` (a list) or `image`. Tokens are those of TRL's DPOTrainer; see `models.prompt`.

    Args:
        processor: of the model; its tokenizer and chat template are used.
        image_token_id: id of the placeholder that an image feature replaces.
        max_length: most positions of prompt and response together; a longer response is cut at its end.
        token_budget: most tokens of one packed sequence; None packs the batch in one.
        responses: columns that become a group's branches, in this order.
    """

    processor: ProcessorMixin
    image_token_id: int | None
    max_length: int | None = None
    token_budget: int | None = None
    responses: Sequence[str] = ("chosen", "rejected")

    def __call__(self, examples: list[dict]) -> dict[str, list[PackedSequence]]:
        """Collate a batch.

        Returns:
            {"sequences": [...]}: as many packed sequences as the token budget asks for.

        Raises:
            ValueError: a prompt fills `max_length`, a response has no tokens, or a prompt's image placeholders are not
                as many as its images.
        """
        images = [self._images(example) for example in examples]
        rendered = [self._render(example, len(shown)) for example, shown in zip(examples, images, strict=True)]
        prompts = [prompt for prompt, _ in rendered]
        encoded = encode(self.processor, prompts, images)
        groups = [
            Group(ids, [self._answer_ids(ids, prompt, answer) for answer in answers])
            for ids, (prompt, answers) in zip(prompt_ids(encoded), rendered, strict=True)
        ]
        batch = Batch(len(groups), sum(len(group.branches[0]) for group in groups))
        plan = plan_sequences([len(group) for group in groups], self.token_budget)
        sequences = []
        for members in plan:
            if len(plan) > 1:
                # Image tensors cannot be parted in general, so each sequence's images are processed by themselves.
                encoded = encode(self.processor, [prompts[n] for n in members], [images[n] for n in members])
            packing = pack([groups[n] for n in members])
            image_rows = torch.nonzero(packing.input_ids == self.image_token_id).flatten()
            sequences.append(PackedSequence(packing, image_inputs(encoded), image_rows, batch))
        return {"sequences": sequences}

    def _images(self, example: dict) -> list[Image.Image]:
        shown = example["images"] if "images" in example else [example["image"]]
        return [image.convert("RGB") for image in shown]

    def _render(self, example: dict, num_images: int) -> tuple[str, list[str]]:
        answers = [example[name] for name in self.responses]
        return render(self.processor, example["prompt"], answers, num_images=num_images)

    def _answer_ids(self, prompt_ids: list[int], prompt: str, answer: str) -> list[int]:
        if self.max_length is not None and len(prompt_ids) >= self.max_length:
            raise ValueError(
                f"max_length: found {self.max_length}, expected more than the {len(prompt_ids)} tokens of the prompt "
                f"{shorten(prompt)} with its image; raise max_length or drop the example."
            )
        ids = answer_ids(self.processor, answer)
        if not ids:
            raise ValueError(
                f"response: found no tokens after the prompt {shorten(prompt)}, expected an answer; drop the example."
            )
        return ids if self.max_length is None else ids[: self.max_length - len(prompt_ids)]
