"""Fingerprints tell weights apart by what they hold, quickly; files that are not whole are named."""

import json
import os
import shutil
import time

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import make_llava, make_processor

from bpo_fast.models.load import load_model
from bpo_fast.models.weights import (
    check_adapter_files,
    check_model_files,
    local_folder,
    model_fingerprint,
    weights_fingerprint,
)

LORA = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model and an adapter, not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    make_llava().save_pretrained(folder / "model")
    make_processor().save_pretrained(folder / "model")
    torch.manual_seed(0)
    get_peft_model(make_llava(), LoraConfig(**LORA)).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to change."""
    return shutil.copytree(saved, tmp_path, dirs_exist_ok=True)


def change(file, name, place):
    """Move one value of one tensor."""
    tensors = load_file(file)
    tensors[name].view(-1)[place] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def test_times_and_places_of_files_do_not_count_and_fingerprints_are_repeatable(folder, tmp_path):
    for name in ("model", "adapter"):
        before = weights_fingerprint(folder / name)
        assert before == weights_fingerprint(str(folder / name))
        for file in (folder / name).iterdir():
            os.utime(file, (1, 1))
        moved = shutil.copytree(folder / name, tmp_path / "elsewhere" / name)
        assert weights_fingerprint(moved) == before


def test_an_adapter_trained_anew_into_its_folder_has_another_fingerprint(folder):
    before = weights_fingerprint(folder / "adapter")
    # The same names, shapes and size; one number of the last tensor differs.
    file = folder / "adapter/adapter_model.safetensors"
    change(file, sorted(load_file(file))[-1], -1)
    assert weights_fingerprint(folder / "adapter") != before


def test_an_adapter_of_other_settings_has_another_fingerprint(folder):
    before = weights_fingerprint(folder / "adapter")
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    (folder / "adapter/adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    assert weights_fingerprint(folder / "adapter") != before


def test_a_change_of_any_one_tensor_of_a_model_shows(folder):
    file = folder / "model/model.safetensors"
    found = [weights_fingerprint(folder / "model")]
    for name in load_file(file):
        change(file, name, len(found) % 2 - 1)
        found.append(weights_fingerprint(folder / "model"))
    assert len(set(found)) == len(found) > 50


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "chat_template.jinja", "processor_config.json"])
def test_a_change_of_a_models_small_files_shows(folder, name):
    before = weights_fingerprint(folder / "model")
    with (folder / "model" / name).open("a") as file:
        file.write("\n")
    assert weights_fingerprint(folder / "model") != before


def test_a_large_tensor_is_sampled_in_its_middle_and_at_its_end_alone(tmp_path):
    """The documented limit, and that every tensor of a large file is looked at."""
    file = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text("{}")
    save_file({name: torch.zeros(100_000) for name in "abc"}, file)
    before = weights_fingerprint(tmp_path)
    for name in "abc":
        for place, shows in [(50_100, True), (-1, True), (0, False)]:
            save_file({each: torch.zeros(100_000) for each in "abc"}, file)
            change(file, name, place)
            save_file(load_file(file), file)
            assert (weights_fingerprint(tmp_path) != before) is shows, (name, place)


def test_a_model_of_26_gb_takes_well_under_two_seconds(tmp_path):
    """A sparse file of the shape of a 13B checkpoint: six shards of 70 tensors."""
    shape, count = (5120, 6144), 70
    for shard in range(6):
        size = 2 * shape[0] * shape[1]
        places = {f"t{n}": [n * size, (n + 1) * size] for n in range(count)}
        header = {name: {"dtype": "BF16", "shape": shape, "data_offsets": place} for name, place in places.items()}
        header = json.dumps(header).encode()
        with (tmp_path / f"model-{shard}.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + count * size)
    index = {"weight_map": {f"{shard}.{n}": f"model-{shard}.safetensors" for shard in range(6) for n in range(count)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) > 26e9
    start = time.perf_counter()
    assert weights_fingerprint(tmp_path).startswith("sha256:")
    assert time.perf_counter() - start < 1


def test_a_model_id_stands_for_its_snapshot(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert weights_fingerprint("owner/model") == "hub:owner/model"
    repository = tmp_path / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    for commit in ("a1", "b2"):
        (repository / "refs/main").write_text(commit)
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
        assert weights_fingerprint("owner/model") == f"hub:owner/model@{commit}"


def test_a_model_id_stands_for_the_same_before_and_after_it_is_loaded(tmp_path, monkeypatch):
    """Or a run that downloaded its model could not go on."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    fetched = []

    def fetch(name, file):
        fetched.append((name, file))
        folder = tmp_path / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text("c3")
        (folder / "snapshots/c3").mkdir(parents=True)
        (folder / "snapshots/c3" / file).write_text("{}")
        return str(folder / "snapshots/c3" / file)

    monkeypatch.setattr("bpo_fast.models.weights.hf_hub_download", fetch)
    assert [weights_fingerprint("owner/model") for _ in range(2)] == ["hub:owner/model@c3"] * 2
    assert weights_fingerprint("owner/adapter", what="adapter") == "hub:owner/adapter@c3"
    assert fetched == [("owner/model", "config.json"), ("owner/adapter", "adapter_config.json")]


