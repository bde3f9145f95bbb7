"""Prompts of a batch as a decoder takes them: embeddings with the images' features in them, clear or weakened."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BatchFeature, ProcessorMixin

from bpo_fast.models.conversation import Messages
from bpo_fast.models.load import base_model
from bpo_fast.models.packed_forward import image_features
from bpo_fast.models.prompt import encode, image_inputs, render
from bpo_fast.models.weakened_features import Copy, ImageNoise, write_weakened


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
            out.index_copy_(0, tokens, image_features(self.model, image_inputs(inputs)).to(out.dtype))
        else:
            copies = [self.copy_of(row, place) for row, place in zip(rows, places, strict=True)]

            def inputs_of(place):
                return image_inputs(self.inputs([numbers[place]]))

            write_weakened(self.model, self.noise, copies, image_inputs(inputs), inputs_of, out, tokens)
        return embeds, mask
