"""Log-probs of given answers: K continuations of each prompt in one packed sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import nn
from transformers import ProcessorMixin

from bpo_fast.models.load import base_model
from bpo_fast.models.packed_forward import image_features, sum_branches
from bpo_fast.models.packing import Group, pack
from bpo_fast.models.prompt import answer_ids, encode, image_inputs, prompt_ids


@torch.no_grad()
def score_branches(
    model: nn.Module,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    prefixes: Sequence[str],
    branches: Sequence[Sequence[str]],
) -> torch.Tensor:
    """Sequence log-probs of K continuations of each prompt, all of them in one packed sequence.

    Args:
        model: with `enable_packed_forward`, with or without an adapter.
        processor: its processor.
        images: G images.
        prefixes: G texts with one image placeholder each, as `models.prompt.render` gives them.
        branches: G lists of K texts, each with the space that parts it from its prefix.

    Returns:
        fp32 [G, K], in nats.
    """
    batch = encode(processor, prefixes, [[image] for image in images])
    groups = [
        Group(ids, [answer_ids(processor, text) for text in texts])
        for ids, texts in zip(prompt_ids(batch), branches, strict=True)
    ]
    packing = pack(groups).to(model.device)
    image_rows = torch.nonzero(packing.input_ids == base_model(model).config.image_token_id).flatten()
    features = image_features(model, image_inputs(batch.to(model.device, dtype=model.dtype)))
    token_logps = model(packing=packing, image_features=features, image_rows=image_rows).token_logps
    return sum_branches(token_logps, packing).view(len(groups), -1)
