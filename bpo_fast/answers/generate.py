"""Answers to questions about images, and to prompts of text alone, in batches."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import nn
from transformers import ProcessorMixin

from bpo_fast.answers.decode import decode
from bpo_fast.answers.plain import decode_plainly, decodes_alike, next_logits
from bpo_fast.answers.prompts import Prompts
from bpo_fast.answers.sampling import Choice, GenerationSettings
from bpo_fast.models.conversation import Messages
from bpo_fast.models.load import base_model
from bpo_fast.models.packed_forward import image_features
from bpo_fast.models.prompt import image_inputs
from bpo_fast.models.weakened_features import ImageNoise


@dataclass(frozen=True, slots=True)
class Response:
    """Text of an answer, and whether it was cut at max_new_tokens."""

    text: str
    truncated: bool


def generate(
    model: nn.Module,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    questions: Sequence[str | Messages],
    settings: GenerationSettings,
    *,
    seeds: Sequence[int] | None = None,
    noise: ImageNoise | None = None,
) -> list[Response]:
    """Answer a batch of questions, each as it would be answered alone.

    In float32 an answer does not depend on its batch. In 16 bits rounding does, and with it the rare token that is all
    but level with another.

    Args:
        model: vision-language model, in evaluation mode.
        processor: its processor, with a chat template.
        images: one a question.
        questions: texts, or conversations up to the answer whose first user turn shows the image.
        settings: how to decode; what a checkpoint says of sampling does not count.
        seeds: of sampling, one an answer; by default 0, 1, ... The caller's random state is left as it was.
        noise: on the images, at K steps; None leaves them clear.

    Returns:
        One answer a question; with noise K, those to the first question first.
    """
    return _answer(Prompts.of(model, processor, questions, images, noise), settings, seeds)


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
    return _answer(Prompts.of(model, processor, prompts, None), settings, seeds)


def _answer(prompts, settings, seeds) -> list[Response]:
    model, tokenizer = prompts.model, prompts.processor.tokenizer
    choose = Choice(settings, range(len(prompts)) if seeds is None else seeds, model.device)
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    ends = {ends} if isinstance(ends, int) else set(ends)
    if decodes_alike(prompts):

        def alone(row, answer):
            return next_logits(prompts, row, answer)

        answers = decode(base_model(model), *prompts.embed(range(len(prompts))), choose, ends, alone)
    else:
        answers = decode_plainly(prompts, choose, ends)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [Response(text.strip(), answer[-1] not in ends) for text, answer in zip(texts, answers, strict=True)]


def check_processor(model: nn.Module, processor: ProcessorMixin, image: Image.Image) -> None:
    """Refuse a processor that does not match `model`, with one image as the trial.

    Raises:
        ValueError: the processor makes another number of image tokens than the model makes image features.
    """
    inputs = Prompts.of(model, processor, ["?"], [image]).inputs([0])
    tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    features = len(image_features(model, image_inputs(inputs)))
    if tokens != features:
        raise ValueError(
            f"processor: found {tokens} image tokens in its prompt, expected {features}, the image features of the "
            "model; set its patch_size, num_additional_image_tokens and vision_feature_select_strategy to the model's."
        )
