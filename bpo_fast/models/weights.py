"""Weight files: which ones a name stands for, whether they are whole, and a fingerprint of what they hold."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_CONFIG = "config.json"

_MODEL_INDEX = "model.safetensors.index.json"
_MODEL_WEIGHTS = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Beside the weights, what decides a model's answers: configurations, tokenizer, chat templates, code.
_SMALL_FILES = ("*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")

# A tensor of at most so many bytes is read whole; of a larger one, a block in its middle and one at its end.
_WHOLE = 64 * 1024
_BLOCK = 4 * 1024
# Values of a loaded parameter that its fingerprint reads, at even distances.
_VALUES = 256


def local_folder(what: str, path: str | os.PathLike) -> Path | None:
    """The folder that `path` names, or None where it is a model id of the Hugging Face Hub.

    Whatever looks like a path and is none is refused here, before anyone asks the network for it: what is absolute,
    begins with "." or "~", has no slash or more than one, or lies in a folder that exists.

    Args:
        what: begins the sentence of an error.
        path: as a user gave it.

    Raises:
        ValueError: `path` is a file, or looks like a path and does not exist.

    Example:

    >>> local_folder("model", "llava-hf/llava-1.5-7b-hf") is None
    True
    >>> local_folder("model", "models/runs/llava")
    Traceback (most recent call last):
    ValueError: model: found no folder 'models/runs/llava', expected one, or a model id (OWNER/NAME); mind the path.
    """
    name = os.fspath(path)
    if name and os.path.isdir(name):
        return Path(name)
    if os.path.exists(name):
        raise ValueError(f"{what}: found the file '{name}', expected the folder that it lies in; name that.")
    parent = os.path.dirname(name)
    looks_local = name.count("/") != 1 or name[0] in "/.~" or os.path.isdir(parent)
    if not looks_local:
        try:
            validate_repo_id(name)
        except HFValidationError:
            looks_local = True
    if looks_local and not _cached_commit(name):
        raise ValueError(f"{what}: found no folder '{name}', expected one, or a model id (OWNER/NAME); mind the path.")
    return None


def read_config(file: Path) -> dict[str, Any]:
    """A JSON object from a file that belongs to a model, an adapter or a processor.

    Raises:
        ValueError: it cannot be read, or is no JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: found no file that can be read ({error.strerror}), expected JSON.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file}: found what is not JSON ({error}), expected a whole file; copy or download it again."
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: found a JSON {type(content).__name__}, expected an object; copy it again.")
    return content


def refuse_remote_code(files: Iterable[Path], *, trust_remote_code: bool) -> None:
    """Refuse configurations that name code of their own, unless it was asked for.

    Args:
        files: JSON files; those that do not exist are passed over.
        trust_remote_code: whether such code may run.

    Raises:
        ValueError: a file has an `auto_map`, or is no JSON object.
    """
    for file in filter(Path.is_file, files):
        if "auto_map" in read_config(file) and not trust_remote_code:
            raise ValueError(
                f"{file}: found code of its own (auto_map), expected a model whose code is in transformers; read that "
                "code and pass trust_remote_code=True (--trust_remote_code true), or take auto_map out of the file."
            )


def check_model_files(folder: Path, what: str = "model") -> None:
    """Refuse a folder whose weights are missing, pickled, cut off or garbage.

    Args:
        folder: of a model.
        what: begins the sentence of an error.

    Raises:
        ValueError: with the file's name.
    """
    if (folder / ADAPTER_CONFIG).exists():
        raise found_an_adapter(folder)
    if not (folder / MODEL_CONFIG).is_file():
        raise ValueError(f"{what}: found no {MODEL_CONFIG} in '{folder}', expected a folder of save_pretrained.")
    files = _model_weights(folder)
    if not files:
        raise _no_weights(what, folder, _MODEL_WEIGHTS)
    for file in files:
        _read_header(file)


