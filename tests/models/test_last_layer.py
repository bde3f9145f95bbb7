"""The last layer, cut to the rows that are read: fewer rows, the same log-probs and gradients."""

import pytest
import torch
from packed_models import apart_logps, gradients, packed_logps, random_groups, relative, with_lora
from tiny_models import make_llava
from torch import nn

from bpo_fast.models.attention import packed_attention
from bpo_fast.models.last_layer import LastLayer, cut_last_layer
from bpo_fast.models.packing import Group, pack


@pytest.fixture
def case():
    model, groups = with_lora(make_llava()).train(), random_groups(3, 2)
    return model, groups, torch.randn(len(groups), 3, 16, 16)


def rows_of_mlps(model, run):
    """What the MLP of each layer was given, call by call."""
    layers, seen = model.get_base_model().get_decoder().layers, []
    handles = [
        layer.mlp.gate_proj.register_forward_pre_hook(lambda _, args, n=n: seen.append((n, args[0].shape[1])))
        for n, layer in enumerate(layers)
    ]
    run()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_last_mlp_gets_the_tail_rows_alone_again_in_the_backward_pass_too(case, checkpointing):
    model, groups, pixels = case
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    packing = pack(groups)
    whole, tail = len(packing.input_ids), sum(1 + sum(map(len, group.branches)) for group in groups)
    seen = rows_of_mlps(model, lambda: gradients(model, packed_logps(model, groups, pixels)))
    assert seen == [(0, whole), (1, tail), *([(1, tail), (0, whole)] if checkpointing else [])]


def test_what_is_read_of_it_is_that_of_the_whole_layer(case):
    model, groups, pixels = case
    ours = packed_logps(model, groups, pixels)
    expected = apart_logps(model, groups, pixels)  # no packing, nothing cut
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert relative(gradients(model, ours), gradients(model, expected)) < 1e-5


def test_without_a_packing_the_layer_is_whole(case):
    model, groups, pixels = case
    packed_logps(model, groups, pixels)
    seen = rows_of_mlps(model, lambda: apart_logps(model, groups[:1], pixels[:1]))
    assert {rows for _, rows in seen} == {len(groups[0].prefix) + len(branch) for branch in groups[0].branches}


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_of_the_tail_is_that_of_all_rows(kv_heads):
    packing = pack([Group([1] * 5, [[2] * 3, [3], [4] * 2]), Group([1], [[5] * 2])])
    q, *kv = (torch.randn(1, h, len(packing.input_ids), 8, dtype=torch.float64) for h in (4, kv_heads, kv_heads))
    leaves = [x.requires_grad_() for x in (q, *kv)]
    whole, tail = packed_attention(*leaves, packing), packed_attention(*leaves, packing, only_tail=True)
    read = torch.zeros(whole.shape[1], dtype=torch.bool).index_fill(0, packing.tail_rows, True)
    torch.testing.assert_close(tail[:, read], whole[:, read], rtol=1e-12, atol=1e-12)
    assert not tail[:, ~read].any()
    weights = torch.randn_like(whole) * read[None, :, None, None]
    gradients = (torch.autograd.grad((out * weights).sum(), leaves) for out in (tail, whole))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_an_mlp_before_the_attention_computes_for_all_rows():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp, self.attention = nn.Linear(4, 4), nn.Identity()

        def forward(self, x, packing):
            y = self.mlp(x)
            self.attention._last_layer.packing = packing  # as `packed_attention_forward` does
            return y

    decoder = nn.Module()
    decoder.layers = nn.ModuleList([Layer()])
    cut_last_layer(decoder)
    cut_last_layer(decoder)  # a second call finds it done
    assert isinstance(decoder.layers[0].attention._last_layer, LastLayer)
    for lengths in ([2, 3], [4, 1]):
        packing = pack([Group([1] * 3, [[2] * length for length in lengths])])
        x = torch.randn(1, len(packing.input_ids), 4)
        linear = decoder.layers[0].mlp
        assert torch.equal(decoder.layers[0](x, packing), x @ linear.weight.T + linear.bias)
