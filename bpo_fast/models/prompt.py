"""Conversations to a model's text and token ids: the one renderer, of collating, generation and scoring.

A prompt is what the chat template makes of the messages before an answer, the generation prompt included; an answer is
what the template renders after it, its end token included. That is how TRL's DPOTrainer cuts them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from bpo_fast.models.conversation import IMAGE_TAG, Messages, check_content, shorten, structured

# What a processor returns beside the model's image inputs.
_TEXT_KEYS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels"}


def question(text: str) -> Messages:
    """The conversation of one question about one image."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def render(
    processor: ProcessorMixin,
    prompt: str | Messages,
    answers: Sequence[str | Messages] = (),
    *,
    num_images: int = 1,
    template_options: Mapping[str, Any] | None = None,
) -> tuple[str, list[str]]:
    """The text of a prompt, and that of each answer after it.

    Args:
        processor: of the model; its chat template is used.
        prompt: messages before the answer. A plain string as content is text, in the first user turn behind the
            images; a plain string alone is one user turn. After a last message of the assistant the answer goes on
            with that message.
        answers: alternative continuations, one list of messages each, or a plain string of the assistant's.
        num_images: images that the prompt shows.
        template_options: `tools` and further variables of the chat template.

    Raises:
        ValueError: messages that are none (see `conversation.structured`), an image's placeholder typed as text, an
            answer that is not the assistant's text alone, placeholders that are not as many as the images, or a
            conversation that the chat template cannot render.
    """
    messages = structured(prompt, "prompt", num_images=num_images)
    whole = [messages + structured(answer, "answer") for answer in answers]
    tags = _image_tags(processor)
    check_content(messages, "prompt", tags)
    for conversation in whole:
        answer = conversation[len(messages) :]
        check_content(answer, "answer", tags)
        if answer[0]["role"] != "assistant" or _slots(answer):
            raise ValueError(f"answer: found {shorten(answer)}, expected the assistant's, in text alone.")
    if _slots(messages) != num_images:
        raise ValueError(
            f"prompt: found {_slots(messages)} image placeholders for {num_images} images in {shorten(messages)}, "
            "expected as many; give each image one part {'type': 'image'}."
        )
    if (last_role := messages[-1]["role"]) == "system":
        raise ValueError("prompt: found a last message of role 'system', expected a question; give one.")
    ending = {"continue_final_message" if last_role == "assistant" else "add_generation_prompt": True}
    options = template_options or {}
    text = _templated(processor, messages, **options, **ending)
    whole = [_templated(processor, conversation, **options) for conversation in whole]
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


def _templated(processor, messages, **options):
    try:
        return processor.apply_chat_template(messages, tokenize=False, **options)
    # A template's own refusal, or whatever an operation in it raises for a value that it does not fit.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"chat template: found a conversation that it cannot render ({reason}), {shorten(messages)}, expected one "
            "of the model's form."
        ) from None


def _image_tags(processor):
    """What stands for an image in text: the tag of published data, the processor's token and the model's."""
    tags = {IMAGE_TAG, str(getattr(processor, "image_token", None) or IMAGE_TAG)}
    if isinstance(number := getattr(processor, "image_token_id", None), int):
        tags.add(processor.tokenizer.convert_ids_to_tokens(number))
    return sorted(tags)


def _slots(messages):
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def _common_prefix(texts):
    length = next((n for n, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1), None)
    return min(texts, key=len)[:length]
