"""LoRA linears as one operation: PEFT's numbers, less kept, PEFT's own forward for all that is not plain LoRA."""

import copy
import threading

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from bpo_fast.models.fused_linear import fuse_linears, fused_linears
from bpo_fast.models.lora import adapter_disabled
from bpo_fast.ops import nf4_lora_linear
from bpo_fast.ops.nf4_lora_linear import Frozen, LowRank, lora_linears

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class Attention(nn.Module):
    """Three linears of one input and sizes of their own, and one of another."""

    config = {"model_type": "tiny"}  # noqa: RUF012

    def __init__(self, nf4=False, dtype=F32, bias=True):
        super().__init__()
        torch.manual_seed(0)
        options = {"compute_dtype": dtype, "quant_type": "nf4"} if nf4 else {}
        for name, (columns, rows) in zip(NAMES, [(64, 64), (64, 32), (64, 32), (128, 64)], strict=True):
            setattr(self, name, (Linear4bit if nf4 else nn.Linear)(columns, rows, bias=bias, **options))
        self.is_loaded_in_4bit = nf4  # by which PEFT chooses its class
        self.requires_grad_(False)
        self.to(dtype).to("cpu")  # which quantises

    def forward(self, x):
        return self.o_proj(torch.cat([self.q_proj(x), self.k_proj(x) * 1.5, self.v_proj(x)], -1))


def adapted(nf4=False, dtype=F32, bias=True, **options):
    config = {"r": 4, "target_modules": list(NAMES), "init_lora_weights": False, "rank_pattern": {"k_proj": 7}}
    torch.manual_seed(1)
    return get_peft_model(Attention(nf4, dtype, bias), LoraConfig(**config | options))


def fused(model, **options):
    model = copy.deepcopy(model)
    fuse_linears(model, **options)
    return model


