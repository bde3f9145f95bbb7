"""Run a vision-language model on packed sequences.

Nothing here knows a model by name: a model takes part when transformers finds its decoder (`get_decoder`), its output
head (`get_output_embeddings`) and its image features (`get_image_features`), and when every layer of its decoder
calls attention through transformers' attention interface and hands the packing on. Whether that computes what the
model's own forward does is for `train.start_check` to see.
"""

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from bpo_fast.models.attention import ATTENTION_NAME, AttentionCalls, check_reach, counted_attention
from bpo_fast.models.families import ATTENTION_REACHES, LOGIT_SCALES, ROTARY_REACHES
from bpo_fast.models.last_layer import cut_last_layer
from bpo_fast.models.load import base_model
from bpo_fast.models.packing import Packing
from bpo_fast.ops.gather_rows import gather_rows
from bpo_fast.ops.linear_token_logps import flat_linear_token_logps
from bpo_fast.ops.precision import autocast_dtype, without_autocast
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
    base = base_model(model)
    # Not every vision tower casts its pixels, and a batch of training holds them in float32.
    inputs = {name: x.to(base.dtype) if x.is_floating_point() else x for name, x in image_inputs.items()}
    features = base.get_image_features(**inputs, return_dict=True).pooler_output
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


class PackingNotSeenError(ValueError):
    """Layers of a decoder that computed without the packing.

    Attributes:
        reason: what they did.
        token_logps: what came of it, fp32 [N].
    """

    def __init__(self, decoder: nn.Module, reason: str, token_logps: torch.Tensor):
        super().__init__(
            f"model: found {type(decoder).__name__}, {reason}, expected the packing in every layer, without which "
            "responses see each other; use a family that docs/models.md lists."
        )
        self.reason = reason
        self.token_logps = token_logps


def _layers_without_packing(calls: AttentionCalls, num_layers: int) -> str | None:
    if calls.unpacked:
        return f"whose attention was called {calls.unpacked} times without the packing"
    if calls.packed != num_layers:
        return f"which called attention {calls.packed} times in {num_layers} layers"
    if calls.ignored:
        return f"whose attention takes {', '.join(sorted(calls.ignored))}, which packed attention does not compute"
    return None


def _check_reaches(config: PreTrainedConfig, packing: Packing) -> None:
    """Refuse sequences so long that a window closes or rotary angles change, whether attention is told or a mask."""
    kinds = getattr(config, "layer_types", None) or list(ATTENTION_REACHES)[:1]
    for kind, name in ATTENTION_REACHES.items():
        if kind in kinds:
            check_reach(name, getattr(config, name, None), packing)
    rotary = getattr(config, "rope_parameters", None) or {}
    for parameters in (rotary, *(each for each in rotary.values() if isinstance(each, dict))):
        if name := ROTARY_REACHES.get(parameters.get("rope_type")):
            check_reach(name, parameters.get(name, getattr(config, name, None)), packing)


class _Cast(NamedTuple):
    """A head's weight in another dtype, and of which values it was made."""

    weight: torch.Tensor
    storage: StorageWeakRef
    version: int


# Of frozen heads: a cast of one reads and writes more bytes than the rows of a step do.
_CASTS: WeakKeyDictionary[nn.Module, _Cast] = WeakKeyDictionary()


