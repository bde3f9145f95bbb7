"""Answers to questions about images, and to prompts of text alone, in batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import nn
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    ProcessorMixin,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from bpo_fast.models.conversation import Messages
from bpo_fast.models.packed_forward import image_features
from bpo_fast.models.prompt import encode, image_inputs, render


@dataclass(frozen=True, slots=True)
class Response:
    """Text of an answer, and whether it was cut at max_new_tokens."""

    text: str
    truncated: bool


def check_count(name: str, value: object, wanted: str = "at least 1") -> None:
    """Refuse what is not a whole number of at least 1.

    Raises:
        ValueError: with the `name` of the argument and what is `wanted`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: found {value!r}, expected {wanted}.")


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How to decode: greedy, as in the paper, or by sampling.

    Args:
        max_new_tokens: an answer is cut there.
        do_sample: sample instead of taking the likeliest token.
        temperature, top_p: of sampling; without effect, and hence refused, when decoding is greedy.

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> GenerationSettings(max_new_tokens=64, temperature=0.7)
        Traceback (most recent call last):
        ValueError: temperature: found 0.7, expected None with greedy decoding; set do_sample.
    """

    max_new_tokens: int = 512
    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None

    def __post_init__(self):
        check_count("max_new_tokens", self.max_new_tokens)
        if not isinstance(self.do_sample, bool):
            raise ValueError(f"do_sample: found {self.do_sample!r}, expected True or False.")
        for name, fits, wanted in (
            ("temperature", lambda x: x > 0, "a number above 0"),
            ("top_p", lambda x: 0 < x <= 1, "a number above 0 and at most 1"),
        ):
            value = getattr(self, name)
            if value is not None and not self.do_sample:
                raise ValueError(f"{name}: found {value}, expected None with greedy decoding; set do_sample.")
            if value is not None and not fits(value):
                raise ValueError(f"{name}: found {value}, expected {wanted}.")


class _Draw(LogitsProcessor):
    """Makes the likeliest token a draw from the softmax: the argmax of logits + Gumbel noise is one.

    Each question has random numbers of its own, so that what it draws does not depend on the others of its batch.
    """

    def __init__(self, seeds, device):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids, scores):
        exponential = torch.empty_like(scores)
        for row, generator in zip(exponential, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - exponential.clamp_(min=torch.finfo(scores.dtype).tiny).log_()  # -log of it is Gumbel noise


def _encode(model, processor, images, questions):
    """Inputs for a batch of questions, padded on the left, on the model's device and in its dtype."""
    texts = [render(processor, each)[0] for each in questions]
    return encode(processor, texts, [[image] for image in images]).to(model.device, dtype=model.dtype)


def generate(
    model: nn.Module,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    questions: Sequence[str | Messages],
    settings: GenerationSettings,
    *,
    seeds: Sequence[int] | None = None,
) -> list[Response]:
    """Answer a batch of questions, each as it would be answered alone, but for floating-point rounding.

    Args:
        model: vision-language model, in evaluation mode.
        processor: its processor, with a chat template.
        images: one a question.
        questions: texts, or conversations up to the answer whose first user turn shows the image.
        settings: how to decode; what a checkpoint says of sampling does not count.
        seeds: of sampling, one a question; by default 0, 1, ... The caller's random state is left as it was.

    Returns:
        One answer a question.
    """
    inputs = _encode(model, processor, images, questions)
    return _decode(model, processor, inputs, settings, seeds)


def generate_text(
    model: nn.Module,
    processor: ProcessorMixin,
    prompts: Sequence[str | Messages],
    settings: GenerationSettings,
    *,
    seeds: Sequence[int] | None = None,
) -> list[Response]:
    """Answer a batch of prompts without images, by the language model alone: its vision part is not run.

    Args:
        model, processor, settings, seeds: as those of `generate`.
        prompts: messages, or plain strings of one user turn each.

    Returns:
        One answer a prompt.
    """
    texts = [render(processor, prompt, num_images=0)[0] for prompt in prompts]
    inputs = encode(processor, texts, [[] for _ in texts]).to(model.device)
    return _decode(model, processor, inputs, settings, seeds)


def _decode(model, processor, inputs, settings, seeds):
    """The answers to a batch of encoded prompts."""
    tokenizer = processor.tokenizer
    sampling = LogitsProcessorList()
    if settings.do_sample:
        if settings.temperature is not None:
            sampling.append(TemperatureLogitsWarper(float(settings.temperature)))
        if settings.top_p is not None:
            sampling.append(TopPLogitsWarper(float(settings.top_p)))
        sampling.append(_Draw(range(len(inputs["input_ids"])) if seeds is None else seeds, model.device))
    greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    sequences = model.generate(
        **inputs,
        **greedy,
        max_new_tokens=settings.max_new_tokens,
        logits_processor=sampling,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokens = sequences[:, inputs["input_ids"].shape[1] :]
    ends = model.generation_config.eos_token_id
    ends = torch.tensor(tokenizer.eos_token_id if ends is None else ends, device=tokens.device)
    ended = torch.isin(tokens, ends).any(dim=1).tolist()
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [Response(text.strip(), not end) for text, end in zip(texts, ended, strict=True)]


def check_processor(model: nn.Module, processor: ProcessorMixin, image: Image.Image) -> None:
    """Refuse a processor that does not match `model`, with one image as the trial.

    Raises:
        ValueError: the processor makes another number of image tokens than the model makes image features.
    """
    inputs = _encode(model, processor, [image], ["?"])
    tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    features = len(image_features(model, image_inputs(inputs)))
    if tokens != features:
        raise ValueError(
            f"processor: found {tokens} image tokens in its prompt, expected {features}, the image features of the "
            "model; set its patch_size, num_additional_image_tokens and vision_feature_select_strategy to the model's."
        )
