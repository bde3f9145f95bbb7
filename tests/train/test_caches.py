"""Caches of image features and reference log-probs: the same training, and no image or reference in a step."""

import os
import shutil
from collections import namedtuple

import pytest
import torch
from datasets import Dataset, Image, List
from peft import LoraConfig
from PIL import Image as PillowImage
from safetensors import safe_open
from tiny_families import EXACT, make_examples
from tiny_models import make_llava, make_pairs, make_processor
from transformers import TrainerCallback

from bpo_fast import BPOConfig, BPOTrainer
from bpo_fast.models.packed_forward import enable_packed_forward, image_features
from bpo_fast.runs.tensor_cache import TensorCache
from bpo_fast.train.cache_keys import example_keys
from bpo_fast.train.collator import PreferenceCollator
from bpo_fast.train.examples import Examples
from bpo_fast.train.feature_cache import VisionOffDevice, feature_items, fill_features
from bpo_fast.train.kept import FeatureCache, ReferenceCache
from bpo_fast.train.reference_cache import fill_reference, reference_items

TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
BOTH = {"cache_image_features": True, "precompute_ref_log_probs": True}
LOGGED = ("loss", "rewards/margins", "logps/chosen", "logps/rejected", "entropy", "grad_norm")


def make_trainer(folder, pairs=None, model=None, processor=None, eval_pairs=None, **options):
    settings = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 7,
    } | options
    return BPOTrainer(
        model=model or make_llava(),
        args=BPOConfig(**settings),
        train_dataset=pairs or Dataset.from_list(make_pairs(24)),
        eval_dataset=eval_pairs,
        processing_class=processor or make_processor(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS),
    )


def train(folder, **options):
    trainer = make_trainer(folder, **options)
    trainer.train()
    return trainer


