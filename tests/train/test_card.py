"""The model card says what an adapter is, and nothing of the machine that it was trained on."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from tiny_models import make_llava

from bpo_fast.train.card import write_card

SETTINGS = {
    "loss_type": ["sigmoid", "sft"],
    "loss_weights": [1.0, 0.5],
    "beta": 0.1,
    "learning_rate": 2e-6,
    "max_steps": 100,
    "lora_r": 64,
    "lora_target_modules": None,
    "output_dir": "/home/me/runs/bpo",
    "image_folder": Path("../coco/train2017"),
}
DATASET = {"name": "/data/secret/pairs.json", "fingerprint": "sha256:0123", "pairs": 4000}


def test_the_card_says_what_the_adapter_is_and_names_no_path(tmp_path):
    # As Trainer.save_model leaves it: with PEFT's own card, which tells the base's path.
    model = make_llava()
    model.config._name_or_path = str(tmp_path / "somewhere/llava-mine")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert str(tmp_path) in (tmp_path / "README.md").read_text()
    write_card(tmp_path, base_model=model.config._name_or_path, settings=SETTINGS, dataset=DATASET)
    text = (tmp_path / "README.md").read_text()
    assert "# llava-mine: preference adapter" in text
    assert (
        "A LoRA adapter for the vision-language model `llava-mine`, made by bpo-fast with preference training." in text
    )
    for line in (
        "| loss_type | sigmoid, sft |",
        "| beta | 0.1 |",
        "| learning_rate | 2e-06 |",
        "| max_steps | 100 |",
        "| lora_r | 64 |",
        "| output_dir | bpo |",
        "| image_folder | train2017 |",
        "| name | pairs.json |",
        "| fingerprint | sha256:0123 |",
        "| pairs | 4000 |",
    ):
        assert line in text.splitlines()
    assert "lora_target_modules" not in text
    assert not re.search(r"/(home|data|tmp|work|root)\b|\.\./", text)
    assert ModelCard(text).data.base_model is None
    assert "bpo-fast merge --model_name_or_path llava-mine --adapter ADAPTER --output_dir MERGED" in text


@pytest.mark.parametrize(
    ("losses", "tag", "method"), [(["sft"], "sft", "(SFT)"), ("dpo", "preference-optimization", "")]
)
def test_metadata_are_those_of_the_hub(tmp_path, losses, tag, method):
    write_card(tmp_path, base_model="llava-hf/llava-1.5-7b-hf", settings={"loss_type": losses}, dataset={})
    found = ModelCard.load(tmp_path / "README.md")
    assert found.data.to_dict() == {
        "base_model": "llava-hf/llava-1.5-7b-hf",
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["bpo-fast", "lora", tag],
    }
    assert method in found.text
    assert 'AutoModelForImageTextToText.from_pretrained("llava-hf/llava-1.5-7b-hf", dtype="auto")' in found.text
    assert "Not recorded." in found.text
