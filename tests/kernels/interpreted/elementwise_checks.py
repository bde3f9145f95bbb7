"""Fused norms, rotations and activations under Triton's interpreter: Liger's kernels in decoders of many families.

Run by test_interpreter.py in a process of its own. The interpreter takes no Python floats and no CUDA library, and
computes wrongly in bfloat16; the first two are made up for here.
"""

import copy

import liger_kernel.ops.geglu
import liger_kernel.ops.rms_norm
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from peft import LoraConfig, get_peft_model
from tiny_families import EXACT, REFUSED
from triton.runtime import interpreter

from bpo_fast.models.checkpointing import set_checkpointing
from bpo_fast.models.elementwise import fuse_elementwise
from bpo_fast.models.lora import adapter_disabled
from bpo_fast.ops import fused_elementwise


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    assert triton.knobs.runtime.interpret
    own = interpreter._implicit_cvt

    def convert(argument):
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return own(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert)
    monkeypatch.setattr(liger_kernel.ops.rms_norm, "rsqrt", lambda x: tl.math.rsqrt(x))
    monkeypatch.setattr(liger_kernel.ops.geglu, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)


def layers_step(decoder, dtype):
    """Output and gradients of the input and of all that is trained, of a decoder with and without checkpointing."""
    generator = torch.Generator().manual_seed(1)
    width = decoder.config.hidden_size
    x = torch.randn(2, 7, width, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(2, 7, width, generator=generator)
    trained = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    y = decoder(inputs_embeds=x).last_hidden_state
    return [y.detach(), *torch.autograd.grad((y.float() * upstream).sum(), [x, *trained])]


def adapted(family, dtype=torch.float32):
    model, _ = (EXACT | {name: entry[0] for name, entry in REFUSED.items()})[family]()
    decoder = model.to(dtype).get_decoder()
    names = ["q_proj", "v_proj", "gate_proj", "down_proj"]
    get_peft_model(decoder, LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    return decoder.train()


@pytest.mark.parametrize("family", ["LLaVA over Llama", "LLaVA over Qwen3", "LLaVA over Gemma", "InternVL", "SmolVLM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_fused_decoders_give_the_outputs_and_gradients_of_eager_ones(family, dtype):
    decoder = adapted(family, dtype)
    exact = layers_step(copy.deepcopy(decoder).double(), torch.float64)
    plain = layers_step(decoder, dtype)
    kinds = {type(module) for module in decoder.modules()}
    namespace = dict(vars(__import__(type(decoder).__module__, fromlist=["x"])))
    counts = fuse_elementwise(decoder)
    norms = 2 * 2 + 1 + (4 if "Qwen3" in family else 0)
    assert counts == {"norms": norms, "activations": 2, "rotations": 2}
    # Neither classes nor transformers' modules are changed, which other models share.
    assert kinds == {type(module) for module in decoder.modules()}
    assert namespace == vars(__import__(type(decoder).__module__, fromlist=["x"]))
    fused = layers_step(decoder, dtype)
    for ours, theirs, true in zip(fused, plain, exact, strict=True):
        size = true.abs().max()
        error, allowed = ((each.double() - true).abs().max() / size for each in (ours, theirs))
        assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("mode", ["selective", "full", "every_2"])
def test_what_checkpointing_keeps_is_not_written_into(mode):
    decoder = adapted("LLaVA over Llama")
    assert sum(fuse_elementwise(decoder).values()) == 9
    before = layers_step(decoder, torch.float32)
    set_checkpointing(decoder, mode)
    for found, expected in zip(layers_step(decoder, torch.float32), before, strict=True):
        assert torch.equal(found, expected)


def test_what_is_saved_whole_and_other_activations_stay_as_they_are():
    model, _ = EXACT["LLaVA over Llama"](hidden_act="relu")
    decoder = model.get_decoder()
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["input_layernorm"])
    peft_model = get_peft_model(decoder, config)
    counts = fuse_elementwise(peft_model)
    assert counts == {"norms": 2 + 1, "activations": 0, "rotations": 2}
    x = torch.randn(1, 5, 32)
    policy = decoder(inputs_embeds=x).last_hidden_state
    with adapter_disabled(peft_model):
        assert torch.equal(decoder(inputs_embeds=x).last_hidden_state, policy)


def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch):
    decoder = adapted("LLaVA over Llama")
    own = fused_elementwise._rms_norm
    monkeypatch.setattr(
        fused_elementwise, "_rms_norm", lambda x, *others: tuple(1.01 * result for result in own(x, *others))
    )
    assert fuse_elementwise(decoder) == {"norms": 0, "activations": 2, "rotations": 2}


def test_only_the_activations_inputs_are_overwritten():
    torch.manual_seed(0)
    x, gate, up = (torch.randn(3, 5, 16) for _ in range(3))
    q, k = torch.randn(1, 5, 4, 8).transpose(1, 2), torch.randn(1, 5, 2, 8).transpose(1, 2)
    angles = torch.rand(1, 5, 4).repeat(1, 1, 2)
    given = [x, gate, up, q, k]
    before = [tensor.clone() for tensor in given]
    for tensor in given:
        tensor.requires_grad_()
    results = [
        fused_elementwise.rms_norm(x, torch.ones(16), 1e-6),
        fused_elementwise.gated(gate.clone(), up.clone(), "silu"),
        *fused_elementwise.rotate(q, k, angles.cos(), angles.sin()),
    ]
    upstream = [torch.ones_like(result) for result in results]
    torch.autograd.backward(results, upstream)
    assert all(torch.equal(tensor, was) for tensor, was in zip(given, before, strict=True))
    assert all(bool((ones == 1).all()) for ones in upstream)
