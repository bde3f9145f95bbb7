"""A merged model is its base with the adapter, on its own."""

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from tiny_models import make_llava, make_processor

from bpo_fast.models.load import load_model, load_processor
from bpo_fast.models.merge import merge_adapter

IDS = torch.tensor([[7, 8, 9, 20, 30, 40]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model and adapters of it; not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    make_llava().save_pretrained(folder / "model")
    make_processor().save_pretrained(folder / "model")
    torch.manual_seed(0)
    targets = r".*language_model.*_proj"
    options = {"r": 3, "lora_alpha": 7, "init_lora_weights": False, "use_rslora": True}
    whole = LoraConfig(target_modules=targets, modules_to_save=["language_model.norm"], **options)
    model = get_peft_model(make_llava(), whole)
    model.base_model.model.model.language_model.norm.modules_to_save["default"].weight.data.normal_()
    model.save_pretrained(folder / "adapter")
    embeddings = LoraConfig(target_modules=["embed_tokens"], **options)
    get_peft_model(make_llava(), embeddings).save_pretrained(folder / "embeddings")
    prefix = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, num_layers=2, token_dim=16, num_attention_heads=2
    )
    get_peft_model(make_llava(), prefix).save_pretrained(folder / "prefix")
    activated = LoraConfig(task_type="CAUSAL_LM", target_modules=targets, alora_invocation_tokens=[9])
    get_peft_model(make_llava(), activated).save_pretrained(folder / "activated")
    get_peft_model(make_llava(num_hidden_layers=1), whole).save_pretrained(folder / "shallow")
    ia3 = IA3Config(target_modules=targets, feedforward_modules=[], init_ia3_weights=False)
    get_peft_model(make_llava(), ia3).save_pretrained(folder / "ia3")
    return folder


@torch.no_grad()
def logits(*model, **options):
    return load_model(*model, device="cpu", **options)(input_ids=IDS).logits


@pytest.mark.parametrize("adapter", ["adapter", "embeddings", "ia3"])
def test_the_merged_model_answers_as_base_and_adapter(saved, tmp_path, adapter):
    expected = logits(saved / "model", adapter=saved / adapter)
    assert (expected - logits(saved / "model")).abs().max() > 0.05
    assert merge_adapter(saved / "model", saved / adapter, tmp_path / "merged") == tmp_path / "merged"
    torch.testing.assert_close(logits(tmp_path / "merged"), expected, rtol=1e-5, atol=1e-5)
    assert load_processor(tmp_path / "merged").chat_template == load_processor(saved / "model").chat_template
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert not list((tmp_path / "merged").glob("adapter*"))
    assert not any(str(saved) in file.read_text() for file in (tmp_path / "merged").glob("*.json"))


def test_the_merged_weights_are_rounded_once_to_the_dtype_asked_for(saved, tmp_path):
    merge_adapter(saved / "model", saved / "adapter", tmp_path / "exact")
    (tmp_path / "rounded").mkdir()  # an empty folder may be there
    merge_adapter(saved / "model", saved / "adapter", tmp_path / "rounded", dtype="bfloat16")
    exact = load_model(tmp_path / "exact", device="cpu").state_dict()
    rounded = load_model(tmp_path / "rounded", device="cpu").state_dict()
    for name, weight in exact.items():
        assert rounded[name].dtype == torch.bfloat16
        # Base and sum are rounded, each by at most half of the last place of 8 bits.
        assert (rounded[name].float() - weight).abs().max() <= 2**-8 * 2 * weight.abs().max()


@pytest.mark.parametrize(
    ("model", "adapter", "sentence"),
    [
        ("model", "nothing", "adapter: found no folder"),
        ("nothing", "adapter", "processor: found no folder"),
        ("model", "shallow", r"adapter: found \d+ tensors missing in"),
        ("model", "prefix", r"adapter: found PREFIX_TUNING in '.*', expected an adapter of weights, e.g. LoRA"),
        ("model", "activated", r"adapter: found one in '.*' that cannot be merged \(.*\), expected e.g. LoRA; use it"),
    ],
)
def test_what_cannot_be_merged_is_told_and_leaves_nothing(saved, tmp_path, model, adapter, sentence):
    with pytest.raises(ValueError, match=sentence):
        merge_adapter(saved / model, saved / adapter, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_files_is_left_alone(saved, tmp_path):
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(ValueError, match=r"output_dir: found files in '.*', expected an empty or a new folder"):
        merge_adapter(saved / "model", saved / "adapter", tmp_path)
    with pytest.raises(ValueError, match=r"output_dir: found the file '.*', expected a folder; name another"):
        merge_adapter(saved / "model", saved / "adapter", tmp_path / "precious")
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_disk_that_is_full_leaves_nothing(saved, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.ProcessorMixin.save_pretrained", full)
    with pytest.raises(OSError, match="No space left on device"):
        merge_adapter(saved / "model", saved / "adapter", tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_an_adapter_on_tied_embeddings_is_not_merged(tmp_path):
    model = make_llava()
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    make_processor().save_pretrained(tmp_path / "tied")
    get_peft_model(model, LoraConfig(target_modules=["embed_tokens"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter: found one on the embeddings .*, since the model ties"):
        merge_adapter(tmp_path / "tied", tmp_path / "adapter", tmp_path / "merged")
