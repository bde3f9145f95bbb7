"""What layers keep for the backward pass: equal gradients in every mode, bytes by hand."""

import sys
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_families import EXACT
from tiny_models import make_llava
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaModel
from transformers.modeling_layers import GradientCheckpointingLayer

from bpo_fast.models.checkpointing import draws_random_numbers, set_checkpointing
from bpo_fast.models.packed_forward import enable_packed_forward
from bpo_fast.models.packing import Group, pack
from bpo_fast.models.selective import rotates_in_place

MODES = ["selective", "every_2", "full", "offload"]
GROUPS = [Group([1, 9, 8, 7], [[10, 11, 13], [12]]), Group([1, 9], [[13, 14], [15, 16, 17]])]
LINEARS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"


def with_adapter(model, dropout=0.0):
    torch.manual_seed(1)
    targets = rf".*(language_model|text_model).*\.({LINEARS})"
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    enable_packed_forward(model.get_base_model())
    return model.train()


def gradients(model, mode, groups=GROUPS, autocast=False):
    """Of each parameter, summed over two packed sequences, with a pass of the reference before each."""
    set_checkpointing(model.get_base_model().get_decoder(), mode)
    model.zero_grad()
    torch.manual_seed(3)
    for part in (groups[:1], groups[1:]):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with torch.no_grad(), model.disable_adapter():
                model(packing=pack(part))
            logps = model(packing=pack(part)).token_logps
        (logps * torch.arange(1.0, 1 + len(logps))).sum().backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def assert_same(found, expected):
    assert expected
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("family", sorted(EXACT))
def test_every_mode_has_the_gradients_of_none(family):
    model = with_adapter(EXACT[family]()[0])
    expected = gradients(model, "none")
    assert all(gradient.any() for name, gradient in expected.items() if "lora_A" in name)
    for mode in MODES:
        assert_same(gradients(model, mode), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{"autocast": True}, {"dropout": 0.3}, {"autocast": True, "dropout": 0.3}])
def test_so_it_is_with_dropout_and_autocast(mode, options):
    model = with_adapter(make_llava(num_hidden_layers=3), options.pop("dropout", 0.0))
    expected = gradients(model, "none", **options)
    assert_same(gradients(model, mode, **options), expected)


@pytest.mark.parametrize("mode", MODES)
def test_so_it_is_with_every_weight_trained(mode):
    model = with_adapter(make_llava(num_hidden_layers=3)).requires_grad_(True)
    assert_same(gradients(model, mode), gradients(model, "none"))


