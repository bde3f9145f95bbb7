import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_llava

from bpo_fast.answers.given import GivenModel
from bpo_fast.models.weights import model_fingerprint, weights_fingerprint


@pytest.fixture
def saved(tiny_llava, tmp_path):
    model, processor = tiny_llava
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_path_is_known_by_what_lies_there_and_loaded_when_asked(saved):
    given = GivenModel(saved, init_kwargs={"dtype": torch.bfloat16, "quantization": None})
    assert given.settings() == {
        "model": {"path": str(saved), "weights": weights_fingerprint(saved)},
        "adapter": None,
        "dtype": "bfloat16",
        "quantization": None,
    }
    model, processor = given.load()
    assert model.dtype == torch.bfloat16
    assert processor.chat_template == GivenModel(saved).load()[1].chat_template
    before = given.settings()
    weights = load_file(saved / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    assert given.settings() != before


def test_a_loaded_model_is_known_by_what_it_holds(tiny_llava):
    model, processor = tiny_llava
    given = GivenModel(model, processor)
    before = given.settings()
    assert before["model"]["weights"] == model_fingerprint(model)
    assert before["dtype"] == "float32"
    assert given.load() == (model, processor)
    assert GivenModel(make_llava(seed=1), processor).settings() != before


def test_options_of_loading_beside_a_loaded_model_are_refused(tiny_llava):
    with pytest.raises(
        ValueError, match="model_init_kwargs: found some beside a loaded model, expected them with a path"
    ):
        GivenModel(*tiny_llava, init_kwargs={"dtype": "float32"})


def test_files_that_will_not_load_are_told_by_their_argument(saved, tmp_path):
    for given, sentence in [
        (GivenModel(str(tmp_path / "none")), "model: found no folder"),
        (GivenModel(saved, adapter=tmp_path / "none"), "adapter: found no folder"),
        (GivenModel(saved, adapter=saved), r"adapter: found no adapter_config\.json"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            given.check()
    (saved / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"model\.safetensors: found"):
        GivenModel(saved).check()
