"""Which FlashAttention is chosen, what is said of those passed over, and that a deterministic one is asked for."""

import importlib
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from bpo_fast.models import flash
from bpo_fast.models.flash import choose_backend, flash_attention, flash_function, torch_varlen


def varlen(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=None, causal=False, deterministic=False):
    pass


def varlen_of_2_3(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=None, causal=False):
    pass


@pytest.fixture
def packages(monkeypatch):
    """Module -> what importing it gives, or the error it ends with; every other one is not installed."""
    there, real = {}, importlib.import_module

    def import_module(name):
        if name not in ("flash_attn", "flash_attn_interface"):
            return real(name)
        found = there.get(name, ModuleNotFoundError(f"No module named '{name}'", name=name))
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(flash.importlib, "import_module", import_module)
    for function in (flash_function, choose_backend):
        function.cache_clear()
    yield there
    for function in (flash_function, choose_backend):
        function.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A function that pretends a GPU of a compute capability."""

    def pretend(capability, flash_built=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: flash_built)

    return pretend


GOOD = SimpleNamespace(flash_attn_varlen_func=varlen)
SYMBOL = "flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEab"
PASSED_OVER = [
    (SimpleNamespace(), "has no flash_attn_varlen_func, as FlashAttention 4's package has none"),
    (ImportError(SYMBOL), f"does not import (ImportError: {SYMBOL})"),
    (OSError("libcudart.so.12: cannot open\nmore"), "does not import (OSError: libcudart.so.12: cannot open)"),
    (
        ModuleNotFoundError("No module named 'einops'", name="einops"),
        "does not import (ModuleNotFoundError: No module",
    ),
    (RuntimeError(""), "does not import (RuntimeError: no message)"),
    (SimpleNamespace(flash_attn_varlen_func=varlen_of_2_3), "is older than 2.4.1"),
    (None, "is not installed"),
]


@pytest.mark.parametrize(("found", "said"), PASSED_OVER, ids=[said[:30] for _, said in PASSED_OVER])
def test_a_package_that_cannot_be_called_is_passed_over_with_its_reason(packages, gpu, found, said):
    gpu((8, 6))
    if found is not None:
        packages["flash_attn"] = found
    name, reason = choose_backend("cuda")
    assert name == "torch_varlen"
    assert reason.startswith(f"flash-attn {said}")
    assert reason.endswith("torch's own variable-length FlashAttention is there")


def test_a_package_that_imports_is_taken(packages, gpu):
    gpu((8, 6))
    packages["flash_attn"] = GOOD
    assert choose_backend("cuda") == ("flash_attn", "flash-attn is installed")


def test_flash_attention_3_on_hopper_alone(packages, gpu):
    packages["flash_attn_interface"] = packages["flash_attn"] = GOOD
    gpu((9, 0))
    assert choose_backend("cuda") == ("flash_attn_3", "FlashAttention 3 is installed")
    # It has no deterministic backward pass for heads that it pads to 256.
    assert choose_backend("cuda", head_dim=192, deterministic=True)[0] == "flash_attn_3"
    name, reason = choose_backend("cuda", head_dim=200, deterministic=True)
    assert (name, reason) == (
        "flash_attn",
        "FlashAttention 3 is not deterministic with heads of 200; flash-attn is installed",
    )
    choose_backend.cache_clear()
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        gpu(capability)
        assert choose_backend("cuda")[0] == "flash_attn"
        choose_backend.cache_clear()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "cpu"}, "needs a CUDA device, and this one is 'cpu'"),
        ({"dtype": torch.float32}, "takes float16 and bfloat16 only, and the tensors are torch.float32"),
        ({"head_dim": 264}, r"takes heads of 8, 16, ... 256 numbers, and these are of 264"),
        ({"head_dim": 36}, r"takes heads of 8, 16, ... 256 numbers, and these are of 36"),
    ],
)
def test_what_flash_attention_does_not_take_goes_to_sdpa(packages, gpu, options, said):
    gpu((8, 6))
    packages["flash_attn"] = GOOD
    name, reason = choose_backend(**{"device": "cuda"} | options)
    assert name == "sdpa"
    assert said in reason


def test_machines_without_a_flash_attention(packages, gpu, monkeypatch):
    gpu((7, 5))
    assert choose_backend("cuda") == ("sdpa", "FlashAttention needs compute capability 8.0, and this GPU has 7.5")
    choose_backend.cache_clear()
    gpu((8, 6), flash_built=False)
    found = choose_backend("cuda")
    assert found == ("sdpa", "flash-attn is not installed; this torch was built without FlashAttention")
    choose_backend.cache_clear()
    monkeypatch.setattr(flash, "find_spec", lambda name: None)
    assert "install torch>=2.11" in choose_backend("cuda")[1]


def test_this_torchs_function_is_called_by_its_own_names():
    function, takes_groups = torch_varlen()
    assert function.keywords in ({"is_causal": True}, {"window_size": (-1, 0)})
    shape = {"device": "meta", "dtype": torch.bfloat16}
    q, k, v = torch.empty(6, 4, 16, **shape), torch.empty(9, 2, 16, **shape), torch.empty(9, 2, 16, **shape)
    cu = torch.zeros(3, dtype=torch.int32, device="meta")
    out = flash_attention("torch_varlen", q, k, v, (cu, cu, 4, 5), scaling=None, deterministic=False)
    assert out.shape == (6, 4, 16)
    assert takes_groups in (True, False)


def test_packages_are_asked_for_a_deterministic_backward_pass(monkeypatch):
    asked = []

    def function(query, *rest, deterministic, **options):
        asked.append(deterministic)
        return query

    monkeypatch.setattr(flash, "flash_function", lambda backend: (function, ""))
    q = torch.zeros(2, 1, 8)
    for backend in ("flash_attn", "flash_attn_3"):
        for deterministic in (False, True):
            flash_attention(backend, q, q, q, (q, q, 1, 1), scaling=None, deterministic=deterministic)
    assert asked == [False, True, False, True]


class Seen(torch.autograd.Function):
    """q * k * v, whose backward pass tells whether torch's deterministic algorithms are on."""

    modes: ClassVar[list[bool]] = []
    fails = False

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return q * k * v

    @staticmethod
    def backward(ctx, grad):
        Seen.modes.append(torch.are_deterministic_algorithms_enabled())
        if Seen.fails:
            raise RuntimeError("out of memory")
        q, k, v = ctx.saved_tensors
        return grad * k * v, grad * q * v, grad * q * k


@pytest.fixture
def seen(monkeypatch):
    monkeypatch.setattr(Seen, "modes", [])
    monkeypatch.setattr(Seen, "fails", False)
    monkeypatch.setattr(flash, "torch_varlen", lambda: (lambda q, k, v, *rest, **options: Seen.apply(q, k, v), True))

    def call(deterministic):
        q, k, v = (torch.full((1, 1, 1), float(n), requires_grad=True) for n in (2, 3, 5))
        out = flash_attention("torch_varlen", q, k, v, (q, q, 1, 1), scaling=None, deterministic=deterministic)
        return [grad.item() for grad in torch.autograd.grad(out, (q, k, v))]

    return call


def test_torchs_own_is_deterministic_for_its_backward_pass_alone(seen):
    assert seen(deterministic=False) == [15, 10, 6]
    assert seen(deterministic=True) == [15, 10, 6]
    assert Seen.modes == [False, True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_mode_is_given_back_when_the_backward_pass_fails(seen):
    Seen.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        seen(deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_mode_that_only_warns_does_not_make_it_deterministic(seen):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        seen(deterministic=True)
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert Seen.modes == [True]
