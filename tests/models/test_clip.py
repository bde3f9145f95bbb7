import json
import random

import pytest
import torch
from PIL import Image
from tiny_clip import make_clip, save_clip
from transformers import AutoModel, AutoProcessor, CLIPVisionModel

from bpo_fast.models.clip import load_clip, sentences

CPU = torch.device("cpu")
TEXTS = ["w1 w2 w3", "w4 w5. w6 w7! w8", "w9"]


def noise(number):
    return Image.frombytes("RGB", (20, 16), random.Random(number).randbytes(960))


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_alignment_is_the_mean_cosine_of_the_sentences(tmp_path, family):
    save_clip(tmp_path, family)
    found = load_clip(str(tmp_path), CPU).alignments(noise(0), TEXTS)
    model, processor = AutoModel.from_pretrained(tmp_path).double(), AutoProcessor.from_pretrained(tmp_path)

    def cosine(sentence):
        length = model.config.text_config.max_position_embeddings
        inputs = processor(
            text=[sentence], images=noise(0), padding="max_length", max_length=length, return_tensors="pt"
        )
        with torch.no_grad():
            output = model(**{name: x.double() if x.is_floating_point() else x for name, x in inputs.items()})
        return torch.cosine_similarity(output.text_embeds, output.image_embeds).item()

    expected = [cosine("w1 w2 w3"), sum(map(cosine, ("w4 w5.", "w6 w7!", "w8"))) / 3, cosine("w9")]
    assert found == pytest.approx(expected, abs=1e-6)
    assert max(expected) - min(expected) > 1e-2


def test_an_alignment_depends_on_its_own_text_alone(tmp_path):
    save_clip(tmp_path)
    clip = load_clip(str(tmp_path), CPU)
    alone = [clip.alignments(noise(0), [text])[0] for text in TEXTS]
    assert clip.alignments(noise(0), TEXTS) == pytest.approx(alone, abs=1e-6)
    assert clip.alignments(noise(1), TEXTS) != pytest.approx(alone, abs=1e-3)


def test_a_text_longer_than_the_model_reads_is_worth_its_sentences(tmp_path):
    save_clip(tmp_path)
    clip = load_clip(str(tmp_path), CPU)
    first, second, long = clip.alignments(noise(0), ["w1 w2.", "w3 w4.", "w1 w2. w3 w4. " * 40])
    assert long == pytest.approx((first + second) / 2, abs=1e-6)
    # Of one sentence that is too long, the beginning counts.
    begun = " ".join(f"w{n}" for n in range(60))
    one, other = clip.alignments(noise(0), [begun, f"{begun} w61 w62"])
    assert one == pytest.approx(other, abs=1e-6)


def test_what_a_sentence_is():
    assert sentences("3.5 m is long. It is e.g. this") == ["3.5 m is long.", "It is e.g.", "this"]
    assert sentences("有两只狗。它们在跑！") == ["有两只狗。", "它们在跑！"]  # noqa: RUF001
    assert sentences("1. One\n2. Two\n") == ["One", "Two"]
    assert sentences("2") == ["2"]


def test_it_is_loaded_once(tmp_path):
    save_clip(tmp_path)
    assert load_clip(str(tmp_path), CPU) is load_clip(str(tmp_path), CPU)


def test_what_is_no_model_of_images_and_texts_is_a_sentence(tmp_path):
    model, processor = make_clip()
    vision = tmp_path / "vision"
    CLIPVisionModel(model.config.vision_config).save_pretrained(vision)
    processor.save_pretrained(vision)
    with pytest.raises(ValueError, match=r"^alignment_model: found a CLIPVisionModel in .* embeds images and texts"):
        load_clip(str(vision), CPU)
    with pytest.raises(ValueError, match=r"^alignment_model: found no folder '.*nothing', expected one, or"):
        load_clip(str(tmp_path / "nothing"), CPU)
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"^alignment_model: found none that loads in .*bare"):
        load_clip(str(tmp_path / "bare"), CPU)
    save_clip(tmp_path / "pickled")
    torch.save({}, tmp_path / "pickled/pytorch_model.bin")
    (tmp_path / "pickled/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"^alignment_model: found pickled weights"):
        load_clip(str(tmp_path / "pickled"), CPU)
    save_clip(tmp_path / "code")
    config = json.loads((tmp_path / "code/config.json").read_text())
    (tmp_path / "code/config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(ValueError, match="found code of its own"):
        load_clip(str(tmp_path / "code"), CPU)
    save_clip(tmp_path / "layers")
    config = json.loads((tmp_path / "layers/config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    (tmp_path / "layers/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"^alignment_model: found \d+ tensors missing"):
        load_clip(str(tmp_path / "layers"), CPU)


def test_a_model_that_gives_no_number_or_fails_is_a_sentence(tmp_path, monkeypatch):
    model, processor = make_clip()
    processor.save_pretrained(tmp_path)
    model.visual_projection.weight.data[0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^alignment_model: found nan as the alignment of a text by "):
        load_clip(str(tmp_path), CPU)
    monkeypatch.setattr(type(model), "get_text_features", lambda *_, **__: None)
    with pytest.raises(ValueError, match=r"^alignment_model: found none that loads in .* AttributeError: "):
        load_clip(str(tmp_path), CPU)
