"""A step without waste trains what PEFT, TRL and plain transformers train."""

import bitsandbytes
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tiny_models import make_llava, make_pairs, make_processor

from bpo_fast import BPOConfig, BPOTrainer
from bpo_fast.models.fused_linear import fused_linears
from bpo_fast.models.load import load_model
from bpo_fast.ops import nf4_lora_linear

TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
SETTINGS = {
    "per_device_train_batch_size": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "seed": 7,
}
METRICS = ("loss", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/margins")


def trainer_of(output_dir, model, trainer_class=BPOTrainer, config_class=BPOConfig, **options):
    return trainer_class(
        model=model,
        args=config_class(output_dir=str(output_dir), **SETTINGS | options),
        train_dataset=Dataset.from_list(make_pairs(24)),
        processing_class=make_processor(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS),
    )


def history(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.fixture
def nf4(tmp_path):
    """Loads the same model of 4 bits each time."""
    make_llava(hidden_size=64, intermediate_size=96).save_pretrained(tmp_path / "model")
    return lambda: load_model(tmp_path / "model", device="cpu", dtype=torch.float32, quantization="nf4")


def test_fifty_steps_on_a_base_of_4_bits_have_trls_losses(tmp_path, nf4):
    from trl import DPOConfig, DPOTrainer

    options = {"max_steps": 50, "learning_rate": 3e-3, "gradient_checkpointing": False}
    ours = trainer_of(tmp_path / "ours", nf4(), **options)
    theirs = trainer_of(tmp_path / "theirs", nf4(), DPOTrainer, DPOConfig, **options)
    assert set(fused_linears(ours.model).values()) == {"fused"}
    # TRL casts the adapter on such a base to bfloat16; both begin with, and keep, the same float32.
    initial = {name: weight.detach().clone() for name, weight in ours.model.named_parameters() if "lora_" in name}
    for name, weight in theirs.model.named_parameters():
        if "lora_" in name:
            weight.data = initial[name].clone()
    ours.train()
    theirs.train()
    for name in METRICS:
        tolerance = 1e-3 if name.startswith("logps") else 1e-4
        assert len(history(ours, name)) == 50
        assert history(ours, name) == pytest.approx(history(theirs, name), abs=tolerance, rel=2e-5), name
    assert min(history(ours, "loss")) < 0.5
    ours.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(nf4(), tmp_path / "adapter").train()
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    embeds = loaded.get_input_embeddings()(ids).detach().requires_grad_()
    expected = ours.model.train()(inputs_embeds=embeds).logits
    torch.testing.assert_close(loaded(inputs_embeds=embeds).logits, expected, rtol=1e-5, atol=1e-5)


def test_fused_linears_can_be_switched_off_and_give_the_same_training(tmp_path):
    options = {"max_steps": 4, "learning_rate": 1e-2}
    on = trainer_of(tmp_path / "on", make_llava(), **options)
    off = trainer_of(tmp_path / "off", make_llava(), fused_lora=False, **options)
    assert set(fused_linears(on.model).values()) == {"fused"}
    assert set(fused_linears(off.model).values()) == {"a Linear of another kind"}
    for trainer in (on, off):
        trainer.train()
    for name in METRICS:
        assert history(on, name) == pytest.approx(history(off, name), abs=2e-5), name
    assert history(on, "loss")[0] == pytest.approx(0.693147, abs=1e-6)
    assert history(on, "rewards/margins")[0] == 0


def test_no_way_of_checkpointing_changes_a_bit_and_weights_may_be_kept_for_one(tmp_path, nf4, monkeypatch):
    made = []
    own = nf4_lora_linear._dequantised
    monkeypatch.setattr(nf4_lora_linear, "_dequantised", lambda *args: made.append(1) or own(*args))
    losses, counts = {}, {}
    for mode, keep in [("none", 0), ("selective", 0), ("full", 0), ("full", 1), ("every_2", 1), ("offload", 1)]:
        options = {"max_steps": 2, "learning_rate": 1e-2, "checkpointing": mode, "keep_dequantized": bool(keep)}
        trainer = trainer_of(tmp_path / f"{mode}{keep}", nf4(), **options)
        made.clear()
        trainer.train()
        losses[mode, keep], counts[mode, keep] = history(trainer, "loss"), len(made)
    assert all(found == losses["none", 0] for found in losses.values())
    assert counts["selective", 0] == counts["none", 0]
    assert counts["full", 0] == counts["none", 0] + 2 * 14
    # One less in each of two steps for 14 linears, but for three of the first layer: no gradient goes below them.
    assert counts["full", 1] == counts["full", 0] - 2 * (14 - 3)


def test_ligers_kernels_go_on_the_decoder_alone_and_its_losses_nowhere(tmp_path, monkeypatch):
    fused = []
    monkeypatch.setattr(BPOConfig, "fuses_elementwise", True)
    monkeypatch.setattr("bpo_fast.train.trainer.fuse_elementwise", fused.append)
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", None)
    trainer = trainer_of(tmp_path, make_llava(), max_steps=1)
    trainer.args.use_liger_kernel = True
    trainer.train()
    assert fused == [trainer.model.get_base_model().get_decoder()]
    assert trainer.args.use_liger_kernel


@pytest.fixture
def on_avx512_bf16(monkeypatch):
    """A processor on which bitsandbytes packs linears for inference, whatever the real one is."""

    def pack(weight, state):
        state.packing_format_for_cpu = True
        return weight, state

    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(bitsandbytes.nn.modules, "_convert_weight_packed_for_cpu", pack)


def test_no_base_of_4_bits_is_packed_for_inference_while_it_trains(tmp_path, on_avx512_bf16, nf4):
    # The start check calls it without gradients, and what is packed has none at all.
    trainer = trainer_of(tmp_path / "run", nf4(), max_steps=2, fused_lora=False)
    trainer.train()
    linears = [module for module in trainer.model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert linears
    assert not any(getattr(x.weight.quant_state, "packing_format_for_cpu", False) for x in linears)
    fused = trainer_of(tmp_path / "fused", nf4(), max_steps=2)
    fused.train()
    assert history(trainer, "grad_norm") == pytest.approx(history(fused, "grad_norm"), rel=1e-4)


def test_a_base_of_4_bits_that_was_packed_is_refused(tmp_path, nf4):
    model = nf4().eval()
    first = next(module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit))
    first.weight.quant_state.packing_format_for_cpu = True  # as its first answer leaves it, on some processors
    with pytest.raises(ValueError, match=r"model: found .*q_proj.* packed by bitsandbytes for inference on this CPU"):
        trainer_of(tmp_path / "run", model)
