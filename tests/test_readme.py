"""What README tells a reader to type runs, with a tiny model and a few images in place of theirs."""

import json
import math
import re
import shlex
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_world import make_world

from bpo_fast import doctor
from bpo_fast.cli import main as cli
from bpo_fast.data import load_preference_dataset

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
MODEL = "llava-hf/llava-1.5-7b-hf"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    """Every `bpo-fast` command of the shell blocks, without what stands after it."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("bpo-fast ")]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """The files that README names: a recipe, annotations, images, POPE's questions as they are published."""
    make_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    recipe = Path("run.yaml")
    recipe.write_text(recipe.read_text().replace("train: {", "train: {learning_rate: 0.01, "))
    Path("data.json").rename("llava_instruct.json")
    questions = json.loads(Path("questions.json").read_text())
    lines = [
        {"question_id": number, "image": row["image"], "text": row["question"], "label": row["label"]}
        for number, row in enumerate(questions)
    ]
    Path("pope.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


@pytest.mark.skipif(find_spec("bpo_fast.models.merge") is None, reason="needs bpo_fast.models.merge")
def test_the_commands_and_the_adapter_in_transformers_run(world, capsys):
    named = [argv[0] for argv in commands()]
    assert named == ["doctor", "demo", "bootstrap", "browse", "train", "evaluate", "plan", "merge"]
    for argv in commands()[2:]:
        if argv[0] == "plan":  # needs no file; tests/plan/test_run.py runs it
            continue
        argv = ["run.yaml" if word == "llava-1.5-7b" else word for word in argv]
        assert cli.main(argv) == 0, capsys.readouterr().err
    (code,) = (block for block in blocks("python") if "PeftModel" in block)
    names = {}
    exec(code.replace(MODEL, "model"), names)  # the adapter lies where the commands put it
    model, turns = names["model"].eval(), load_preference_dataset("pairs")[0]["prompt"]
    text = names["processor"].apply_chat_template(turns, add_generation_prompt=True)
    inputs = names["processor"](text=text, images=Image.open("images/0.png"), return_tensors="pt")
    with torch.no_grad():
        adapted = model(**inputs).logits
        merged = type(model.get_base_model()).from_pretrained("merged")(**inputs).logits
        with model.disable_adapter():
            base = model(**inputs).logits
    assert (adapted - base).abs().max() > 0.01
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-4)


def test_the_loss_and_the_noise_run():
    logits, generator = torch.randn(4, 5, 7, requires_grad=True), torch.Generator().manual_seed(0)
    labels = torch.randint(7, (4, 5), generator=generator)
    names = {"policy_logits": logits, "labels": labels, "ref_logits": logits.detach()}
    (code,) = (block for block in blocks("python") if "dpo_loss(" in block)
    exec(code, names)
    assert names["output"].loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert logits.grad.abs().max() > 0
    (code,) = (block for block in blocks("python") if "add_noise(" in block)
    features, ids = torch.randn(3, 4, 8, generator=generator), torch.tensor([5, 6, 7])
    there = {"features": features, "ids": ids}
    back = {"features": features.flip(0), "ids": ids.flip(0)}
    exec(code, there)
    exec(code, back)
    assert torch.equal(there["weakened"], back["weakened"].flip(0))
    assert not torch.equal(there["weakened"], features)


def test_every_hint_of_what_to_install_stands_in_the_readme():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    ranges = {line for lines in extras.values() for line in lines}
    installed = [remedy for _, _, _, remedy in doctor._OPTIONAL]
    assert all(f"`{remedy}`" in README for remedy in installed)
    assert set(re.findall(r"pip install '([^']+)'", README)) <= ranges
    assert "bpo-fast[" not in README


def test_every_file_that_the_readme_links_to_is_there():
    for link in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / link).exists(), link