def history(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(
    "options",
    [
        BOTH,
        {"cache_image_features": True, "token_budget": 40},
        {"precompute_ref_log_probs": True, "max_length": 12},
        BOTH | {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.3, "dataloader_num_workers": 2},
        {"cache_image_features": True, "loss_type": "sft"},
    ],
    ids=["both", "features", "reference", "workers", "sft"],
)
def test_the_same_training_as_without(tmp_path, options):
    """50 steps with each cache, in fp32: losses and all else that is logged within 1e-5 of a sum of log-probs."""
    steps = 50 if options == BOTH else 3
    live = {name: value for name, value in options.items() if name not in (*BOTH, "dataloader_num_workers")}
    expected = train(tmp_path, max_steps=steps, **live)
    kept = train(tmp_path, max_steps=steps, cache_dir=str(tmp_path / "cache"), **options)
    assert len(history(kept, "loss")) == steps
    assert history(kept, "loss") == pytest.approx(history(expected, "loss"), abs=1e-5)
    for name in LOGGED:
        assert history(kept, name) == pytest.approx(history(expected, name), abs=1e-4, rel=1e-5), name


class Forbid(TrainerCallback):
    """From the first step on, whatever is kept may not be computed."""

    def __init__(self, trainer, monkeypatch):
        self.trainer, self.monkeypatch = trainer, monkeypatch

    def on_train_begin(self, *args, **kwargs):
        def never(*args, **kwargs):
            raise AssertionError("it was kept")

        trainer = self.trainer
        self.monkeypatch.setattr(trainer.model.get_base_model(), "get_image_features", never)
        self.monkeypatch.setattr(trainer, "_reference", never)
        self.monkeypatch.setattr(trainer.processing_class.image_processor, "preprocess", never)
        self.monkeypatch.setattr(Image, "decode_example", never)  # of datasets


def test_a_step_runs_neither_the_vision_part_nor_the_reference_and_decodes_no_image(tmp_path, monkeypatch):
    for pairs in (Dataset.from_list(make_pairs(10)), make_pairs(10)):
        more = {"first": make_pairs(3, seed=1), "second": Dataset.from_list(make_pairs(3, seed=2))}
        evaluating = {"eval_strategy": "steps", "eval_steps": 2, "cache_dir": str(tmp_path / "cache")}
        trainer = make_trainer(tmp_path, pairs=pairs, eval_pairs=more, **evaluating, **BOTH)
        with monkeypatch.context() as patches:
            trainer.add_callback(Forbid(trainer, patches))
            trainer.train()
        assert len(history(trainer, "eval_first_loss")) == len(history(trainer, "eval_second_loss")) == 2
        # Examples of which nothing is kept are computed as ever.
        assert trainer.evaluate(make_pairs(3, seed=1))["eval_loss"] == pytest.approx(
            history(trainer, "eval_first_loss")[-1], abs=1e-5
        )


def test_losses_that_read_no_reference_refuse_to_keep_it(tmp_path):
    with pytest.raises(ValueError, match="precompute_ref_log_probs: found True with loss_type"):
        BPOConfig(output_dir=str(tmp_path), use_cpu=True, loss_type="simpo", precompute_ref_log_probs=True)


def kept_keys(root, name):
    """The keys of each cache of that name."""
    found = []
    for folder in sorted(root.glob(f"{name}/*")):
        keys = []
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                keys += file.keys()
        found.append(sorted(keys))
    return found


def in_files(folder, pairs):
    """The pairs as a data set whose images are files."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number, pair in enumerate(pairs):
        path = folder / f"{number}.png"
        pair["images"][0].save(path)
        rows.append(pair | {"images": [str(path)]})
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def with_one_weight_changed(model, name):
    parameter = model.get_parameter(name)
    parameter.data.view(-1)[parameter.numel() // 3] += 3.0
    return model


def templated(processor):
    processor.chat_template = processor.chat_template.replace("ASSISTANT: ", "ASSISTANT: w7 ")
    return processor


def brighter(processor):
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    return processor


CHANGES = {
    "weight of a decoder layer": {
        "model": lambda: with_one_weight_changed(make_llava(), "model.language_model.layers.1.mlp.up_proj.weight")
    },
    "weight of the projector": {
        "model": lambda: with_one_weight_changed(make_llava(), "model.multi_modal_projector.linear_2.weight")
    },
    "configuration": {"model": lambda: make_llava(rms_norm_eps=1.0)},
    "type of the weights": {"model": lambda: make_llava().bfloat16()},
    "autocast": {"bf16": lambda: True},
    "chat template": {"processor": lambda: templated(make_processor())},
    "image processor": {"processor": lambda: brighter(make_processor())},
    "most tokens": {"max_length": lambda: 13},
}


OF_FEATURES = ("weight of the projector", "type of the weights", "autocast", "image processor")


@pytest.fixture(scope="module")
def kept_before(tmp_path_factory):
    """A cache of three pairs, and what was logged."""
    folder = tmp_path_factory.mktemp("before")
    trainer = train(
        folder, pairs=Dataset.from_list(make_pairs(3)), max_steps=1, cache_dir=str(folder / "cache"), **BOTH
    )
    return folder / "cache", history(trainer, "logps/chosen")


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_kept_for_another_setting_is_never_used(tmp_path, kept_before, change):
    pairs = Dataset.from_list(make_pairs(3))
    cache, before = kept_before
    shutil.copytree(cache, tmp_path / "cache")
    cached = BOTH | {"max_steps": 1, "cache_dir": str(tmp_path / "cache")}
    kept = train(tmp_path, pairs=pairs, **cached, **{name: make() for name, make in CHANGES[change].items()})
    assert history(kept, "logps/chosen") != before
    assert history(kept, "rewards/margins") == pytest.approx([0.0], abs=1e-6)  # of this reference
    if change in OF_FEATURES:
        live = train(tmp_path, pairs=pairs, max_steps=1, **{name: make() for name, make in CHANGES[change].items()})
        assert history(kept, "logps/chosen") == pytest.approx(history(live, "logps/chosen"), abs=1e-4)
    places = [len(list((tmp_path / "cache").glob(f"{name}/*"))) for name in ("image_features", "reference_log_probs")]
    assert places == ([1, 1] if change == "most tokens" else [2, 2])


def test_other_data_are_never_taken_for_those_that_were_kept(tmp_path):
    """An image of other content in the same file, with its size and its times; another prompt; another answer."""
    pairs, others = make_pairs(4), make_pairs(4, seed=5)
    cached = BOTH | {"max_steps": 1, "per_device_train_batch_size": 4, "cache_dir": str(tmp_path / "cache")}
    train(tmp_path, pairs=in_files(tmp_path / "images", pairs), **cached)
    path = tmp_path / "images/0.png"
    before = path.stat()
    pairs[0]["images"] = [PillowImage.new("RGB", (16, 16), (9, 200, 90))]
    pairs[1]["prompt"], pairs[2]["rejected"] = others[1]["prompt"], others[2]["rejected"]
    dataset = in_files(tmp_path / "images", pairs)
    with path.open("ab") as file:  # what lies behind a PNG's end is not read
        file.write(bytes(before.st_size - path.stat().st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    kept = train(tmp_path, pairs=dataset, **cached)
    live = train(tmp_path, pairs=dataset, max_steps=1, per_device_train_batch_size=4)
    for name in ("logps/chosen", "logps/rejected", "rewards/margins"):
        assert history(kept, name) == pytest.approx(history(live, name), abs=1e-4), name
    (features,), (logps,) = (kept_keys(tmp_path / "cache", name) for name in ("image_features", "reference_log_probs"))
    assert sum(key.startswith("images-") for key in features) == 5
    assert sum(key.startswith("prompt-") for key in features) == 6
    assert len(logps) == 7


def test_an_image_of_several_pairs_is_kept_once_and_so_is_a_pair_that_comes_twice(tmp_path):
    pairs = make_pairs(5)
    for pair in pairs[1:4]:
        pair["images"] = pairs[0]["images"]
    pairs[2]["prompt"] = pairs[1]["prompt"]
    train(tmp_path, pairs=in_files(tmp_path / "images", [*pairs, pairs[0]]), cache_dir=str(tmp_path / "cache"), **BOTH)
    (features,), (logps,) = (kept_keys(tmp_path / "cache", name) for name in ("image_features", "reference_log_probs"))
    assert sum(key.startswith("images-") for key in features) == 2
    assert sum(key.startswith("prompt-") for key in features) == 4
    assert len(logps) == 5


@pytest.mark.parametrize("family", EXACT)
@torch.no_grad()
def test_every_family_packs_what_is_kept_as_what_it_computes(tmp_path, family):
    """Ids, features and the reference, with examples of one image, of two, of the same in other pairs, and of none."""
    model, processor = EXACT[family]()
    enable_packed_forward(model)
    examples = make_examples(4)
    examples[1]["images"] = examples[0]["images"]
    examples[2]["images"] = examples[2]["images"] + examples[0]["images"]
    examples[2]["prompt"][0]["content"].insert(0, {"type": "image"})
    examples[3]["images"] = []
    examples[3]["prompt"][0]["content"].pop(0)
    collator = PreferenceCollator(processor, image_token_id=model.config.image_token_id, max_length=400)
    dataset = Examples(examples, [3, 2, 0, 1])
    (live,) = collator([dataset[place] for place in range(4)])["sequences"]

    def features(inputs):
        return image_features(model, inputs)

    def logps(sequence):
        rows = sequence.image_features
        return model(packing=sequence.packing, image_features=rows, image_rows=sequence.image_rows).token_logps

    keys = [example_keys(dataset, collator, desc="", progress=False)]
    dataset.keep([each.shown for each in keys[0]], without_images=True)
    for name, items, fill, kind, compute in (
        ("features", feature_items(keys), fill_features, FeatureCache, features),
        ("references", reference_items(keys), fill_reference, ReferenceCache, logps),
    ):
        tensors = TensorCache(tmp_path, name, {"family": family})
        tensors.load([key for each in items for key in each], progress=False)
        fill(tensors, items, [dataset], collator, compute, report=lambda _: None, progress=False)
        setattr(collator, name, kind(tensors))
    (kept,) = collator([dataset[place] for place in range(4)])["sequences"]
    assert torch.equal(kept.packing.input_ids, live.packing.input_ids)
    assert torch.equal(kept.packing.targets, live.packing.targets)
    assert not kept.image_inputs
    live.image_features = features(live.image_inputs)
    torch.testing.assert_close(kept.image_features, live.image_features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(kept.ref_token_logps, logps(live), atol=1e-5, rtol=1e-5)
    assert collator([dataset[0]])["sequences"][0].image_features is None  # it shows none


def test_the_forecast_is_what_is_written(tmp_path, capsys):
    pairs = in_files(tmp_path / "images", make_examples(40))
    train(tmp_path, pairs=pairs, cache_dir=str(tmp_path / "cache"), max_steps=1, **BOTH)
    said = capsys.readouterr().out.splitlines()
    for name, unit in (("image_features", "images"), ("reference_log_probs", "pairs")):
        written = sum(path.stat().st_size for path in (tmp_path / "cache").glob(f"{name}/*/*.safetensors"))
        (sentence,) = [line for line in said if name in line]
        assert f"caching the {name} of 40 of 40 {unit}: about " in sentence
        forecast = float(sentence.partition("about ")[2].split()[0])
        assert forecast == pytest.approx(written / 1024, rel=0.15, abs=1)


def test_without_room_nothing_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1024))
    with pytest.raises(
        ValueError, match=r"^cache_dir: found 1 KiB free at .*, expected \d+ KiB for the image_features"
    ):
        train(tmp_path, cache_dir=str(tmp_path / "cache"), **BOTH)
    assert not (tmp_path / "cache").exists()


def test_a_damaged_cache_is_made_again_to_the_same_training(tmp_path, capsys):
    cached = BOTH | {"cache_dir": str(tmp_path / "cache")}
    expected = train(tmp_path, **cached)
    for path in (tmp_path / "cache").glob("*/*/*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-5] ^= 64
        path.write_bytes(data)
    capsys.readouterr()
    found = train(tmp_path, **cached)
    assert capsys.readouterr().out.count("found a damaged shard (its bytes have changed)") == 2
    assert all(history(found, name) == history(expected, name) for name in LOGGED)


@pytest.mark.parametrize("family", EXACT)
def test_the_vision_part_leaves_the_device_and_comes_back_when_it_is_called(family):
    model, processor = EXACT[family]()
    enable_packed_forward(model)
    callback = VisionOffDevice(model)
    moved = {name for name, x in model.named_parameters() if any(x is each for each in callback._parameters)}
    collator = PreferenceCollator(processor, image_token_id=model.config.image_token_id)
    (sequence,) = collator(make_examples(2))["sequences"]
    features = image_features(model, sequence.image_inputs)
    model(
        packing=sequence.packing, image_features=features, image_rows=sequence.image_rows
    ).token_logps.sum().backward()
    # What the packed forward reads stays.
    stays = {name for name, x in model.named_parameters() if x.grad is not None}
    assert moved
    assert not moved & stays
    assert len(moved | stays) == len(dict(model.named_parameters()))
    callback.on_train_begin(None, None, None)
    assert torch.equal(image_features(model, sequence.image_inputs), features)
    assert not callback._hooks
