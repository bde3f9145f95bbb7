"""The packed forward under autocast: every product in its dtype, and a frozen head that is cast once."""

import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import make_llava
from torch import nn

from bpo_fast.models import attention, packed_forward
from bpo_fast.models.lora import restrict_to_decoder
from bpo_fast.models.packed_forward import enable_packed_forward, image_features
from bpo_fast.models.packing import Group, pack

IMAGE = 4  # id of the image token of the tiny models
LAYERS = 2


def adapted():
    model = make_llava()
    model = get_peft_model(model, restrict_to_decoder(LoraConfig(r=4), model))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    enable_packed_forward(model.get_base_model())
    return model


def packed():
    prefix = [1, IMAGE, IMAGE, IMAGE, IMAGE]
    return pack([Group([*prefix, 7 + n, 30], [[9, 10, 40 + n, 11], [12 + n, 5]]) for n in range(3)])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def scored(model, packing, pixels, enabled=False):
    rows = torch.nonzero(packing.input_ids == IMAGE).flatten()
    features = image_features(model, {"pixel_values": pixels})
    # As a trainer's wrapper does, around the model's forward alone.
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        return model(packing=packing, image_features=features, image_rows=rows).token_logps


@pytest.fixture
def dtypes(monkeypatch):
    """The dtypes that attention chose a back end for, and those of the head's rows and weight."""
    seen = {"attention": [], "rows": [], "weight": []}
    choose, head = attention.choose_backend, packed_forward.flat_linear_token_logps

    def choose_spied(device, dtype, *rest):
        seen["attention"].append(dtype)
        return choose(device, dtype, *rest)

    def head_spied(rows, weight, *args, **options):
        seen["rows"].append(rows.dtype)
        seen["weight"].append(weight.dtype)
        return head(rows, weight, *args, **options)

    monkeypatch.setattr(attention, "choose_backend", choose_spied)
    monkeypatch.setattr(packed_forward, "flat_linear_token_logps", head_spied)
    return seen


@pytest.mark.gpu("FlashAttention")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU for variable-length FlashAttention")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_autocast_reaches_flash_attention(monkeypatch, dtype):
    chosen, choose = [], attention.choose_backend

    def spied(*args):
        chosen.append(choose(*args)[0])
        return choose(*args)

    monkeypatch.setattr(attention, "choose_backend", spied)
    model, packing, pixels = adapted().to("cuda", dtype), packed().to("cuda"), torch.randn(3, 3, 16, 16, device="cuda")
    rows = torch.nonzero(packing.input_ids == IMAGE).flatten()
    features = image_features(model, {"pixel_values": pixels})
    with torch.autocast("cuda", torch.bfloat16):
        ours = model(packing=packing, image_features=features, image_rows=rows).token_logps
    ours.sum().backward()
    assert len(chosen) == LAYERS
    assert "sdpa" not in chosen
    expected = scored(model.double(), packing, pixels.double())
    assert relative(ours.double(), expected) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_and_head_compute_in_autocasts_dtype(dtypes, dtype):
    model, packing, pixels = adapted().to(dtype), packed(), torch.randn(3, 3, 16, 16)
    ours = scored(model, packing, pixels, enabled=True)
    ours.sum().backward()
    assert dtypes == {"attention": [torch.bfloat16] * LAYERS, "rows": [torch.bfloat16], "weight": [torch.bfloat16]}
    assert ours.dtype == torch.float32
    # A GPU of the usual kind would take these to FlashAttention, whose heads are of 8 numbers here.
    assert attention.choose_backend("cuda", torch.bfloat16, 8)[0] != "sdpa"
    ours_grad = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.requires_grad])

    # bfloat16 has 8 bits; float64 on the same weights is the reference.
    exact = model.double()
    exact.zero_grad()
    expected = scored(exact, packing, pixels.double())
    expected.sum().backward()
    expected_grad = torch.cat([p.grad.flatten() for p in exact.parameters() if p.requires_grad])
    assert relative(ours.double(), expected) < 2e-2
    assert relative(ours_grad, expected_grad) < 6e-2


def test_without_autocast_nothing_is_cast(dtypes):
    scored(adapted(), packed(), torch.randn(3, 3, 16, 16))
    assert {dtype for seen in dtypes.values() for dtype in seen} == {torch.float32}
    assert not packed_forward._CASTS


def test_a_kept_head_follows_its_weight():
    head = nn.Linear(4, 6, bias=False).requires_grad_(False)

    def cast(head=head):
        found = packed_forward._weight_in(head, torch.bfloat16)
        assert torch.equal(found, head.weight.to(torch.bfloat16))
        return found

    first = cast()
    assert cast() is first
    with torch.no_grad():
        head.weight.add_(1)
    second = cast()
    assert second is not first
    head.weight.data = head.weight.data + 1  # as the start check swaps dtypes
    third = cast()
    assert third is not second
    head.weight = nn.Parameter(torch.randn(6, 4), requires_grad=False)
    assert cast() is not third
    assert packed_forward._weight_in(head, torch.float16).dtype == torch.float16
    head.weight.requires_grad_(True)
    assert cast() is not cast()
    assert cast().requires_grad
    # With the head goes its cast, without the garbage collector.
    head.weight.requires_grad_(False)
    last = weakref.ref(cast())
    gc.disable()
    try:
        del head, first, second, third, cast
        assert last() is None
    finally:
        gc.enable()


def test_a_head_changed_behind_autograds_back_is_cast_again_for_the_next_trainer():
    model = make_llava()
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    packed_forward._weight_in(head, torch.bfloat16)
    head.weight.data.add_(1)  # as PEFT merges
    enable_packed_forward(model)
    assert torch.equal(packed_forward._weight_in(head, torch.bfloat16), head.weight.to(torch.bfloat16))


def test_inference_mode_leaves_no_cast_behind():
    head = nn.Linear(4, 6, bias=False).requires_grad_(False)
    with torch.inference_mode():
        packed_forward._weight_in(head, torch.bfloat16)
    assert not packed_forward._weight_in(head, torch.bfloat16).is_inference()


def test_deterministic_attention_reaches_every_layer_and_what_is_recomputed(monkeypatch):
    asked = []
    sdpa = attention.packed_attention

    def spied(*args, deterministic, **options):
        asked.append(deterministic)
        return sdpa(*args, deterministic=deterministic, **options)

    monkeypatch.setattr(attention, "packed_attention", spied)
    model, packing = adapted().train(), packed()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs = {
        "packing": packing,
        "image_features": image_features(model, {"pixel_values": torch.randn(3, 3, 16, 16)}),
        "image_rows": torch.nonzero(packing.input_ids == IMAGE).flatten(),
    }
    model(**inputs).token_logps.sum().backward()
    model(**inputs, deterministic_attention=True).token_logps.sum().backward()
    assert asked == [False] * 2 * LAYERS + [True] * 2 * LAYERS
