"""The start check: log-probs of packed sequences against transformers' own forward of each conversation by itself.

What packed sequences cannot give a model (see `models.own_forward`) shows in its first examples, before the first
step. Nothing is taken on trust: the check runs at the start of every training, whatever the model is called.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import BatchFeature, PreTrainedModel

from bpo_fast.models.load import base_model
from bpo_fast.models.own_forward import OwnLogps, check_alike, convolutions, failing_in_a_sentence, own_logps
from bpo_fast.models.packed_forward import PackingNotSeenError, enable_packed_forward, image_features
from bpo_fast.train.collator import PreferenceCollator

# Examples that are compared: several groups of one packed sequence, in a fraction of a second.
NUM_EXAMPLES = 3

# Most bytes of a copy in float32, for a second and sharper comparison of a model in a lower precision.
FLOAT32_BYTES = 2**30

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_packed_forward(model: nn.Module, collator: PreferenceCollator, examples: Sequence[dict[str, Any]]) -> float:
    """Compare log-probs of packed sequences with the model's own forward of each conversation alone.

    The examples are packed as training packs them. For each conversation, a prompt with one of its answers, the
    model's own forward gets what the processor makes of it and computes with the attention that the model was loaded
    with. Where no example shows an image, two that do are compared as well, since images are what most families differ
    in. A small model in a lower precision is compared in float32, too, where rounding hides no difference.

    Args:
        model: with or without an adapter.
        collator: of the training.
        examples: of the training's first batch; the first three are compared.

    Returns:
        The mean absolute difference of a response token's log-prob, in nats.

    Raises:
        ValueError: the difference is beyond `tolerance`, layers of the decoder do not take the packing, or one of the
            two forwards fails.
    """
    base = base_model(model)
    enable_packed_forward(base)
    collator, examples = replace(collator, token_budget=None, weakening=None), list(examples[:NUM_EXAMPLES])
    with evaluated(model):
        figure = _check(base, collator, examples)
        if collator.image_token_id is not None and not any(map(_shows_an_image, examples)):
            collator = replace(collator, max_length=None)
            examples = [_image_example(collator.responses, number) for number in range(2)]
            figure = max(figure, _check(base, collator, examples))
        if _can_be_float32(base):
            with _in_float32(base):
                _check(base, collator, examples)
    return figure


def _check(base: PreTrainedModel, collator: PreferenceCollator, examples: list[dict]) -> float:
    packed, reason = _packed_logps(base, collator, examples)
    return check_alike(base, packed, _own_logps(base, collator, examples), reason)


def _packed_logps(base, collator, examples) -> tuple[torch.Tensor, str | None]:
    """fp32 [N] of the packed forward, and what is known to be wrong with it."""
    (sequence,) = collator(examples)["sequences"]
    sequence = sequence.to(base.device)
    with failing_in_a_sentence(base, "forward on packed sequences"):
        try:
            features = image_features(base, sequence.image_inputs) if sequence.image_inputs else None
            output = base(packing=sequence.packing, image_features=features, image_rows=sequence.image_rows)
            return output.token_logps, convolutions(base.get_decoder())
        except PackingNotSeenError as error:
            return error.token_logps, error.reason


def _own_logps(base, collator, examples) -> list[OwnLogps]:
    recorder = _Recorder(collator.processor)
    collator, found = replace(collator, processor=recorder), []
    for example in examples:
        (sequence,) = collator([example])["sequences"]
        found.append(own_logps(base, recorder.made, sequence.packing))
    return found


@dataclass
class _Recorder:
    """A processor that remembers what it made last, before the collator takes what packed sequences need."""

    processor: Any
    made: BatchFeature | None = None

    def __call__(self, *args, **kwargs) -> BatchFeature:
        self.made = self.processor(*args, **kwargs)
        return self.made

    def __getattr__(self, name):
        return getattr(self.processor, name)


def _can_be_float32(base: PreTrainedModel) -> bool:
    """Whether a model in a lower precision is small enough to be compared in float32, and computes in it."""
    dtypes = {parameter.dtype for parameter in base.parameters()}
    small = 4 * base.num_parameters() <= FLOAT32_BYTES
    return small and dtypes <= set(_FLOATS) and dtypes != {torch.float32} and "flash" not in base._unpacked_attention


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    held = [(x, x.data) for x in (*model.parameters(), *model.buffers()) if x.dtype in _FLOATS]
    try:
        for x, data in held:
            x.data = data.float()
        yield
    finally:
        for x, data in held:
            x.data = data


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Without dropout or gradients, and with modes and random state as they were afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    device = base_model(model).device
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _shows_an_image(example: dict) -> bool:
    return bool(example.get("images") or example.get("image"))


def _image_example(responses: Sequence[str], number: int) -> dict[str, Any]:
    """An example that shows an image of noise, so that no two of its features are alike."""
    size = (96 + 32 * number, 64)
    shown = Image.frombytes("RGB", size, random.Random(number).randbytes(3 * size[0] * size[1]))
    question = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    answers = ["Grains of every colour." + " And more." * number, "A field of noise, without any shape in it."]
    return {
        "images": [shown],
        "prompt": [{"role": "user", "content": question}],
        **{
            name: [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
            for name, answer in zip(responses, answers, strict=False)
        },
    }
