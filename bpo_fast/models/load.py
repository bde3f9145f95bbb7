"""Load a vision-language model, its adapter and its processor."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from jinja2 import TemplateSyntaxError
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import find_adapter_config_file, is_bitsandbytes_available

from bpo_fast.models.weights import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MODEL_CONFIG,
    check_adapter_files,
    check_model_files,
    found_an_adapter,
    local_folder,
    read_config,
    refuse_remote_code,
)

# Of a processor: what is read before its classes are chosen, and may name code of its own.
PROCESSOR_CONFIGS = (
    "processor_config.json",
    "preprocessor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    MODEL_CONFIG,
)
# Further JSON of a processor, which is to be whole.
_PROCESSOR_FILES = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")


def load_processor(path: str | Path, *, trust_remote_code: bool = False) -> ProcessorMixin:
    """The processor saved with a model, set up as training and generation here need it.

    Args:
        path: a folder written by `save_pretrained`, or a model id.
        trust_remote_code: run code that comes with the processor instead of refusing it.

    Raises:
        ValueError: there is no whole processor at `path`, it brings code of its own, it has no chat template, or one
            that is no template.
    """
    folder = local_folder("processor", path)
    if folder is not None:
        _check_processor_files(folder, trust_remote_code)
    with loading("processor", path):
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    if not (hasattr(processor, "tokenizer") and hasattr(processor, "image_processor")):
        raise ValueError(
            f"processor: found a {type(processor).__name__} in '{path}', expected one of images and text; name a "
            "vision-language model."
        )
    if processor.chat_template is None:
        raise ValueError(
            f"processor: found no chat template in '{path}', expected one, which makes the model's prompt of a "
            "conversation; add a chat_template.jinja to it."
        )
    try:
        processor.apply_chat_template(_SAMPLE, tokenize=False)
    except TemplateSyntaxError as error:
        raise ValueError(
            f"processor: found a chat template in '{path}' that is none ({error.message}, line {error.lineno}), "
            "expected a Jinja template; mend its chat_template.jinja."
        ) from None
    except Exception:
        pass  # what a template thinks of a conversation is told when there is one
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


_SAMPLE = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]


def load_model(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    float16_as: torch.dtype | None = None,
    device: str | torch.device | None = None,
    adapter: str | Path | None = None,
    quantization: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel | PeftModel:
    """Load a vision-language model for evaluation, bootstrapping or training.

    Weights are read from safetensors alone, and every tensor of the model and of the adapter must be there in its
    shape: nothing is left as it was initialised.

    Args:
        path: a folder written by `save_pretrained`, or a model id.
        dtype: of the weights; "auto" keeps that of the checkpoint.
        float16_as: what "auto" makes of a checkpoint that its configuration calls float16. One that is trained under
            bfloat16 autocast would else be rounded from one to the other at every layer.
        device: where to put it; by default the first CUDA device, or else the CPU.
        adapter: folder of an adapter to put on top, as training leaves it, or its id.
        quantization: "nf4" holds the language model's linears in 4 bits with double quantisation, None does not.
        trust_remote_code: run code that comes with the model instead of refusing it.

    Returns:
        The model in evaluation mode; a `PeftModel` when an adapter was named.

    Raises:
        ValueError: nothing can be loaded from `path` or `adapter`, they do not fit, they bring code of their own, or
            `quantization` is unknown.
        ImportError: `quantization` needs bitsandbytes and it is not installed.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options = {"dtype": dtype, "device_map": {"": device}, "use_safetensors": True}
    # Told by name below; transformers' own error names none.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "trust_remote_code": trust_remote_code}
    if quantization not in (None, "nf4"):
        raise ValueError(f"quantization: found '{quantization}', expected 'nf4' or None.")
    if quantization and not is_bitsandbytes_available():
        raise ImportError("quantization: found 'nf4' without bitsandbytes; pip install 'bitsandbytes>=0.48'.")
    _check_model(path, trust_remote_code)
    if dtype == "auto" and float16_as is not None and _is_float16(path):
        dtype = options["dtype"] = float16_as
    if quantization:
        options["quantization_config"] = _nf4(path, dtype, trust_remote_code)
    # Before the model, which takes minutes.
    adapter_folder = None if adapter is None else _adapter_folder(adapter)
    with loading("model", path):
        model, found = AutoModelForImageTextToText.from_pretrained(path, **options)
    check_tensors(model, found, path)
    if adapter_folder is not None:
        model = _with_adapter(model, adapter_folder)
    return model.eval()


def _check_model(path: str | Path, trust_remote_code: bool) -> None:
    folder = local_folder("model", path)
    if folder is not None:
        check_model_files(folder)
        refuse_remote_code([folder / MODEL_CONFIG], trust_remote_code=trust_remote_code)
        return
    with loading("model", path):
        is_adapter = find_adapter_config_file(path) is not None
    if is_adapter:
        # transformers would put it on whatever model it names.
        raise found_an_adapter(path)


