"""A folder as a user has one: a saved model, images, annotations, pairs, questions, a recipe."""

import json
import random
from pathlib import Path

from PIL import Image
from tiny_models import SPECIAL, make_llava, make_processor

from bpo_fast.data.formats import preference_row

NUM_PAIRS = 4


def make_world(folder: Path) -> None:
    """Fill `folder`; commands run in it need `--config run.yaml` and what the recipe lacks: an `--output_dir`."""
    model = make_llava()
    model.lm_head.weight.data[: len(SPECIAL)] = 0  # so that every response has words
    model.save_pretrained(folder / "model")
    make_processor().save_pretrained(folder / "model")
    (folder / "images").mkdir()
    annotations, pairs, questions = [], [], []
    for number in range(NUM_PAIRS):
        image = f"{number}.png"
        Image.frombytes("RGB", (16, 16), random.Random(number).randbytes(768)).save(folder / "images" / image)
        turns = [{"from": "human", "value": f"<image>\nw{number}"}, {"from": "gpt", "value": f"w3 w{number}"}]
        annotations.append({"id": str(number), "image": image, "conversations": turns})
        pairs.append(preference_row(image, f"w{number}", f"w3 w{number}", f"w4 w{number}", id=str(number)))
        label = ("yes", "no")[number % 2]
        questions.append({"id": str(number), "image": image, "question": f"w{number}", "label": label})
    write(folder / "data.json", annotations)
    write(folder / "pairs.json", pairs)
    write(folder / "questions.json", questions)
    (folder / "run.yaml").write_text(
        "model_name_or_path: model\n"
        "image_folder: images\n"
        "bootstrap: {annotations: data.json, max_new_tokens: 5, batch_size: 2}\n"
        "train: {dataset: pairs.json, use_cpu: true, max_steps: 2, save_steps: 1, per_device_train_batch_size: 2,\n"
        "        report_to: none, disable_tqdm: true, lora_r: 2, gradient_checkpointing: false}\n"
        "evaluate: {questions: questions.json, kind: pope, max_new_tokens: 3, batch_size: 2}\n"
    )


def write(path: Path, value) -> None:
    path.write_text(json.dumps(value))


def edit(path: Path, change) -> None:
    """Rewrite a JSON file with what `change` makes of its content; None keeps the content that it changed in place."""
    content = json.loads(path.read_text())
    changed = change(content)
    write(path, content if changed is None else changed)