def test_a_loaded_model_is_known_by_its_values(saved):
    plain = [load_model(saved / "model", device="cpu") for _ in range(2)]
    first = model_fingerprint(plain[0])
    assert first == model_fingerprint(plain[1])
    assert first != model_fingerprint(plain[0].to(torch.bfloat16))
    plain[1].lm_head.weight.data.add_(1e-3)
    assert first != model_fingerprint(plain[1])


def test_of_a_loaded_adapter_every_value_counts_but_only_while_it_is_active(saved):
    model = load_model(saved / "model", adapter=saved / "adapter", device="cpu")
    before = model_fingerprint(model)
    assert before == model_fingerprint(load_model(saved / "model", adapter=saved / "adapter", device="cpu"))
    with model.disable_adapter():
        disabled = model_fingerprint(model)
    assert disabled != before
    weight = model.get_parameter(next(name for name, _ in model.named_parameters() if "lora_A" in name))
    for place in range(0, weight.numel(), 7):
        weight.data.view(-1)[place] += 1
        after = model_fingerprint(model)
        assert after != before
        before = after
    with model.disable_adapter():
        assert model_fingerprint(model) == disabled
    model.peft_config["default"].lora_alpha += 1
    assert model_fingerprint(model) != before


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda data: b"", "an empty file"),
        (lambda data: b"garbage" * 100, "700 bytes that are no safetensors file"),
        (lambda data: data[:100], "100 bytes that are no safetensors file"),
        (lambda data: data[:-1], r"[\d,]+ bytes of [\d,]+"),
        (lambda data: data + b"0", r"[\d,]+ bytes of [\d,]+"),
        (lambda data: (5).to_bytes(8, "little") + b"[1,2]", "13 bytes that are no safetensors file"),
        (lambda data: (2**63).to_bytes(8, "little") + b"{}", "10 bytes that are no safetensors file"),
    ],
)
def test_a_weight_file_that_is_not_whole_is_named(folder, damage, found):
    for check, file in [
        (check_model_files, folder / "model/model.safetensors"),
        (check_adapter_files, folder / "adapter/adapter_model.safetensors"),
    ]:
        file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(ValueError, match=rf"{file.name}: found {found}, expected a whole safetensors file; copy"):
            check(file.parent)


def test_a_header_that_contradicts_itself_is_named(folder):
    file = folder / "adapter/adapter_model.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(
        ValueError, match=r"adapter_model.safetensors: found damage \(.*\), expected a whole safetensors"
    ):
        check_adapter_files(folder / "adapter")


def test_a_shard_that_is_missing_is_named(folder):
    (folder / "model/model.safetensors").rename(folder / "model/model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors: found no such file, expected one that"):
        check_model_files(folder / "model")


def test_an_adapter_that_went_to_nan_is_refused(folder):
    file = folder / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: found NaN or infinity in 'base_model"):
        check_adapter_files(folder / "adapter")


@pytest.mark.parametrize(
    "name", ["nothing", "./nothing", "~/nothing", "../no/thing", "a/b/c", "/nowhere", "", "models/x", "n" * 300, "a/?"]
)
def test_what_looks_like_a_path_is_not_asked_of_the_network(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(ValueError, match=r"model: found no folder '.*', expected one, or a model id"):
        local_folder("model", name)


def test_a_model_id_and_a_folder_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_folder("model", "llava-hf/llava-1.5-7b-hf") is None
    (tmp_path / "llava-hf/llava-1.5-7b-hf").mkdir(parents=True)
    assert str(local_folder("model", "llava-hf/llava-1.5-7b-hf")) == "llava-hf/llava-1.5-7b-hf"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="model: found the file 'file', expected the folder that it lies in"):
        local_folder("model", "file")