def _nf4(path: str | Path, dtype: str | torch.dtype, trust_remote_code: bool) -> BitsAndBytesConfig:
    """Four bits for the linears of the decoder's layers. The vision part is small and makes the features: it stays."""
    with loading("model", path), torch.device("meta"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
    decoder = model.get_decoder()
    # transformers looks for these from the start of a module's full name, as regular expressions: the name of the
    # vision tower alone is found in none.
    outside, parts = [], [*model.named_children()]
    while parts:
        name, part = parts.pop()
        if part is not decoder and decoder in part.modules():
            parts += [(f"{name}.{child}", inner) for child, inner in part.named_children()]
        elif part is not decoder:
            outside.append(re.escape(name))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=(config.dtype or torch.bfloat16) if dtype == "auto" else dtype,
        llm_int8_skip_modules=outside,
    )


def _is_float16(path: str | Path) -> bool:
    with loading("model", path):
        config, _ = PreTrainedConfig.get_config_dict(path)
    return str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.") == "float16"


def check_tensors(model: PreTrainedModel, found: dict, path: str | Path, what: str = "model") -> None:
    """Refuse a checkpoint that left a tensor of the model as it was initialised, or has a layer too many.

    Args:
        model: as it was loaded from `path`.
        found: what `from_pretrained` says of the loading, with its `output_loading_info`.
        path: begins with `what` the sentence of an error.

    Raises:
        ValueError: with the first tensors' names.
    """
    missing = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if missing:
        raise ValueError(
            f"{what}: found {len(missing)} tensors missing or of another shape in '{path}' "
            f"({', '.join(missing[:3])}), expected every one of the model's; its weights and config.json do not "
            "belong together, copy or download both again."
        )
    places = {_without_numbers(name) for name, _ in model.named_parameters()}
    left = sorted(key for key in found["unexpected_keys"] if _without_numbers(key) in places)
    if left:
        raise ValueError(
            f"{what}: found {len(left)} tensors in '{path}' without a place in the model ({', '.join(left[:3])}), "
            "expected as many layers as config.json says; its weights and config.json do not belong together."
        )


def _without_numbers(name: str) -> str:
    return ".".join("N" if part.isdigit() else part for part in name.split("."))


def _adapter_folder(adapter: str | Path) -> Path:
    """The folder of an adapter, checked; that of an id is its snapshot on this machine, without pickles."""
    folder = local_folder("adapter", adapter)
    if folder is None:
        with loading("adapter", adapter):
            folder = Path(snapshot_download(str(adapter), allow_patterns=[ADAPTER_CONFIG, ADAPTER_WEIGHTS]))
    check_adapter_files(folder)
    return folder


def _with_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    with loading("adapter", folder):
        config = PeftConfig.from_pretrained(folder)
    if config.is_prompt_learning:
        raise ValueError(
            f"adapter: found {config.peft_type.value} in '{folder}', expected an adapter of weights, e.g. LoRA, since "
            "images and text are embedded without it here."
        )
    with loading("adapter", folder):
        model = PeftModel.from_pretrained(model, folder)
        # PEFT only warns of tensors that it finds no place for, and of places without a tensor.
        (name,) = model.peft_config
        found = model.load_adapter(folder, name)
    for keys, what in [(found.unexpected_keys, "without a place in the model"), (found.missing_keys, "missing")]:
        if keys:
            raise ValueError(
                f"adapter: found {len(keys)} tensors {what} in '{folder}' ({', '.join(sorted(keys)[:3])}), expected "
                "those of an adapter of this model; name the model that it was trained on."
            )
    return model


def _check_processor_files(folder: Path, trust_remote_code: bool) -> None:
    # Training saves a processor beside its adapter; other adapters come without.
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "tokenizer_config.json").is_file():
        raise found_an_adapter(folder)
    configs = [folder / name for name in PROCESSOR_CONFIGS]
    if (folder / ADAPTER_CONFIG).is_file() and not any(map(Path.is_file, configs)):
        raise found_an_adapter(folder)
    refuse_remote_code(configs, trust_remote_code=trust_remote_code)
    for file in (folder / name for name in _PROCESSOR_FILES):
        if file.is_file():
            read_config(file)


@contextmanager
def loading(what: str, path: str | Path) -> Iterator[None]:
    """One sentence for whatever the libraries below raise of files that they cannot use.

    Args:
        what: begins the sentence.
        path: of the files.
    """
    try:
        yield
    # What this machine lacks, memory or a package, is not the files' fault.
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
        reason = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]).rstrip(".")
        if not isinstance(error, OSError | ValueError | RuntimeError):
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(f"{what}: found none that loads in '{path}', expected a saved one; {reason}.") from error


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model under a LoRA adapter, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
