"""Answers to questions about images, in batches."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from PIL import Image
from torch import nn
from transformers import ProcessorMixin

from bpo_fast.models.packed_forward import image_features
from bpo_fast.models.prompt import encode, image_inputs, question, render


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
        for name, fits, wanted in (
            ("temperature", lambda x: x > 0, "a number above 0"),
            ("top_p", lambda x: 0 < x <= 1, "a number above 0 and at most 1"),
        ):
            value = getattr(self, name)
            if value is not None and not self.do_sample:
                raise ValueError(f"{name}: found {value}, expected None with greedy decoding; set do_sample.")
            if value is not None and not fits(value):
                raise ValueError(f"{name}: found {value}, expected {wanted}.")


def _encode(model, processor, images, questions):
    """Inputs for a batch of single questions, padded on the left, on the model's device and in its dtype."""
    prompts = [render(processor, question(text))[0] for text in questions]
    return encode(processor, prompts, [[image] for image in images]).to(model.device, dtype=model.dtype)


def generate(
    model: nn.Module,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    settings: GenerationSettings,
    *,
    seed: int = 0,
) -> list[Response]:
    """Answer a batch of questions.

    Args:
        model: vision-language model, in evaluation mode.
        processor: its processor, with a chat template.
        images, questions: one image a question.
        settings: how to decode.
        seed: of sampling; the caller's random state is left as it was.

    Returns:
        One answer a question.
    """
    inputs = _encode(model, processor, images, questions)
    tokenizer = processor.tokenizer
    # A checkpoint's own sampling defaults would otherwise come through.
    top_k = {} if settings.do_sample else {"top_k": None}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        sequences = model.generate(**inputs, **asdict(settings), **top_k, pad_token_id=tokenizer.pad_token_id)
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
