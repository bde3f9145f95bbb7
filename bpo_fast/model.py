"""Load a vision-language model, and run it on packed rows.

Nothing here knows a model by name: a model takes part when transformers finds its decoder (`get_decoder`), its output
head (`get_output_embeddings`) and its image features (`get_image_features`), and when its decoder calls attention
through transformers' attention interface.
"""

from __future__ import annotations

import copy
import functools
import re
import types
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import ModelOutput, is_bitsandbytes_available

from bpo_fast.attention import ATTENTION_NAME
from bpo_fast.ops.gather_rows import gather_rows
from bpo_fast.ops.linear_token_logps import flat_linear_token_logps
from bpo_fast.ops.rows import TokenStatistics
from bpo_fast.packing import Packing

LORA_TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def load_processor(path: str | Path) -> ProcessorMixin:
    """The processor saved with a model, set up as training and generation here need it.

    Raises:
        ValueError: there is no processor at `path`, or it has no chat template.
    """
    try:
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"processor: none could be loaded from '{path}'; {_first_line(error)}") from error
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"processor: '{path}' holds a {type(processor).__name__}, expected a processor of images and text; name a "
            "vision-language model."
        )
    if processor.chat_template is None:
        raise ValueError(
            f"processor: '{path}' has no chat template, which turns a conversation into the model's prompt; add a "
            "chat_template.jinja to it."
        )
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def load_model(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    adapter: str | Path | None = None,
    quantization: str | None = None,
) -> PreTrainedModel | PeftModel:
    """Load a vision-language model for evaluation, bootstrapping or training.

    Args:
        path: a folder written by `save_pretrained`, or a model id.
        dtype: of the weights; "auto" keeps that of the checkpoint.
        device: where to put it; by default the first CUDA device, or else the CPU.
        adapter: folder of a LoRA adapter to put on top, as training leaves it.
        quantization: "nf4" holds the language model's linears in 4 bits with double quantisation, None does not.

    Returns:
        The model in evaluation mode; a `PeftModel` when an adapter was named.

    Raises:
        ValueError: nothing can be loaded from `path` or `adapter`, or `quantization` is unknown.
        ImportError: `quantization` needs bitsandbytes and it is not installed.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options = {"dtype": dtype, "device_map": {"": device}, "use_safetensors": True}
    if quantization == "nf4":
        if not is_bitsandbytes_available():
            raise ImportError("quantization: 'nf4' needs bitsandbytes; pip install 'bpo-fast[qlora]'.")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            # What is not the language model stays as it is: the vision part is small, and it makes the features.
            llm_int8_skip_modules=["lm_head", "vision_tower", "vision_model", "multi_modal_projector"],
        )
    elif quantization is not None:
        raise ValueError(f"quantization: found '{quantization}', expected 'nf4' or None.")
    try:
        model = AutoModelForImageTextToText.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"model: none could be loaded from '{path}'; {_first_line(error)}") from error
    if adapter is not None:
        try:
            model = PeftModel.from_pretrained(model, adapter)
        except (OSError, ValueError) as error:
            raise ValueError(f"adapter: none could be loaded from '{adapter}'; {_first_line(error)}") from error
    return model.eval()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model under a LoRA adapter, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def restrict_to_decoder(peft_config: LoraConfig, model: PreTrainedModel) -> LoraConfig:
    """A copy of a LoRA configuration whose targets are linears of the language model alone.

    Names such as `q_proj` match the vision tower's linears too, and "all-linear" takes every one of them; a regular
    expression is the user's own word and is left as it is.

    Args:
        peft_config: `target_modules` None stands for the seven linears of a decoder layer.
        model: the model that the adapter will be put on.

    Raises:
        ValueError: no linear of the language model matches.
    """
    decoder = model.get_decoder()
    path = next(name for name, module in model.named_modules() if module is decoder)
    targets = peft_config.target_modules
    if targets == "all-linear":
        targets = {
            name.rsplit(".", 1)[-1] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)
        }
    elif isinstance(targets, str):
        return peft_config
    names = sorted(targets or LORA_TARGET_MODULES)
    prefix = rf"(.*\.)?{re.escape(path)}\." if path else ""
    pattern = rf"{prefix}(.*\.)?({'|'.join(map(re.escape, names))})"
    if not any(re.fullmatch(pattern, name) for name, _ in model.named_modules()):
        raise ValueError(
            f"target_modules: {names} match no module of the language model ({type(decoder).__name__}); name its "
            "linears, e.g. 'q_proj'."
        )
    restricted = copy.deepcopy(peft_config)
    restricted.target_modules = pattern
    return restricted


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
    """Log-probs of the response tokens of a packed row.

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
                "row, expected as many; the processor's patch_size, vision_feature_select_strategy and "
                "num_additional_image_tokens must be the model's."
            )
        # The id of the image token may lie outside the embedding table.
        embeds = model.get_input_embeddings()(input_ids.index_fill(0, image_rows, 0))
        embeds = embeds.index_copy(0, image_rows, image_features.to(embeds.dtype))
    # A 4-D mask is handed on untouched by transformers, and packed attention does not read it.
    unread_mask = embeds.new_zeros(1, 1, 1, 1)
    hidden = model.get_decoder()(
        inputs_embeds=embeds[None],
        position_ids=packing.position_ids[None],
        attention_mask=unread_mask,
        use_cache=False,
        packing=packing,
    ).last_hidden_state[0]
    rows = gather_rows(hidden, packing.logit_rows, packing.logit_rounds)
    text_config, head = model.config.get_text_config(), model.get_output_embeddings()
    # Under autocast the decoder's output is in the lower precision, and the head is cast as a linear layer's would be.
    weight = head.weight.to(rows.dtype)
    bias = None if head.bias is None else head.bias.to(rows.dtype)
    token_logps, statistics = flat_linear_token_logps(
        rows,
        weight,
        packing.targets,
        bias=bias,
        logit_softcap=getattr(text_config, "final_logit_softcapping", None),
        with_statistics=with_statistics,
    )
    return PackedOutput(token_logps=token_logps, statistics=statistics)


def enable_packed_forward(model: PreTrainedModel) -> None:
    """Let `model(packing=..., image_features=..., image_rows=..., with_statistics=...)` score a packed row.

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
            f"model: {type(decoder).__name__} does not call attention through transformers' attention interface, so "
            "responses cannot share their prefix; use a model that does, e.g. LLaVA over Llama, Mistral or Qwen2."
        )
    text_config = model.config.get_text_config()
    for name in ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier"):
        if getattr(text_config, name, None) not in (None, 1, 1.0):
            raise ValueError(
                f"model: its config scales logits by {name}, which is not supported; expected unscaled logits."
            )
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
    """Sequence log-probs of a packed row's branches.

    Args:
        token_logps: fp32 [N], as the packed forward gives them.
        packing: of that row, C branches.

    Returns:
        fp32 [C], the sum over each branch's tokens, in a fixed order.
    """
    lengths = [length for branches in packing.branch_lengths for length in branches]
    table = token_logps.new_zeros(len(lengths), max(lengths))
    return table.index_put((packing.branch_index, packing.branch_offset), token_logps).sum(dim=1)
