"""What precision a training computes in, and whether it asks for gradients that are the same in every run."""

import math
import os

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_models import make_llava, make_pairs, make_processor

from bpo_fast import BPOConfig, BPOTrainer
from bpo_fast.models import attention, packed_forward
from bpo_fast.train import run

OPTIONS = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}


def trainer(output_dir, model, **options):
    return BPOTrainer(
        model=model,
        args=BPOConfig(str(output_dir), **OPTIONS | options),
        train_dataset=Dataset.from_list(make_pairs(6)),
        processing_class=make_processor(),
        peft_config=LoraConfig(r=4, lora_alpha=8),
    )


def history(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.fixture(scope="module")
def float16(tmp_path_factory):
    """A checkpoint as LLaVA-1.5's are: in float16."""
    folder = tmp_path_factory.mktemp("float16")
    make_llava().half().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def products(monkeypatch):
    """The dtypes that attention chose a back end for, and those of the head's rows and weight, in a training."""
    seen, head = set(), packed_forward.flat_linear_token_logps

    def chosen(device, dtype, *rest):
        seen.add(("attention", dtype))
        return "sdpa", "the test says so"

    def spied(rows, weight, *args, **options):
        seen.update({("rows", rows.dtype), ("weight", weight.dtype)})
        return head(rows, weight, *args, **options)

    monkeypatch.setattr(attention, "choose_backend", chosen)
    monkeypatch.setattr(packed_forward, "flat_linear_token_logps", spied)
    # The start check compares in float32, too.
    monkeypatch.setattr("bpo_fast.train.trainer.check_packed_forward", lambda *_: 0.0)
    return seen


@pytest.mark.parametrize("saved", ["float16", "float32"])
def test_training_under_autocast_computes_in_its_dtype_all_through(tmp_path, float16, products, saved):
    ours = trainer(tmp_path / "ours", float16 if saved == "float16" else make_llava(), bf16=True)
    base = [parameter for name, parameter in ours.model.named_parameters() if "lora_" not in name]
    assert {parameter.dtype for parameter in base} == {torch.bfloat16 if saved == "float16" else torch.float32}
    ours.train()
    assert products == {(what, torch.bfloat16) for what in ("attention", "rows", "weight")}
    assert history(ours, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert history(ours, "rewards/margins")[0] == 0

    exact = trainer(tmp_path / "exact", make_llava(), bf16=False)
    exact.train()
    for name in ("loss", "logps/chosen", "logps/rejected"):
        assert history(ours, name) == pytest.approx(history(exact, name), rel=3e-2)


def test_a_float16_checkpoint_stays_what_it_is_without_bfloat16(tmp_path, float16):
    assert trainer(tmp_path, float16, bf16=False).model.dtype == torch.float16


class Loaded(Exception):
    pass


@pytest.mark.parametrize(
    ("bf16", "dtype", "loaded"),
    [
        (True, "auto", torch.bfloat16),
        (False, "auto", torch.float16),
        (True, "float16", torch.float16),
        (True, "float32", torch.float32),
    ],
)
def test_the_train_command_loads_float16_as_bfloat16(tmp_path, float16, monkeypatch, bf16, dtype, loaded):
    def stopped(model, **_):
        raise Loaded(model.dtype)

    monkeypatch.setattr(run, "BPOTrainer", stopped)
    monkeypatch.setattr(run, "load_preference_dataset", lambda *_, **__: Dataset.from_list(make_pairs(2)))
    monkeypatch.setattr(run, "dataset_fingerprint", lambda _: "")
    config = BPOConfig(str(tmp_path), **OPTIONS, bf16=bf16)
    with pytest.raises(Loaded) as error:
        run.train(config, float16, "pairs", LoraConfig(r=2), model_init_kwargs={"dtype": dtype})
    assert error.value.args == (loaded,)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU, which computes in bfloat16 itself or only emulates it."""

    def pretend(native):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation
        )

    return pretend


def test_bfloat16_is_off_by_default_on_a_cpu_beside_a_gpu(tmp_path, gpu):
    gpu(native=True)
    assert BPOConfig(str(tmp_path), use_cpu=True).bf16 is False
    assert BPOConfig(str(tmp_path), use_cpu=True, bf16=True).bf16 is True


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_on_by_default_where_a_gpu_computes_in_it(tmp_path, gpu, monkeypatch, native):
    gpu(native)
    monkeypatch.setattr("transformers.TrainingArguments.__post_init__", lambda self: None)
    monkeypatch.setattr("transformers.TrainingArguments.device", torch.device("cuda"))
    monkeypatch.setattr(BPOConfig, "accelerator_config", None, raising=False)
    found = {}
    monkeypatch.setattr("bpo_fast.train.config.check_options", lambda config: found.update(bf16=config.bf16))
    with pytest.raises(AttributeError):  # what follows needs the GPU
        BPOConfig(str(tmp_path))
    assert found == {"bf16": native}


@pytest.mark.parametrize(
    ("options", "asked"), [({}, False), ({"deterministic_attention": True}, True), ({"full_determinism": True}, True)]
)
def test_a_deterministic_training_asks_attention_for_it(tmp_path, monkeypatch, options, asked):
    seen, packed = set(), attention.packed_attention

    def spied(*args, deterministic, **rest):
        if torch.is_grad_enabled():
            seen.add(deterministic)
        return packed(*args, deterministic=deterministic, **rest)

    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "0")
    monkeypatch.setattr(attention, "packed_attention", spied)
    deterministic, benchmark = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        ours = trainer(tmp_path, make_llava(), max_steps=1, **options)
        assert torch.are_deterministic_algorithms_enabled() == ("full_determinism" in options)
        ours.train()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, benchmark
    assert seen == {asked}
