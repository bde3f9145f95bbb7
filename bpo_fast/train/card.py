"""The model card of a trained adapter: what it is, what it was made of, how it is used."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from bpo_fast.runs.files import replacing

CARD_FILE = "README.md"

_CARD = """\
---
{metadata}
---

# {title}

A LoRA adapter for the vision-language model `{base}`, made by bpo-fast with {method}.
It holds no model: load it on its base.

## Use

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{base}", dtype="auto")
model = PeftModel.from_pretrained(model, "ADAPTER")  # this folder, or where it was uploaded
processor = AutoProcessor.from_pretrained("{base}")
```

As one model that loads without PEFT:

```
bpo-fast merge --model_name_or_path {base} --adapter ADAPTER --output_dir MERGED
```

## Training data

{dataset}

## Training settings

{settings}
"""


def write_card(
    output_dir: str | os.PathLike,
    *,
    base_model: str | os.PathLike,
    settings: Mapping[str, Any],
    dataset: Mapping[str, Any],
) -> None:
    """Write the model card (README.md) of an adapter, in place of the one that PEFT writes.

    Paths of this machine are not for others to read: of each, the last component is left.

    Args:
        output_dir: folder that holds the adapter, or a checkpoint of it.
        base_model: name or path of the model under the adapter.
        settings: options of the training, e.g. loss_type, beta, learning_rate, max_steps, lora_r; "sft" alone as
            `loss_type` makes it supervised fine-tuning. None is left out.
        dataset: what is known of the pairs, e.g. name, fingerprint, pairs.

    Example:

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> write_card(folder, base_model="/data/llava", settings={"beta": 0.1}, dataset={"pairs": 4000})
    >>> print(Path(folder, "README.md").read_text().splitlines()[11])
    A LoRA adapter for the vision-language model `llava`, made by bpo-fast with preference training.
    """
    base = public_name(base_model)
    losses = settings.get("loss_type", ())
    losses = [losses] if isinstance(losses, str) else list(losses or ())
    is_sft = losses == ["sft"]
    data = ModelCardData(
        # A name that is no id on the Hub would be a broken link there.
        base_model=base if "/" in base else None,
        library_name="peft",
        pipeline_tag="image-text-to-text",
        tags=["bpo-fast", "lora", "sft" if is_sft else "preference-optimization"],
    )
    text = _CARD.format(
        metadata=data.to_yaml(),
        title=f"{base.rsplit('/', 1)[-1]}: {'SFT' if is_sft else 'preference'} adapter",
        base=base,
        method="supervised fine-tuning (SFT) on chosen answers" if is_sft else "preference training",
        dataset=_table(dataset),
        settings=_table(settings),
    )
    with replacing(Path(output_dir) / CARD_FILE) as file:
        file.write(text)


def public_name(value: str | os.PathLike) -> str:
    """A name for others: an id of the Hub as it is, the last component of a path of this machine.

    Example:

    >>> public_name("llava-hf/llava-1.5-7b-hf"), public_name("/home/me/llava"), public_name("../runs/llava/")
    ('llava-hf/llava-1.5-7b-hf', 'llava', 'llava')
    """
    name = os.fspath(value)
    is_local = name.startswith(("/", ".", "~")) or name.count("/") != 1 or os.path.exists(name) or "\\" in name
    return (Path(name.replace("\\", "/")).name or "model") if is_local else name


def _table(values: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {_cell(value)} |" for name, value in values.items() if value is not None]
    return "\n".join(["| option | value |", "|---|---|", *rows]) if rows else "Not recorded."


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple | set):
        text = ", ".join(map(_cell, sorted(value) if isinstance(value, set) else value))
    elif isinstance(value, Mapping):
        text = ", ".join(f"{name}: {_cell(each)}" for name, each in value.items())
    else:
        text = public_name(value) if isinstance(value, os.PathLike) or "/" in str(value) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
