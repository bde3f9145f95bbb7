"""A model with its adapter merged into it, as one that loads without PEFT."""

import os
import shutil
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from bpo_fast.models.load import load_model, load_processor


def merge_adapter(
    model_path: str | os.PathLike,
    adapter: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
) -> Path:
    """Save the model that an adapter makes of its base: weights in safetensors, configuration and processor.

    The folder takes its name only when everything in it is written.

    Args:
        model_path: the base model, a folder or a model id.
        adapter: folder of the adapter, or its id.
        output_dir: folder of the merged model; it must be empty or not exist.
        dtype: of the merged weights; "auto" keeps that of the base. The sum is rounded to it once.
        trust_remote_code: run code that comes with the base model instead of refusing it.

    Returns:
        `output_dir`.

    Raises:
        ValueError: `output_dir` holds something, the base or the adapter does not load (see
            `bpo_fast.models.load.load_model`), or the adapter cannot be merged.

    Example:

        merge_adapter("llava-hf/llava-1.5-7b-hf", "adapter", "llava-1.5-7b-bpo")
    """
    output_dir = Path(output_dir)
    if output_dir.is_dir():
        if any(output_dir.iterdir()):
            raise ValueError(
                f"output_dir: found files in '{output_dir}', expected an empty or a new folder; name one."
            )
    elif os.path.lexists(output_dir):
        raise ValueError(f"output_dir: found the file '{output_dir}', expected a folder; name another.")
    processor = load_processor(model_path, trust_remote_code=trust_remote_code)
    options = {"dtype": dtype, "device": "cpu", "trust_remote_code": trust_remote_code}
    merged = _merge(load_model(model_path, adapter=adapter, **options), adapter)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = output_dir.with_name(f".{output_dir.name}.{os.getpid()}.tmp")
    try:
        merged.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        os.replace(temporary, output_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output_dir


def _merge(model, adapter):
    base = model.get_base_model()
    tables = base.get_input_embeddings(), base.get_output_embeddings()
    if base.config.get_text_config().tie_word_embeddings and any(isinstance(each, BaseTunerLayer) for each in tables):
        raise ValueError(
            f"adapter: found one on the embeddings in '{adapter}', expected none, since the model ties embeddings and "
            "output head; use it unmerged."
        )
    try:
        return model.merge_and_unload(progressbar=True, safe_merge=True)
    # What PEFT raises of the kinds that are more than a sum on weights.
    except (ValueError, NotImplementedError, AttributeError) as error:
        reason = str(error).rstrip(".")
        raise ValueError(
            f"adapter: found one in '{adapter}' that cannot be merged ({reason}), expected e.g. LoRA; use it unmerged."
        ) from error