def _weight_in(head: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The head's weight [V, H] in `dtype`; a frozen one is cast once and kept while its values are the same."""
    weight = head.weight
    if weight.dtype == dtype or weight.requires_grad or torch.is_inference_mode_enabled() or weight.is_inference():
        return weight.to(dtype)
    kept, made_of = _CASTS.get(head), (StorageWeakRef(weight.untyped_storage()), weight._version)
    if kept is not None and kept.weight.dtype == dtype and kept[1:] == made_of:
        return kept.weight
    cast = weight.detach().to(dtype)
    if type(cast) is torch.Tensor:  # not the stand-in of a run that only counts
        _CASTS[head] = _Cast(cast, *made_of)
    return cast


def _packed_forward(
    model, packing: Packing, image_features=None, image_rows=None, with_statistics=False, deterministic_attention=False
) -> PackedOutput:
    decoder, input_ids = model.get_decoder(), packing.input_ids
    _check_reaches(decoder.config, packing)
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
        # On a CPU autocast has a copy promote dtypes, and knows no float16 beside bfloat16.
        with without_autocast(embeds):
            embeds = embeds.index_copy(0, image_rows, image_features.to(embeds.dtype))
    # A 4-D mask is handed on untouched by transformers, and packed attention does not read it.
    with counted_attention() as calls:
        hidden = decoder(
            inputs_embeds=embeds[None],
            position_ids=packing.position_ids[None],
            attention_mask=embeds.new_zeros(1, 1, 1, 1),
            use_cache=False,
            packing=packing,
            deterministic_attention=deterministic_attention,
        ).last_hidden_state[0]
    rows = gather_rows(hidden, packing.logit_rows, packing.logit_rounds)
    # As a linear layer's input would be: the last norm of a float32 or float16 model leaves float32.
    rows = rows.to(autocast_dtype(rows))
    head = model.get_output_embeddings()
    token_logps, statistics = flat_linear_token_logps(
        rows,
        _weight_in(head, rows.dtype),
        packing.targets,
        bias=None if head.bias is None else head.bias.to(rows.dtype),
        logit_softcap=getattr(model.config.get_text_config(), "final_logit_softcapping", None),
        with_statistics=with_statistics,
    )
    if reason := _layers_without_packing(calls, decoder.config.num_hidden_layers):
        raise PackingNotSeenError(decoder, reason, token_logps.detach())
    return PackedOutput(token_logps=token_logps, statistics=statistics)


def enable_packed_forward(model: PreTrainedModel) -> None:
    """Let `model(packing=..., image_features=..., image_rows=...)` score a packed sequence: `PackedOutput`.

    Two flags may come with them: `with_statistics`, and `deterministic_attention` (see `packed_attention`). Without
    `packing` nothing changes. The call goes through the model's own `forward`, so that wrappers around it (PEFT,
    DistributedDataParallel, autocast) do their work.

    Args:
        model: the transformers model, before or after an adapter was put on its modules.

    Raises:
        ValueError: its decoder's attention cannot be set, or it scales its logits in a way the head op does not know.
    """
    decoder = model.get_decoder()
    # A cast that was kept shows every change of its head but one that goes around autograd, through `.data`.
    _CASTS.clear()
    if not hasattr(model, "_unpacked_attention"):
        model._unpacked_attention = decoder.config._attn_implementation
    decoder.set_attn_implementation(ATTENTION_NAME)
    if decoder.config._attn_implementation != ATTENTION_NAME:
        raise ValueError(
            f"model: found {type(decoder).__name__}, expected a decoder that calls attention through transformers' "
            "attention interface, by which responses share their prefix; use e.g. LLaVA over Llama, Mistral or Qwen2."
        )
    text_config = model.config.get_text_config()
    for name in LOGIT_SCALES:
        if getattr(text_config, name, None) not in (None, 1, 1.0):
            raise ValueError(
                f"model: found {type(model).__name__} with logits scaled by its config's {name}, expected unscaled "
                "logits; use a family that docs/models.md lists."
            )
    cut_last_layer(decoder)
    if hasattr(model, "_unpacked_forward"):
        return
    model._unpacked_forward = model.forward

    # Generation checks its arguments against the signature of `forward`, which stays the original one.
    @functools.wraps(type(model).forward)
    def forward(
        self,
        *args,
        packing=None,
        image_features=None,
        image_rows=None,
        with_statistics=False,
        deterministic_attention=False,
        **kwargs,
    ):
        if packing is None:
            return self._unpacked_forward(*args, **kwargs)
        return _packed_forward(self, packing, image_features, image_rows, with_statistics, deterministic_attention)

    model.forward = types.MethodType(forward, model)


@contextmanager
def unpacked_forward(model: PreTrainedModel) -> Iterator[types.MethodType]:
    """The forward that a model has without packing, with the attention that it was loaded with while the block runs.

    That attention may compute what SDPA does not, such as sinks or capped scores.

    Args:
        model: the transformers model, with `enable_packed_forward`.
    """
    decoder = model.get_decoder()
    decoder.set_attn_implementation(model._unpacked_attention)
    try:
        yield model._unpacked_forward
    finally:
        decoder.set_attn_implementation(ATTENTION_NAME)


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
