"""Conversations to a model's text and token ids: the one renderer, of collating, generation and scoring.

A prompt is what the chat template makes of the messages before an answer, the generation prompt included; an answer is
what the template renders after it, its end token included. That is how TRL's DPOTrainer cuts them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

Messages = list[dict[str, Any]]

# What a processor returns beside the model's image inputs.
_TEXT_KEYS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}


def question(text: str) -> Messages:
    """The conversation of one question about one image."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def render(
    processor: ProcessorMixin, prompt: Messages, answers: Sequence[Messages] = (), *, num_images: int = 1
) -> tuple[str, list[str]]:
    """The text of a prompt, and that of each answer after it.

    Args:
        processor: of the model; its chat template is used.
        prompt: messages before the answer. A plain string as content is text, in the first user turn behind the
            images.
        answers: alternative continuations, one list of messages each.
        num_images: images that the prompt shows.

    Raises:
        ValueError: the prompt's image placeholders are not as many as its images.
    """
    messages = _structured(prompt, num_images)
    slots = sum(part["type"] == "image" for message in messages for part in message["content"])
    if slots != num_images:
        raise ValueError(
            f"prompt: found {slots} image placeholders for {num_images} images in {shorten(messages)}, expected as "
            "many; give each image one part {'type': 'image'}."
        )
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    whole = [processor.apply_chat_template(messages + _structured(answer, 0), tokenize=False) for answer in answers]
    # A template may render the generation prompt and an answered turn differently; what they share is the prompt.
    text = _common_prefix([text, *whole])
    return text, [answer[len(text) :] for answer in whole]


def encode(processor: ProcessorMixin, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> BatchFeature:
    """Model inputs of rendered prompts, padded on the left: ids with image tokens expanded, mask, image tensors.

    The template has put the beginning-of-sequence token already, so none is added.

    Args:
        processor: of the model.
        prompts: N texts of `render`.
        images: the images of each, in the order of its placeholders.
    """
    return processor(
        text=list(prompts),
        images=list(images) if any(images) else None,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        add_special_tokens=False,
    )


def prompt_ids(batch: BatchFeature) -> list[list[int]]:
    """The token ids of each prompt of `encode`, without padding."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def image_inputs(batch: BatchFeature) -> dict[str, torch.Tensor]:
    """The image tensors of `encode` (`pixel_values`, ...), as the model's `get_image_features` takes them."""
    return {name: value for name, value in batch.items() if name not in _TEXT_KEYS}


def answer_ids(processor: ProcessorMixin, answer: str) -> list[int]:
    """The token ids of a rendered answer."""
    return processor.tokenizer(answer, add_special_tokens=False)["input_ids"]


def shorten(value: object) -> str:
    """`repr`, cut for a message."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _common_prefix(texts):
    length = next((n for n, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1), None)
    return min(texts, key=len)[:length]


def _structured(messages, num_images):
    """Messages whose content is a list of parts; a plain string in the first user turn gets the images before it."""
    result = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            images = [{"type": "image"}] * num_images if message["role"] == "user" else []
            num_images = 0 if images else num_images
            content = [*images, {"type": "text", "text": content}]
        else:
            # A data set's Arrow schema fills the keys that a part lacks with None, which templates may trip over.
            content = [{key: value for key, value in part.items() if value is not None} for part in content]
        result.append({**message, "content": content})
    return result
