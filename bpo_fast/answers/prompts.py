"""Prompts of a batch as a decoder takes them: embeddings with the images' features in them, clear or weakened."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BatchFeature, ProcessorMixin

from bpo_fast.models.conversation import Messages
from bpo_fast.models.load import base_model
from bpo_fast.models.packed_forward import image_features
from bpo_fast.models.prompt import encode, image_inputs, render
from bpo_fast.models.weakened_features import Copy, ImageNoise, one_by_one, write_at_once

# Models whose images have been tried for one map each, by the noise's target.
_AT_ONCE: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()


def trial_images() -> list[Image.Image]:
    """Two images of noise, so that no two of their features are alike, and wide, so that some models tile them."""
    return [Image.frombytes("RGB", (128, 64), random.Random(n).randbytes(3 * 128 * 64)) for n in range(2)]


@dataclass(frozen=True)
class Prompts:
    """N prompts, each asked at every one of K noise steps: R = N * K rows, prompt after prompt.

    Attributes:
        model: with or without a LoRA adapter.
        processor: its processor.
        texts: as `models.prompt.render` gives them.
        images: those of each prompt, one or none.
        noise: on the images; None leaves them clear, a row a prompt.
    """

    model: nn.Module
    processor: ProcessorMixin
    texts: Sequence[str]
    images: Sequence[Sequence[Image.Image]]
    noise: ImageNoise | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        processor: ProcessorMixin,
        questions: Sequence[str | Messages],
        images: Sequence[Image.Image] | None,
        noise: ImageNoise | None = None,
    ) -> "Prompts":
        """Prompts of questions about an image each, or about none."""
        shown: list[list[Any]] = [[] for _ in questions] if images is None else [[image] for image in images]
        texts = [
            render(processor, question, num_images=len(of))[0] for question, of in zip(questions, shown, strict=True)
        ]
        return cls(model, processor, texts, shown, noise)

    def __len__(self) -> int:
        return len(self.texts) * self.levels

    @property
    def levels(self) -> int:
        return 1 if self.noise is None else len(self.noise.steps)

    def inputs(self, numbers: Sequence[int]) -> BatchFeature:
        """The model's own inputs of some prompts, padded on the left, on its device and in its dtype."""
        texts, images = [self.texts[n] for n in numbers], [self.images[n] for n in numbers]
        return encode(self.processor, texts, images).to(self.model.device, dtype=self.model.dtype)

    def copy_of(self, row: int, image: int = 0) -> Copy:
        """What a row sees, its image being that of place `image`."""
        number, level = divmod(row, self.levels)
        return Copy(image, self.noise.steps[level], self.noise.sample_ids[number])

    @torch.no_grad()
    def embed(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Embeddings [B, L, H] of some rows, padded on the left, and bool [B, L], False where padded."""
        numbers = list(dict.fromkeys(row // self.levels for row in rows))
        places = [numbers.index(row // self.levels) for row in rows]
        inputs = self.inputs(numbers)
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        if len(places) > len(numbers):
            ids, mask = ids[places], mask[places]
        base = base_model(self.model)
        table = base.get_input_embeddings()
        if not self.images[numbers[0]]:
            return table(ids), mask
        shown = ids == base.config.image_token_id
        # The id of the image token may lie outside the embedding table.
        embeds = table(ids.masked_fill(shown, 0))
        out, tokens = embeds.view(-1, embeds.shape[-1]), shown.flatten().nonzero().flatten()
        if self.noise is None:
            features = image_features(self.model, image_inputs(inputs))
        else:
            copies = [self.copy_of(row, place) for row, place in zip(rows, places, strict=True)]
            if self._at_once() and write_at_once(self.model, self.noise, copies, image_inputs(inputs), out, tokens):
                return embeds, mask

            def inputs_of(place):
                return image_inputs(self.inputs([numbers[place]]))

            features = one_by_one(self.model, self.noise, copies, inputs_of)
        out.index_copy_(0, tokens, features.to(out.dtype))
        return embeds, mask

    def trial(self, noise: ImageNoise | None = None) -> "Prompts":
        """Two prompts of other lengths than each other for the same model, with images if these have some."""
        questions = ["What is this?", "What is this, and what is beside it or behind it?"]
        return Prompts.of(self.model, self.processor, questions, trial_images() if any(self.images) else None, noise)

    def _at_once(self) -> bool:
        """Whether the model's images go through its vision part together: one map each, and no more than that.

        Tried once, so that it does not depend on which images a batch has.
        """
        known = _AT_ONCE.setdefault(base_model(self.model), {})
        target = self.noise.target
        if target not in known:
            trial = self.trial(replace(self.noise, steps=self.noise.steps[:1], sample_ids=[0, 1]))
            inputs = trial.inputs([0, 1])
            shown = (inputs["input_ids"] == base_model(self.model).config.image_token_id).flatten().nonzero().flatten()
            out = self.model.get_input_embeddings()(inputs["input_ids"] * 0).flatten(0, 1)
            copies = [trial.copy_of(row, row) for row in range(2)]
            known[target] = write_at_once(self.model, trial.noise, copies, image_inputs(inputs), out, shown)
        return known[target]