class Storages(TorchDispatchMode):
    """Bytes of the storages that were made while it was on and are still held."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **kwargs or {})
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (weakref.ref(storage), storage.nbytes())
        return output

    def held(self):
        return sum(size for storage, size in self.made.values() if storage() is not None)


TOKENS, HIDDEN, KV, INNER, RANK = 48, 32, 16, 80, 4


def decoder(num_layers, mode, adapter=True):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    model = LlamaModel(config)
    set_checkpointing(model, mode)
    if adapter:
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=8, target_modules=LINEARS.split("|")))
    return model.train()


def forward(model):
    torch.manual_seed(1)
    return model(inputs_embeds=torch.randn(1, TOKENS, HIDDEN)).last_hidden_state


def bytes_a_layer(mode, adapter=True):
    """What a layer more holds between the passes; of two layers for every_2, by half."""
    held = []
    for num_layers in (3, 5):
        model = decoder(num_layers, mode, adapter)
        with Storages() as storages:
            output = forward(model)
        held.append(storages.held())
        output.sum().backward()
    return (held[1] - held[0]) / 2


def test_bytes_by_hand():
    layer_input = 4 * TOKENS * HIDDEN
    # Outputs of q, k, v, o, gate and up, that of down being needed by none; and seven thin products with LoRA's A.
    linears = 4 * TOKENS * (2 * HIDDEN + 2 * KV + 2 * INNER)
    thin = 4 * TOKENS * 7 * RANK
    everything = bytes_a_layer("none")
    assert bytes_a_layer("full") == bytes_a_layer("offload") == layer_input
    assert bytes_a_layer("selective") == layer_input + linears + thin
    assert bytes_a_layer("every_2") == (everything + layer_input) / 2
    # Beside those: both norms with their product, q, k and half-turns, repeated heads, attention, and the activation.
    assert everything > 1.5 * bytes_a_layer("selective")


def test_inputs_leave_the_device_that_a_fake_run_stands_for():
    with FakeTensorMode():
        assert bytes_a_layer("full", adapter=False) == 4 * TOKENS * HIDDEN
        assert bytes_a_layer("offload", adapter=False) == 0


@pytest.mark.parametrize(("mode", "again"), [("selective", 0), ("every_2", 0.5), ("full", 1), ("offload", 1)])
def test_products_that_run_again(mode, again):
    def products(mode):
        with FlopCounterMode(display=False) as counter:
            forward(model := decoder(4, mode)).sum().backward()
        linears = sum(x.numel() for name, x in model.named_parameters() if "layers" in name and x.ndim == 2)
        counts = counter.get_flop_counts()["Global"]
        return sum(n for op, n in counts.items() if "mm" in str(op)), 2 * TOKENS * linears

    without, one_forward = products("none")
    # The last product of a layer, down's LoRA, is not needed again.
    last = 2 * TOKENS * RANK * HIDDEN
    assert (products(mode)[0] - without) == pytest.approx(again * (one_forward - 4 * last), abs=8 * last)


def test_a_decoder_without_such_layers_is_told():
    with pytest.raises(
        ValueError, match="checkpointing: found 'full' for Linear, whose layers transformers cannot run again"
    ):
        set_checkpointing(nn.Linear(2, 2), "full")
    set_checkpointing(nn.Linear(2, 2), "none")


def test_random_numbers_are_kept_where_a_layer_draws_any():
    def layers(dropout):
        model = with_adapter(make_llava(), dropout)
        return model.get_base_model().get_decoder().layers

    assert not any(map(draws_random_numbers, layers(0.0)))
    assert all(map(draws_random_numbers, layers(0.1)))
    (layer, _) = layers(0.0)
    layer.mlp.router_jitter_noise = 0.01
    assert draws_random_numbers(layer)


class Noisy(nn.Linear):
    """A linear with dropout of its own, as LoRA has it."""

    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


class Layer(GradientCheckpointingLayer):
    """Two linears with dropout before, in and after them, and what else a layer does with the first one's output."""

    def __init__(self, write=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.dropout, self.second, self.write = Noisy(8, 8), nn.Dropout(0.3), Noisy(8, 8), write

    def forward(self, x):
        hidden = self.first(self.dropout(x).sin())
        if self.write is not None:
            hidden = self.write(hidden)
        return self.second(self.dropout(hidden.cos())).exp()


def layer_gradients(mode, write=None):
    model = nn.ModuleList([Layer(write)]).train()
    set_checkpointing(model, mode)
    torch.manual_seed(5)
    x = torch.randn(4, 8).requires_grad_()
    model[0](x).sum().backward()
    return {"x": x.grad} | {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("mode", ["selective", "full", "offload"])
def test_dropout_beside_the_linears_is_the_same_in_both_runs(mode):
    assert_same(layer_gradients(mode), layer_gradients("none"))


def test_a_layer_that_writes_into_a_linears_output_is_told():
    with pytest.raises(RuntimeError, match="checkpointing: found a layer that writes into the output of Noisy 0, exp"):
        layer_gradients("selective", lambda hidden: hidden.mul_(2))


def test_a_kernel_that_writes_there_unseen_is_seen_to(monkeypatch):
    def rotate(hidden):
        hidden.detach().numpy()[:] *= 2  # as a kernel does, without a word to autograd
        return hidden * 1

    rotate.__module__ = "liger_kernel.ops"
    expected = layer_gradients("full", rotate)
    assert not rotates_in_place(Layer())
    monkeypatch.setattr(sys.modules[Layer.__module__], "apply_rotary_pos_emb", rotate, raising=False)
    assert rotates_in_place(Layer())
    assert_same(layer_gradients("selective", rotate), expected)


@pytest.mark.gpu("page-locked memory")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and its page-locked memory")
def test_offloaded_inputs_leave_a_gpu_and_come_back():
    model = decoder(4, "none").cuda()

    def run(mode):
        set_checkpointing(model.get_base_model(), mode)
        model.zero_grad()
        torch.manual_seed(1)
        x = torch.randn(1, 4096, HIDDEN).cuda()
        before = torch.cuda.memory_allocated()
        output = model(inputs_embeds=x).last_hidden_state
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - before
        output.sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, held

    expected, full = run("full")
    found, offloaded = run("offload")
    assert_same(found, expected)
    # All inputs but the last layer's, which is needed first.
    assert full - offloaded == 3 * 4096 * HIDDEN * 4
