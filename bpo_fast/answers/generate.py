"""Answers to questions about pictures, in batches."""

from dataclasses import dataclass

import torch

from bpo_fast.models.packed_forward import image_features


@dataclass(frozen=True, slots=True)
class Response:
    """Text of an answer, and whether it was cut at max_new_tokens."""

    text: str
    truncated: bool


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How to decode: greedy, as in the paper, or by sampling.

    Args:
        max_new_tokens (`int`): an answer is cut there.
        do_sample (`bool`): sample instead of taking the likeliest token.
        temperature, top_p (`float`): of the sampling; without effect, and hence refused, when decoding is greedy.

    >>> GenerationSettings(max_new_tokens=64, temperature=0.7)
    Traceback (most recent call last):
    ValueError: temperature and top_p have an effect with do_sample=True only: set it, or leave them out.
    """

    max_new_tokens: int = 512
    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, but it is {self.max_new_tokens}.")
        if not self.do_sample and (self.temperature is not None or self.top_p is not None):
            raise ValueError(
                "temperature and top_p have an effect with do_sample=True only: set it, or leave them out."
            )
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, but it is {self.temperature}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, but it is {self.top_p}.")


def encode(model, processor, images, questions):
    """Inputs for a batch of single questions, padded on the left, on the model's device and in its dtype."""
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for image, question in zip(images, questions, strict=True)
    ]
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    return inputs.to(model.device, dtype=model.dtype)


def generate(model, processor, images, questions, settings, *, seed=0):
    """Answer a batch of questions.

    Args:
        model: vision-language model, in evaluation mode.
        processor: its processor, with a chat template.
        images (`list` of `PIL.Image.Image`), questions (`list[str]`): one picture a question.
        settings (`GenerationSettings`): how to decode.
        seed (`int`): of the sampling; the caller's random state is left as it was.

    Returns:
        `list[Response]`, one a question.
    """
    inputs = encode(model, processor, images, questions)
    tokenizer = processor.tokenizer
    # A checkpoint's own sampling defaults would otherwise come through.
    top_k = {} if settings.do_sample else {"top_k": None}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        sequences = model.generate(
            **inputs,
            max_new_tokens=settings.max_new_tokens,
            do_sample=settings.do_sample,
            temperature=settings.temperature,
            top_p=settings.top_p,
            pad_token_id=tokenizer.pad_token_id,
            **top_k,
        )
    tokens = sequences[:, inputs["input_ids"].shape[1] :]
    ends = model.generation_config.eos_token_id
    ends = torch.tensor(tokenizer.eos_token_id if ends is None else ends, device=tokens.device)
    ended = torch.isin(tokens, ends).any(dim=1).tolist()
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [Response(text.strip(), not end) for text, end in zip(texts, ended, strict=True)]


def check_processor(model, processor, image):
    """Refuse a processor that does not match `model`, with one picture as the trial.

    Raises:
        ValueError: the processor makes another number of image tokens than the model makes image features.
    """
    inputs = encode(model, processor, [image], ["?"])
    tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    image_inputs = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    features = len(image_features(model, image_inputs))
    if tokens != features:
        raise ValueError(
            f"the processor puts {tokens} image tokens into a prompt but the model makes {features} image features: "
            "set the processor's patch_size, num_additional_image_tokens and vision_feature_select_strategy to the "
            "model's."
        )
