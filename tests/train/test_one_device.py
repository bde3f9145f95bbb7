"""A step away from the CPU mixes no devices and reads nothing back, looked at on the meta device.

Meta tensors have no values, so what looks at one (`.item()`, `.nonzero()`, a mask as an index) fails there, where on a
GPU it would wait. Beside that no operation may take tensors of two devices: as indices CUDA takes them, and copies.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import make_llava
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bpo_fast import BPOTrainer
from bpo_fast.losses.config import LossConfig
from bpo_fast.losses.preference import Batch
from bpo_fast.losses.table import LOSSES
from bpo_fast.models import attention
from bpo_fast.models.lora import restrict_to_decoder
from bpo_fast.models.packed_forward import enable_packed_forward
from bpo_fast.models.packing import Group, pack
from bpo_fast.models.weakened_roots import Weakening, second_root
from bpo_fast.train.collator import PackedSequence
from bpo_fast.train.metrics import MetricSums

IMAGE = 4
PREFIX = [1, IMAGE, IMAGE, IMAGE, IMAGE]


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of more than one device; a number in a tensor of its own may lie anywhere."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.ndim]
        if len({x.device for x in tensors}) > 1:
            raise RuntimeError(f"{function} of tensors on {[x.device.type for x in tensors]}")
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def model():
    model = make_llava().to("meta")
    model = get_peft_model(model, restrict_to_decoder(LoraConfig(r=4), model)).train()
    enable_packed_forward(model.get_base_model())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@pytest.fixture
def varlen(monkeypatch):
    """Attention by one variable-length call, as on a GPU."""
    monkeypatch.setattr(attention, "choose_backend", lambda *_: ("torch_varlen", "the test says so"))


def sequence(loss="sigmoid"):
    groups = [Group([*PREFIX, 7, 30], [[9, 10, 40, 11], [12, 5]]), Group([*PREFIX, 8], [[9], [11, 12, 5]])]
    groups = [Group(group.prefix, group.branches[: 1 if loss == "sft" else 2]) for group in groups]
    noise = {"noise_ids": torch.arange(2), "num_image_rows": (4, 4)} if loss == "mdpo" else {}
    packing = pack([*groups, *map(second_root, groups)] if noise else groups)
    rows = torch.nonzero(packing.input_ids == IMAGE).flatten()
    weights = torch.ones(len(packing.targets))
    return PackedSequence(
        packing, {"pixel_values": torch.zeros(2, 3, 16, 16)}, rows, Batch(2, 5), token_weights=weights, **noise
    )


def step(model, sequence, options=None, deterministic=False):
    """BPOTrainer's own step, without what goes around it."""
    trainer = BPOTrainer.__new__(BPOTrainer)
    trainer.loss_config = LossConfig(**options or {})
    trainer.weakening = Weakening(500, "features", "sigmoid", 0)
    trainer.responses = ("chosen",) if trainer.loss_config.loss_types == ("sft",) else ("chosen", "rejected")
    trainer.args = SimpleNamespace(deterministic_attention=deterministic, full_determinism=False)
    trainer.accelerator = SimpleNamespace(unwrap_model=lambda model: model)
    trainer._guard = SimpleNamespace(add_loss=lambda *_: None)
    trainer._metrics, trainer._num_train_tokens = {"train": MetricSums()}, 0
    with OneDevice():
        loss = trainer.compute_loss(model, {"sequence": sequence})
        loss.backward()
    assert loss.is_meta
    assert all(parameter.grad.is_meta for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(model, varlen, monkeypatch, loss):
    # The op itself goes to the CPU's or a GPU's extension.
    monkeypatch.setattr("bpo_fast.models.weakened_roots.add_noise", lambda x, **_: x.clone())
    options = {"loss_type": [loss], "label_smoothing": 1e-3 if loss in ("exo_pair", "robust") else 0.0}
    step(model, sequence(loss).to("meta"), options)


def test_attention_segment_by_segment_and_with_a_fixed_order(model, varlen, monkeypatch):
    step(model, sequence().to("meta"), deterministic=True)
    monkeypatch.undo()
    step(model, sequence().to("meta"))


# The rest of a packing are lengths for FlashAttention's own kernel, or numbers of the host.
PARTS = (
    "input_ids position_ids kv_index kv_rounds logit_rows logit_rounds targets branch_index branch_offset num_tokens"
)


@pytest.mark.parametrize("name", PARTS.split())
def test_a_tensor_left_on_the_cpu_is_noticed(model, varlen, name):
    here = sequence()
    there = here.to("meta")
    left = replace(there.packing, **{name: getattr(here.packing, name)})
    with pytest.raises((RuntimeError, ValueError)):
        step(model, replace(there, packing=left), {"loss_type": ["sigmoid_norm"]})


def test_reading_a_number_back_is_noticed(model, varlen, monkeypatch):
    def reads_back(values):
        return values * bool(values.isfinite().all())

    monkeypatch.setattr("bpo_fast.train.responses.sum_branches", lambda values, _: reads_back(values))
    with pytest.raises((RuntimeError, NotImplementedError)):
        step(model, sequence().to("meta"))