def inputs(dtype=F32, seed=2):
    return torch.randn(3, 7, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step(model, x, autocast=None, run=None):
    """Output, gradient of the input, gradients of the adapter by name."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", dtype=autocast or BF16, enabled=autocast is not None):
        y = (run or model)(x)
    (y.double() * inputs(torch.float64, seed=3)).sum().backward()
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    return {"y": y.detach(), "x": x.grad} | grads


def in_float64(model, x):
    """The same from float64 copies of everything, the weights as bitsandbytes dequantises them."""
    exact = Attention().double()
    torch.manual_seed(1)
    plain = {name: getattr(model.base_model.model, name) for name in NAMES}
    for name, layer in plain.items():
        frozen, base = getattr(exact, name), layer.base_layer
        frozen.weight.data = nf4_lora_linear.dense(Frozen(base.weight), base_dtype(base)).double().clone()
        frozen.bias.data = base.bias.double()
    config = LoraConfig(r=4, target_modules=list(NAMES), rank_pattern={"k_proj": 7})
    exact = get_peft_model(exact, config, autocast_adapter_dtype=False).double()
    exact.load_state_dict(
        {name: value.double() for name, value in model.state_dict().items() if "lora_" in name}, strict=False
    )
    return step(exact, x.double())


def base_dtype(base):
    return (
        base.weight.dtype
        if isinstance(base, nn.Linear) and base.weight.is_floating_point()
        else (base.weight.quant_state.dtype)
    )


CASES = {
    "float32": (F32, None),
    "bfloat16": (BF16, None),
    "float16": (F16, None),
    "float32 under autocast": (F32, BF16),
    "bfloat16 under autocast": (BF16, BF16),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("nf4", [False, True], ids=["plain", "nf4"])
def test_outputs_and_gradients_are_as_near_to_float64_as_pefts(nf4, case):
    dtype, autocast = CASES[case]
    model = adapted(nf4, dtype)
    ours_model = fused(model)
    assert set(fused_linears(ours_model).values()) == {"fused"}
    ours, theirs = step(ours_model, inputs(dtype), autocast), step(model, inputs(dtype), autocast)
    exact = in_float64(model, inputs(dtype))
    assert ours.keys() == theirs.keys() == exact.keys()
    for name in exact:
        assert ours[name].dtype == theirs[name].dtype, name
        size = exact[name].abs().max()
        error, allowed = ((each[name].double() - exact[name]).abs().max() / size for each in (ours, theirs))
        assert error <= 2 * allowed + 1e-6, f"{name}: {error:.2e} of the largest, PEFT's {allowed:.2e}"
    again = step(ours_model, inputs(dtype), autocast)
    assert all(torch.equal(again[name], ours[name]) for name in ours)


@pytest.mark.parametrize("nf4", [False, True], ids=["plain", "nf4"])
def test_kept_for_the_backward_pass_are_the_inputs_once_and_the_low_rank_activations(nf4):
    kept = []

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    model = fused(adapted(nf4, BF16))
    linears = model.base_model.model
    x = inputs(BF16).requires_grad_()
    with torch.autocast("cpu", dtype=BF16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        q, k, v = linears.q_proj(x), linears.k_proj(x), linears.v_proj(x)
        linears.o_proj(torch.cat([q, k, v], -1))
    assert kept == [(21, 64), (21, 4 + 7 + 4), (21, 128), (21, 4)]


@pytest.mark.parametrize("nf4", [False, True], ids=["plain", "nf4"])
def test_its_adapter_is_pefts_own(nf4, tmp_path):
    model = fused(adapted(nf4))
    before = step(model, inputs())["y"]
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=1e-3)
    optimizer.step()
    trained = step(model, inputs())["y"]
    assert not torch.equal(trained, before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Attention(nf4), tmp_path)
    torch.testing.assert_close(step(loaded, inputs())["y"], trained, rtol=1e-5, atol=1e-5)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    base = loaded.unload().train()  # on some CPUs bitsandbytes rounds to bfloat16 otherwise
    with torch.no_grad():
        expected = base(inputs())
        with adapter_disabled(model):
            torch.testing.assert_close(model(inputs()), expected, rtol=1e-6, atol=1e-6)


def test_a_fresh_adapter_adds_exactly_zero():
    for nf4, dtype, autocast in [(False, F32, False), (False, F32, True), (True, BF16, True), (True, BF16, False)]:
        model = fused(adapted(nf4, dtype, init_lora_weights=True))
        with torch.autocast("cpu", dtype=BF16, enabled=autocast):
            policy = model(inputs(dtype))
            with torch.no_grad(), adapter_disabled(model):
                assert torch.equal(model(inputs(dtype)), policy)


def two_adapters(model):
    torch.manual_seed(4)
    model.add_adapter("other", LoraConfig(r=2, target_modules=list(NAMES), init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])


OUTSIDE = {
    "the adapter is a DoraLinearVariant": ({"use_dora": True}, lambda model: None),
    "lora_dropout is 0.5": ({"lora_dropout": 0.5}, lambda model: None),
    "the adapter has a bias": ({"lora_bias": True}, lambda model: None),
    "several adapters are on": ({}, two_adapters),
    "the adapter is merged": ({}, lambda model: model.merge_adapter()),
    "the base layer is trained": (
        {},
        lambda model: [getattr(model.base_model.model, name).base_layer.requires_grad_() for name in NAMES],
    ),
    "the base layer has hooks": (
        {},
        lambda model: [
            getattr(model.base_model.model, name).base_layer.register_forward_hook(lambda module, args, out: 2 * out)
            for name in NAMES
        ],
    ),
    "lora_A is no plain linear": (
        {},
        lambda model: [
            getattr(model.base_model.model, name).lora_A.default.register_forward_hook(lambda module, args, out: -out)
            for name in NAMES
        ],
    ),
}


@pytest.mark.parametrize("why", OUTSIDE)
def test_what_is_not_plain_lora_runs_as_in_peft_and_says_so(why):
    options, change = OUTSIDE[why]
    model = adapted(**options)
    ours_model = fused(model)
    change(model)
    change(ours_model)
    assert set(fused_linears(ours_model).values()) == {why}
    for each in (model, ours_model):
        torch.manual_seed(3)  # for dropout
        each.result = step(each, inputs())
    for name, expected in model.result.items():
        found = ours_model.result[name]
        assert found is expected is None or torch.equal(found, expected), name


def test_dropout_that_is_switched_off_is_no_hindrance():
    model = fused(adapted(lora_dropout=0.5)).eval()
    assert set(fused_linears(model).values()) == {"fused"}


def test_linears_without_plain_weights_stay_pefts():
    class Odd(nn.Linear):
        pass

    model = Attention()
    model.q_proj = Odd(64, 64)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    fuse_linears(model)
    assert fused_linears(model)["base_model.model.q_proj"] == "the base layer is a Odd"
    assert fused_linears(model)["base_model.model.k_proj"] == "fused"


def test_fusing_twice_changes_nothing():
    model = fused(adapted())
    kinds = [type(module) for module in model.modules()]
    fuse_linears(model)
    assert kinds == [type(module) for module in model.modules()]


def test_siblings_with_inputs_of_their_own_and_passes_that_break_off():
    model = adapted()
    ours = fused(model).base_model.model
    theirs = model.base_model.model
    x, other = inputs().requires_grad_(), inputs(seed=5)
    for _ in range(2):
        for name, given in [("q_proj", x), ("k_proj", other), ("v_proj", x), ("q_proj", other), ("v_proj", other)]:
            torch.testing.assert_close(getattr(ours, name)(given), getattr(theirs, name)(given))
    # Broken off after the first; the same tensor with other values in it.
    broken = fused(model).base_model.model
    broken.q_proj(x)
    values = inputs(seed=6)
    broken.q_proj(values)
    values.mul_(2.0)
    torch.testing.assert_close(broken.k_proj(values), theirs.k_proj(values))
    with torch.no_grad():
        torch.testing.assert_close(broken.v_proj(values), theirs.v_proj(values))


@pytest.mark.parametrize(("nf4", "dtype", "autocast"), [(False, F32, BF16), (True, F32, None), (True, BF16, BF16)])
@pytest.mark.parametrize("keep", [False, True])
def test_checkpointing_changes_no_bit_and_may_keep_weights(nf4, dtype, autocast, keep, monkeypatch):
    made = []
    for name in ("_dequantised", "_buffer"):
        own = getattr(nf4_lora_linear, name)
        monkeypatch.setattr(nf4_lora_linear, name, lambda *args, own=own, name=name: made.append(name) or own(*args))
    model = fused(adapted(nf4, dtype), keep_dequantized=keep)
    plain = step(model, inputs(dtype), autocast)
    assert len([name for name in made if nf4 == (name == "_dequantised")]) == 2 * len(NAMES)
    made.clear()
    again = step(model, inputs(dtype), autocast, lambda x: checkpoint(model, x, use_reentrant=False))
    assert all(torch.equal(again[name], plain[name]) for name in plain)
    if nf4:  # in the forward pass, again, and in the backward pass unless it is kept
        assert made.count("_dequantised") == (2 if keep else 3) * len(NAMES)
    assert all(module._frozen.kept is None for module in model.modules() if hasattr(module, "_frozen"))


def test_one_buffer_serves_weights_of_all_sizes_and_each_thread_has_its_own(monkeypatch):
    monkeypatch.setattr(nf4_lora_linear, "_BUFFERS", buffers := {})
    small, large = (torch.randn(rows, 64) for rows in (32, 96))
    for weight in (small, large, small):
        assert torch.equal(nf4_lora_linear.dense(Frozen(weight), BF16), weight.bfloat16())
    assert [buffer.numel() for buffer in buffers.values()] == [96 * 64]
    first = nf4_lora_linear.dense(Frozen(large), BF16)
    assert nf4_lora_linear.dense(Frozen(small), BF16).data_ptr() == first.data_ptr()
    first = nf4_lora_linear.dense(Frozen(large), BF16)
    other = threading.Thread(target=lambda: nf4_lora_linear.dense(Frozen(small), BF16))
    other.start()
    other.join()
    assert torch.equal(first, large.bfloat16())
    assert len(buffers) == 2


@pytest.mark.parametrize("nf4", [False, True], ids=["plain", "nf4"])
def test_fake_tensors_run_through_it_and_leave_no_buffer(nf4, monkeypatch):
    monkeypatch.setattr(nf4_lora_linear, "_BUFFERS", buffers := {})
    model = adapted(nf4, BF16)
    fuse_linears(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.autocast("cpu", dtype=BF16):

        def fake(tensor):
            return mode.from_tensor(tensor)

        frozen = []
        for name in ("q_proj", "k_proj"):
            base = getattr(model.base_model.model, name).base_layer
            weight = fake(base.weight.data)
            if nf4:
                weight.quant_state = state = copy.copy(base.weight.quant_state)
                state.absmax, state.offset, state.state2 = (
                    fake(state.absmax),
                    fake(state.offset),
                    copy.copy(state.state2),
                )
                state.state2.absmax, state.state2.code = fake(state.state2.absmax), fake(state.state2.code)
            frozen.append(Frozen(weight, compute_dtype=BF16))
        ranks = [
            LowRank(torch.empty(4, 64).requires_grad_(), torch.empty(n, 4).requires_grad_(), 2.0) for n in (64, 32)
        ]
        x = torch.empty(2, 5, 64, dtype=BF16).requires_grad_()
        q, k = lora_linears(x, frozen, ranks)
        assert (q.shape, k.shape, q.dtype) == ((2, 5, 64), (2, 5, 32), BF16)
        (q.sum() + k.sum()).backward()
        assert x.grad.shape == x.shape
        assert [tuple(rank.b.grad.shape) for rank in ranks] == [(64, 4), (32, 4)]
    assert not buffers


def test_what_does_not_fit_is_named():
    weight, a, b = torch.ones(3, 2), torch.ones(1, 2), torch.ones(3, 1)
    with pytest.raises(ValueError, match=r"hidden: found \(4, 3\), expected \[\.\.\., 2\]"):
        lora_linears(torch.ones(4, 3), [Frozen(weight)], [None])
    with pytest.raises(ValueError, match=r"adapters: found \(1, 2\) and \(2, 1\), expected \[r, 2\] and \[3, r\]"):
        lora_linears(torch.ones(4, 2), [Frozen(weight)], [LowRank(a, b[:2], 1.0)])


def test_an_output_that_nothing_uses_gets_no_gradient():
    model = adapted()
    ours, theirs = fused(model).base_model.model, model.base_model.model
    for each in (ours, theirs):
        x = inputs().requires_grad_()
        each.k_proj(x).sum().backward()
        each.grads = x.grad, each.k_proj.lora_A.default.weight.grad
        assert each.q_proj.lora_B.default.weight.grad is None
    for found, expected in zip(ours.grads, theirs.grads, strict=True):
        torch.testing.assert_close(found, expected)