def found_an_adapter(path: str | os.PathLike) -> ValueError:
    """What to raise of an adapter that was given as the model."""
    return ValueError(
        f"model: found an adapter in '{path}', expected the model that it was trained on; name that as the model and "
        "this one as the adapter (--adapter)."
    )


def check_adapter_files(folder: Path) -> None:
    """Refuse an adapter's folder whose configuration or weights are missing, pickled, cut off, garbage or not finite.

    Training's checkpoints are such folders, too.

    Raises:
        ValueError: with the file's name.
    """
    config_file, weights = folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS
    if not config_file.is_file():
        raise ValueError(f"adapter: found no {ADAPTER_CONFIG} in '{folder}', expected a folder that training saved.")
    config = read_config(config_file)
    refuse_remote_code([config_file], trust_remote_code=False)
    kind, rank = config.get("peft_type"), config.get("r")
    if kind not in {known.value for known in PeftType}:
        raise ValueError(f"{config_file}: found peft_type {kind!r}, expected one that PEFT knows, e.g. 'LORA'.")
    if kind == PeftType.LORA and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"{config_file}: found r {rank!r}, expected the adapter's rank, an integer of at least 1.")
    base = config.get("base_model_name_or_path")
    if not (base is None or isinstance(base, str)):
        raise ValueError(f"{config_file}: found base_model_name_or_path {base!r}, expected a model's name or path.")
    if not weights.is_file():
        raise _no_weights("adapter", folder, ADAPTER_WEIGHTS)
    _read_header(weights)
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise ValueError(
            f"{weights}: found damage ({error}), expected a whole safetensors file; copy it again."
        ) from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(
                f"{weights}: found NaN or infinity in '{name}', expected finite numbers; take an earlier checkpoint."
            )


def _no_weights(what, folder, expected):
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        return ValueError(
            f"{what}: found pickled weights ({pickles[0]}) in '{folder}', expected {expected}, since a pickle may run "
            "any code; save the weights again with safetensors."
        )
    return ValueError(f"{what}: found no weights in '{folder}', expected {expected}; copy or download it again.")


def weights_fingerprint(path: str | os.PathLike, *, what: str = "model") -> str:
    """What the weights of a model or an adapter hold, without loading them.

    An adapter's configuration and weights are read whole. Of a model, the small files (configurations, tokenizer,
    chat templates) are read whole and, of each weight file, its size, its header (names, types, shapes), every tensor
    of at most 64 KiB, and 4 KiB in the middle and at the end of each larger one: a 26 GB model takes well under two
    seconds, and a change of any one tensor of it shows, unless it leaves those blocks as they are. Names of folders
    and times of files do not count.

    A model id stands for its snapshot on this machine, by the commit's hash. Where there is none yet, its
    configuration is fetched, so that the answer is the same before and after the model is loaded; where that cannot be
    had, the bare name is left.

    Args:
        path: a folder, or a model id of the Hugging Face Hub.
        what: begins the sentence of an error: "model" or "adapter".

    Raises:
        ValueError: there is no such folder, or a weight file is cut off or garbage.
    """
    folder = local_folder(what, path)
    if folder is None:
        commit = _cached_commit(os.fspath(path)) or _fetched_commit(os.fspath(path), what)
        return f"hub:{os.fspath(path)}" + (f"@{commit}" if commit else "")
    digest = hashlib.sha256()
    if (folder / ADAPTER_CONFIG).is_file():
        whole, sampled = [folder / ADAPTER_CONFIG, *sorted(folder.glob("adapter_model*"))], []
    else:
        whole = sorted({file for pattern in _SMALL_FILES for file in folder.glob(pattern) if file.is_file()})
        sampled = _model_weights(folder)
    for file in whole:
        digest.update(f"{file.relative_to(folder)}\n".encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    for file in sampled:
        digest.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode())
        for block in _sampled_blocks(file):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"


