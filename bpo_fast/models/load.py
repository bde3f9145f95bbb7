"""Load a vision-language model, its adapter and its processor."""

from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils import is_bitsandbytes_available

from bpo_fast.models.families import PROJECTORS, VISION_MODULES


def load_processor(path: str | Path) -> ProcessorMixin:
    """The processor saved with a model, set up as training and generation here need it.

    Raises:
        ValueError: there is no processor at `path`, or it has no chat template.
    """
    with _loading("processor", path):
        processor = AutoProcessor.from_pretrained(path)
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"processor: found a {type(processor).__name__} in '{path}', expected one of images and text; name a "
            "vision-language model."
        )
    if processor.chat_template is None:
        raise ValueError(
            f"processor: found no chat template in '{path}', expected one, which makes the model's prompt of a "
            "conversation; add a chat_template.jinja to it."
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
            raise ImportError("quantization: found 'nf4' without bitsandbytes; pip install 'bpo-fast[qlora]'.")
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            # What is not the language model stays as it is: the vision part is small, and it makes the features.
            llm_int8_skip_modules=["lm_head", *VISION_MODULES, *PROJECTORS],
        )
    elif quantization is not None:
        raise ValueError(f"quantization: found '{quantization}', expected 'nf4' or None.")
    with _loading("model", path):
        model = AutoModelForImageTextToText.from_pretrained(path, **options)
    if adapter is not None:
        with _loading("adapter", adapter):
            model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


@contextmanager
def _loading(what: str, path: str | Path):
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{what}: found none that loads in '{path}', expected a saved one; {reason}") from error


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model under a LoRA adapter, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
