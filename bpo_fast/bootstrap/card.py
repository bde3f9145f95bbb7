"""The data set's card: what `datasets.load_dataset` and a reader need to know of a run's folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bpo_fast.data.pairs import CARD_FILE
from bpo_fast.runs.files import json_text, replacing

_HEAD = """\
---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
task_categories:
- image-text-to-text
tags:
- preference
- dpo
- bpo-fast
---

# {pairs:,} preference pairs

Made by `bpo-fast bootstrap`: the chosen response is an annotated answer, the rejected one \
was made as `rejected_type` says. Columns as TRL's trainers take them, {where}. `manifest.json` has checksums, counts \
and all settings, `skipped.jsonl` what was left out and why.

```python
from datasets import load_dataset

pairs = load_dataset("FOLDER", split="train")
```
"""


def write_card(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the card of a run.

    Args:
        folder: of the run.
        manifest: of it.
    """
    counts = manifest["counts"]
    where = "images inside" if manifest["embed_images"] else "images by path"
    tables = [
        _table(("rejected_type", "pairs"), counts["kinds"]),
        _table(("source", "pairs"), counts["sources"]) if any(counts["sources"]) else "",
        _table(("setting", "value"), {name: _code(value) for name, value in manifest["settings"].items()}),
    ]
    with replacing(folder / CARD_FILE) as file:
        file.write("\n".join([_HEAD.format(pairs=counts["pairs"], where=where), *tables]))


def _table(head, rows):
    lines = [head, ("---", "---"), *rows.items()]
    return "".join(f"| {first} | {second} |\n" for first, second in lines)


def _code(value):
    return f"`{json_text(value)}`".replace("|", "\\|")