@torch.no_grad()
def model_fingerprint(model: nn.Module) -> str:
    """What the weights of a loaded model hold.

    Read are names, types, shapes and, of every parameter, 256 values at even distances; of the active adapter's
    parameters, all values, and its configuration. The device does not count, and an adapter that is loaded but not
    active does not either.

    Args:
        model: a model of transformers, with or without an adapter.
    """
    digest = hashlib.sha256()
    adapters = []
    if isinstance(model, PeftModel):
        adapters = model.active_adapters if model.has_active_enabled_adapter else []
        for name in adapters:
            config = model.peft_config[name].to_dict()
            # Where the adapter came from, and whether it was loaded for training.
            for field in ("base_model_name_or_path", "inference_mode", "peft_version", "revision"):
                config.pop(field, None)
            digest.update(json.dumps(config, sort_keys=True, default=_plain).encode())
    adapted = adapter_parameters(model)
    for name, parameter in model.named_parameters():
        whole = name in adapted
        if whole and not any(adapter in name.split(".") for adapter in adapters):
            continue
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        if parameter.is_meta:
            continue
        values = parameter.detach().reshape(-1)
        if not whole and len(values) > _VALUES:
            places = torch.linspace(0, len(values) - 1, _VALUES, dtype=torch.float64).long()
            values = values[places.to(values.device)]
        digest.update(values.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that adapters brought into a model, by their names; not those of the modules that they wrap."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            for name, parameter in module.named_parameters():
                if name.split(".")[0] not in ("base_layer", "original_module"):
                    found[f"{path}.{name}"] = parameter
    return found


def _plain(value):
    """A set of an adapter's configuration in an order of its own, and anything else by its text."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _cached_commit(name: str) -> str | None:
    """The commit of a model id's snapshot on this machine."""
    for file in (MODEL_CONFIG, ADAPTER_CONFIG):
        try:
            found = try_to_load_from_cache(name, file)
        except HFValidationError:
            return None
        if isinstance(found, str):
            return Path(found).parent.name
    return None


def _fetched_commit(name: str, what: str) -> str | None:
    try:
        file = hf_hub_download(name, ADAPTER_CONFIG if what == "adapter" else MODEL_CONFIG)
    except (OSError, HFValidationError):
        return None  # loading says why
    return Path(file).parent.name


def _model_weights(folder: Path) -> list[Path]:
    """The weight files that transformers reads, in order; refused when the index names one that is not there."""
    if (folder / _MODEL_WEIGHTS).is_file():
        return [folder / _MODEL_WEIGHTS]
    index = folder / _MODEL_INDEX
    if not index.is_file():
        return []
    weight_map = read_config(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: found no weight_map, expected the file of each tensor; download it again.")
    files = [folder / str(name) for name in sorted(set(map(str, weight_map.values())))]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: found no such file, expected one that {index.name} names; download it again.")
    return files


def _read_header(file: Path) -> tuple[dict, int]:
    """The tensors of a safetensors file and the place where their bytes begin; refused unless the file is whole."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
        header = opened.read(start - 8) if 8 < start <= size else b""
    try:
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        end = start + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    except (ValueError, RecursionError, AttributeError, TypeError, LookupError):
        tensors, end = None, None
    if tensors is None or end != size:
        found = "an empty file" if not size else f"{size:,} bytes that are no safetensors file"
        if tensors is not None:
            found = f"{size:,} bytes of {end:,}"
        raise ValueError(f"{file}: found {found}, expected a whole safetensors file; copy or download it again.")
    return tensors, start


def _sampled_blocks(file: Path) -> Iterator[bytes]:
    tensors, start = _read_header(file)
    with file.open("rb", buffering=0) as opened:
        yield _read(opened, 0, start)
        for begin, end in sorted(tensor["data_offsets"] for tensor in tensors.values()):
            begin, end = start + begin, start + end
            if end - begin <= _WHOLE:
                yield _read(opened, begin, end - begin)
            else:
                yield _read(opened, begin + (end - begin) // 2, _BLOCK)
                yield _read(opened, end - _BLOCK, _BLOCK)


def _read(file: BinaryIO, place: int, count: int) -> bytes:
    file.seek(place)
    return file.read(count)
