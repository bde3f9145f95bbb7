"""Run a vision-language model on packed sequences.

Nothing here knows a model by name: a model takes part when transformers finds its decoder (`get_decoder`), its output
head (`get_output_embeddings`) and its image features (`get_image_features`), and when its decoder calls attention
through transformers' attention interface.
"""

import functools
import types
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from bpo_fast.models.attention import ATTENTION_NAME
from bpo_fast.models.families import LOGIT_SCALES
from bpo_fast.models.load import base_model
from bpo_fast.models.packing import Packing
from bpo_fast.ops.gather_rows import gather_rows
from bpo_fast.ops.linear_token_logps import flat_linear_token_logps
from bpo_fast.ops.rows import TokenStatistics


@torch.no_grad()
def image_features(model: nn.Module, image_inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The frozen vision part's output for a batch of images.

    Args:
        model: with or without a LoRA adapter.
        image_inputs: what the processor made of the images: `pixel_values` and whatever else the model's
            `get_image_features` takes.

    Returns:
        [M, H]: the embedding rows of all images, image after image, ready to stand in for the image tokens.
    """
    features = base_model(model).get_image_features(**image_inputs, return_dict=True).pooler_output
    if isinstance(features, torch.Tensor):
        return features.reshape(-1, features.shape[-1])
    return torch.cat([image.reshape(-1, image.shape[-1]) for image in features])


@dataclass
class PackedOutput(ModelOutput):
    """Log-probs of the response tokens of a packed sequence.

    Attributes:
        token_logps: fp32 [N], in the order of `packing.targets`.
        statistics: `TokenStatistics` of the same tokens, if asked for.
    """

    token_logps: torch.FloatTensor | None = None
    statistics: TokenStatistics | None = None


def _packed_forward(
    model, packing: Packing, image_features=None, image_rows=None, with_statistics=False
) -> PackedOutput:
    input_ids = packing.input_ids
    if image_features is None:
        embeds = model.get_input_embeddings()(input_ids)
    else:
        if len(image_features) != len(image_rows):
            raise ValueError(
                f"image_features: found {len(image_features)} rows for {len(image_rows)} image tokens in the packed "
                "sequence, expected as many; the processor's patch_size, vision_feature_select_strategy and "
                "num_additional_image_tokens must be the model's."
            )
        # The id of the image token may lie outside the embedding table.
        embeds = model.get_input_embeddings()(input_ids.index_fill(0, image_rows, 0))
        embeds = embeds.index_copy(0, image_rows, image_features.to(embeds.dtype))
    # A 4-D mask is handed on untouched by transformers, and packed attention does not read it.
    hidden = model.get_decoder()(
        inputs_embeds=embeds[None],
        position_ids=packing.position_ids[None],
        attention_mask=embeds.new_zeros(1, 1, 1, 1),
        use_cache=False,
        packing=packing,
    ).last_hidden_state[0]
    rows = gather_rows(hidden, packing.logit_rows, packing.logit_rounds)
    head = model.get_output_embeddings()
    # Under autocast the decoder's output is in the lower precision, and the head is cast as a linear layer's would be.
    token_logps, statistics = flat_linear_token_logps(
        rows,
        head.weight.to(rows.dtype),
        packing.targets,
        bias=None if head.bias is None else head.bias.to(rows.dtype),
        logit_softcap=getattr(model.config.get_text_config(), "final_logit_softcapping", None),
        with_statistics=with_statistics,
    )
    return PackedOutput(token_logps=token_logps, statistics=statistics)


def enable_packed_forward(model: PreTrainedModel) -> None:
    """Let `model(packing=..., image_features=..., image_rows=..., with_statistics=...)` score a packed sequence.

    Without `packing` nothing changes. The call goes through the model's own `forward`, so that wrappers around it
    (PEFT, DistributedDataParallel, autocast) do their work.

    Args:
        model: the transformers model, before or after an adapter was put on its modules.

    Raises:
        ValueError: its decoder's attention cannot be set, or it scales its logits in a way the head op does not know.
    """
    decoder = model.get_decoder()
    decoder.set_attn_implementation(ATTENTION_NAME)
    if decoder.config._attn_implementation != ATTENTION_NAME:
        raise ValueError(
            f"model: found {type(decoder).__name__}, expected a decoder that calls attention through transformers' "
            "attention interface, by which responses share their prefix; use e.g. LLaVA over Llama, Mistral or Qwen2."
        )
    text_config = model.config.get_text_config()
    for name in LOGIT_SCALES:
        if getattr(text_config, name, None) not in (None, 1, 1.0):
            raise ValueError(f"model: found logits scaled by its config's {name}, expected unscaled logits.")
    if hasattr(model, "_unpacked_forward"):
        return
    model._unpacked_forward = model.forward

    # Generation checks its arguments against the signature of `forward`, which stays the original one.
    @functools.wraps(type(model).forward)
    def forward(self, *args, packing=None, image_features=None, image_rows=None, with_statistics=False, **kwargs):
        if packing is None:
            return self._unpacked_forward(*args, **kwargs)
        return _packed_forward(self, packing, image_features, image_rows, with_statistics)

    model.forward = types.MethodType(forward, model)


def sum_branches(token_logps: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Sequence log-probs of a packed sequence's branches.

    Args:
        token_logps: fp32 [N], as the packed forward gives them.
        packing: of that sequence, C branches.

    Returns:
        fp32 [C], the sum over each branch's tokens, in a fixed order.
    """
    lengths = [length for branches in packing.branch_lengths for length in branches]
    table = token_logps.new_zeros(len(lengths), max(lengths))
    return table.index_put((packing.branch_index, packing.branch_offset), token_logps).sum(dim=1)
