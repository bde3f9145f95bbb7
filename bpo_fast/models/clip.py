"""How well texts fit an image: the cosine of their embeddings by a CLIP-like model, sentence by sentence.

CLIP reads 77 tokens, and an answer may have hundreds. A text is worth the mean over its sentences, always, so that no
value jumps where a text becomes too long; of a sentence that is too long for the model, the beginning counts.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from PIL import Image
from torch import nn
from transformers import AutoModel, AutoProcessor, BatchFeature, ProcessorMixin

from bpo_fast.models.load import PROCESSOR_CONFIGS, check_tensors, loading
from bpo_fast.models.weights import check_model_files, local_folder, refuse_remote_code

_ENDS = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")  # noqa: RUF001


def sentences(text: str) -> list[str]:
    """The sentences of a text, without those that have no letter (the numbers of a list); at least one.

    >>> sentences("1. A cat. It sleeps!\\nA dog"), sentences("42")
    (['A cat.', 'It sleeps!', 'A dog'], ['42'])
    """
    found = [part.strip() for part in _ENDS.split(text)]
    return [part for part in found if any(map(str.isalpha, part))] or [text]


@dataclass(frozen=True)
class Clip:
    """A model of images and texts with its processor, as `load_clip` gives it."""

    model: nn.Module
    processor: ProcessorMixin

    @torch.no_grad()
    def alignments(self, image: Image.Image, texts: Sequence[str]) -> list[float]:
        """The alignment of each text with the image, from -1 to 1."""
        parts = [sentences(text) for text in texts]
        tokenizer, config = self.processor.tokenizer, self.model.config.get_text_config()
        # To the full length, as some of these models were trained, and never by what other texts there are.
        most = min(tokenizer.model_max_length, config.max_position_embeddings)
        flat = [sentence for part in parts for sentence in part]
        tokens = tokenizer(flat, padding="max_length", truncation=True, max_length=most, return_tensors="pt")
        seen = self._embedded(
            self.model.get_image_features, self.processor.image_processor(image, return_tensors="pt")
        )
        read = self._embedded(self.model.get_text_features, tokens)
        cosines = (read @ seen[0]).split(list(map(len, parts)))
        return [found.mean().item() for found in cosines]

    def _embedded(self, embed, inputs) -> torch.Tensor:
        """Unit vectors, fp32 [N, H]."""
        features = embed(**BatchFeature(inputs).to(self.model.device), return_dict=True).pooler_output
        return nn.functional.normalize(features.float(), dim=-1)


@lru_cache(maxsize=1)
def load_clip(path: str, device: torch.device) -> Clip:
    """Load a CLIP-like model and try it, once for all calls.

    It computes in float32, since what the answers to one question differ by may be in the third digit.

    Args:
        path: a folder written by `save_pretrained`, or a model id, such as openai/clip-vit-large-patch14.
        device: where to put it.

    Raises:
        ValueError: nothing can be loaded from `path`, it brings code of its own, or the model is not one of images and
            texts, or gives no number.
    """
    what = "alignment_model"
    folder = local_folder(what, path)
    if folder is not None:
        check_model_files(folder, what)
        refuse_remote_code((folder / name for name in PROCESSOR_CONFIGS), trust_remote_code=False)
    options = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}
    options |= {"device_map": {"": device}, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with loading(what, path):
        model, found = AutoModel.from_pretrained(path, **options)
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise ValueError(
            f"{what}: found a {type(model).__name__} in '{path}', expected a model that embeds images and texts, such "
            "as CLIP or SigLIP; name one."
        )
    check_tensors(model, found, path, what)
    with loading(what, path):
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    if not (hasattr(processor, "tokenizer") and hasattr(processor, "image_processor")):
        raise ValueError(
            f"{what}: found a {type(processor).__name__} in '{path}', expected the processor of images and texts that "
            "belongs to the model; copy or download it again."
        )
    clip = Clip(model.eval(), processor)
    with loading(what, path):
        (found,) = clip.alignments(Image.new("RGB", (64, 64)), ["A black square."])
    if not math.isfinite(found):
        raise ValueError(
            f"{what}: found {found} as the alignment of a text by '{path}', expected a number; copy or download its "
            "weights again."
        )
    return clip
