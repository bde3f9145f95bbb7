"""A fingerprint of every byte that a loaded model computes with, without its adapter: a reference is known by it."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from bpo_fast.models.load import base_model
from bpo_fast.models.weights import adapter_parameters

# What a configuration says of files and of generation, or what a Trainer sets: no forward pass reads it.
_UNREAD = {
    *("_name_or_path", "architectures", "transformers_version", "use_cache", "dtype", "torch_dtype"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
}


@torch.no_grad()
def tensors_fingerprint(model: nn.Module, *, progress: bool = False) -> str:
    """What a loaded model computes without its adapter: its class, configuration and every byte of its tensors.

    `models.weights.model_fingerprint` samples values and tells one model from another; this reads all of them, the
    scales of quantised weights and the buffers among them, so that a change of a single value is another model. A
    26 GB model takes a few seconds on several cores. Devices and adapters do not count, nor does where it came from.

    Args:
        model: a model of transformers, with or without an adapter.
        progress: show a bar.
    """
    base = base_model(model)
    adapted = adapter_parameters(base)
    found = {_plain_name(name): x for name, x in _tensors(base) if name not in adapted}
    digest = hashlib.sha256(f"{type(base).__name__} {json.dumps(_read(base.config.to_dict()), default=str)}".encode())
    total = sum(x.nbytes for x in found.values())
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="reading weights", disable=not progress)
    with bar, ThreadPoolExecutor(4) as threads:  # hashing frees the interpreter's lock
        for (name, x), content in zip(found.items(), threads.map(_content, found.values()), strict=True):
            digest.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode() + content)
            bar.update(x.nbytes)
    return f"sha256:{digest.hexdigest()}"


def _tensors(base: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in base.named_parameters():
        yield name, parameter
        # bitsandbytes keeps the scales of 4- and 8-bit weights beside them, as no parameter and no buffer.
        if state := getattr(parameter, "quant_state", None):
            yield from ((f"{name}.{part}", x) for part, x in state.as_dict(packed=True).items())
        if (scales := getattr(parameter, "SCB", None)) is not None:
            yield f"{name}.SCB", scales
    yield from base.named_buffers()


def _content(x: torch.Tensor) -> bytes:
    if x.is_meta:
        return b""
    return hashlib.sha256(x.detach().reshape(-1).contiguous().cpu().view(torch.uint8).numpy()).digest()


def _plain_name(name: str) -> str:
    """The name of a tensor before an adapter wrapped its module."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))


def _read(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _read(each) for name, each in sorted(value.items(), key=str) if name not in _UNREAD}
    return [_read(each) for each in value] if isinstance(value, list | tuple) else value
