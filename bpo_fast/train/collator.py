"""Preference examples to packed rows: chat template, tokens, images, groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import ProcessorMixin

from bpo_fast.models.packing import Group, Packing, pack, plan_rows

# What a processor returns beside the model's image inputs.
_TEXT_KEYS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}


@dataclass
class PackedRow:
    """One packed row of a batch and the images its prefixes show.

    Attributes:
        packing: index tensors of the row.
        image_inputs: the processor's image tensors (`pixel_values`, ...), empty without images.
        image_rows: int64 [M], packed rows that hold image tokens.
        num_groups: groups in the whole batch, of which this row holds some; means are over the batch.
        num_chosen_tokens: tokens of the chosen responses in the whole batch.
    """

    packing: Packing
    image_inputs: dict[str, torch.Tensor]
    image_rows: torch.Tensor
    num_groups: int
    num_chosen_tokens: int

    def _map(self, function) -> PackedRow:
        images = {name: function(tensor) for name, tensor in self.image_inputs.items()}
        numbers = (self.num_groups, self.num_chosen_tokens)
        return PackedRow(function(self.packing), images, function(self.image_rows), *numbers)

    def to(self, device, non_blocking: bool = False) -> PackedRow:
        """The same row with its tensors on `device`."""
        return self._map(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedRow:
        """The same row with its tensors in page-locked memory."""
        return self._map(lambda value: value.pin_memory())


def _common_prefix(texts: list[str]) -> str:
    length = next((n for n, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1), None)
    return min(texts, key=len)[:length]


def _structured(messages: list[dict], num_images: int) -> list[dict]:
    """Messages whose content is a list of parts; a plain string in the first user turn gets the images before it."""
    result = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            images = [{"type": "image"}] * num_images if message["role"] == "user" else []
            num_images = 0 if images else num_images
            content = [*images, {"type": "text", "text": content}]
        else:
            # A dataset's Arrow schema fills the keys that a part lacks with None, which templates may trip over.
            content = [{key: value for key, value in part.items() if value is not None} for part in content]
        result.append({**message, "content": content})
    return result


@dataclass
class PreferenceCollator:
    """Makes packed rows of examples in TRL's vision preference columns.

    An example has `prompt`, `chosen` and, unless only the chosen answers are trained on, `rejected` as lists of chat
    messages, and `images` (a list) or `image`. Tokens are those of TRL's DPOTrainer: the prompt with the generation
    prompt, and the responses as the chat template renders them after it.

    Args:
        processor: of the model; its tokenizer and chat template are used.
        image_token_id: id of the placeholder that an image row replaces.
        max_length: most positions of prompt and response together; a longer response is cut at its end.
        token_budget: most tokens of one packed row; None packs the batch in one row.
        responses: columns that become a group's branches, in this order.
    """

    processor: ProcessorMixin
    image_token_id: int | None
    max_length: int | None = None
    token_budget: int | None = None
    responses: Sequence[str] = ("chosen", "rejected")

    def __call__(self, examples: list[dict]) -> dict[str, list[PackedRow]]:
        """Collate a batch.

        Returns:
            {"rows": [...]}: as many packed rows as the token budget asks for.

        Raises:
            ValueError: a prompt fills `max_length`, a response has no tokens, or a prompt's image placeholders are not
                as many as its images.
        """
        images = [self._images(example) for example in examples]
        rendered = [self._render(example, shown) for example, shown in zip(examples, images, strict=True)]
        prompts = [prompt for prompt, _ in rendered]
        prompt_ids, image_inputs = self._process(prompts, images)
        groups = []
        for ids, (prompt, responses) in zip(prompt_ids, rendered, strict=True):
            groups.append(Group(ids, [self._response_ids(ids, prompt, text) for text in responses]))
        plan = plan_rows([len(group) for group in groups], self.token_budget)
        num_chosen_tokens = sum(len(group.branches[0]) for group in groups)
        rows = []
        for members in plan:
            if (
                len(plan) > 1
            ):  # image tensors cannot be parted in general, so a row's images are processed by themselves
                _, image_inputs = self._process([prompts[n] for n in members], [images[n] for n in members])
            packing = pack([groups[n] for n in members])
            image_rows = torch.nonzero(packing.input_ids == self.image_token_id).flatten()
            rows.append(PackedRow(packing, image_inputs, image_rows, len(examples), num_chosen_tokens))
        return {"rows": rows}

    def _images(self, example: dict) -> list[Image.Image]:
        shown = example["images"] if "images" in example else [example["image"]]
        return [image.convert("RGB") for image in shown]

    def _render(self, example: dict, images: list) -> tuple[str, list[str]]:
        """The prompt's text and each response's text after it."""
        messages = _structured(example["prompt"], len(images))
        slots = sum(part["type"] == "image" for message in messages for part in message["content"])
        if slots != len(images):
            raise ValueError(
                f"prompt: found {slots} image placeholders for {len(images)} images in {_shorten(messages)}, expected "
                "as many; give each image one part {'type': 'image'}."
            )
        prompt = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        whole = [
            self.processor.apply_chat_template(messages + _structured(example[name], 0), tokenize=False)
            for name in self.responses
        ]
        # A template may render the generation prompt and an answered turn differently; what they share is the prompt.
        prompt = _common_prefix([prompt, *whole])
        return prompt, [text[len(prompt) :] for text in whole]

    def _process(self, prompts: list[str], images: list[list]) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
        """Prompt ids with their image tokens expanded, and the image tensors. The template has put the BOS already."""
        batch = self.processor(
            text=prompts,
            images=images if any(images) else None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            add_special_tokens=False,
        )
        ids = [
            row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        return ids, {name: value for name, value in batch.items() if name not in _TEXT_KEYS}

    def _response_ids(self, prompt_ids: list[int], prompt: str, response: str) -> list[int]:
        if self.max_length is not None and len(prompt_ids) >= self.max_length:
            raise ValueError(
                f"max_length: found {self.max_length}, but the prompt {_shorten(prompt)} alone has {len(prompt_ids)} "
                "tokens with its image; raise max_length or drop the row."
            )
        ids = self.processor.tokenizer(response, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(
                f"response: found no tokens after the prompt {_shorten(prompt)}, expected an answer; drop the row."
            )
        return ids if self.max_length is None else ids[: self.max_length - len(prompt_ids)]


def _shorten(value) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
