"""Fused norms, rotations and activations without a GPU: nothing is changed, and fake tensors know their shapes."""

import torch
from tiny_models import make_llava
from torch._subclasses.fake_tensor import FakeTensorMode

from bpo_fast.models.elementwise import fuse_elementwise
from bpo_fast.ops.fused_elementwise import gated, rms_norm, rotate


def test_without_a_gpu_a_decoder_stays_as_it_is():
    model = make_llava()
    ids = torch.tensor([[7, 8, 9, 10]])
    before = model(input_ids=ids).logits
    assert fuse_elementwise(model.get_decoder()) == {"norms": 0, "activations": 0, "rotations": 0}
    assert torch.equal(model(input_ids=ids).logits, before)


def test_fake_tensors_run_through_them_and_keep_no_more_than_their_inputs():
    kept = []
    with (
        FakeTensorMode() as mode,
        torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (kept.append(tuple(tensor.shape)), tensor)[1], lambda tensor: tensor
        ),
    ):
        x, gate, up = (torch.empty(2, 5, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        q = torch.empty(2, 5, 4, 16, dtype=torch.bfloat16, requires_grad=True).transpose(1, 2)
        k = torch.empty(2, 5, 2, 16, dtype=torch.bfloat16, requires_grad=True).transpose(1, 2)
        cos, sin = torch.empty(2, 5, 16), torch.empty(2, 5, 16)
        results = [rms_norm(x, torch.empty(64), 1e-6), gated(gate * 1, up * 1, "silu"), *rotate(q, k, cos, sin)]
        assert [tuple(result.shape) for result in results] == [(2, 5, 64), (2, 5, 64), (2, 4, 5, 16), (2, 2, 5, 16)]
        assert results[2].stride() == q.stride()
        gradients = torch.autograd.grad([result.sum() for result in results], [x, gate, up, q, k])
        assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in (x, gate, up, q, k)]
    assert mode is not None
    assert kept == [(2, 5, 64), (10,), (2, 5, 64), (2, 5, 64), (2, 5, 16), (2, 5, 16)]


def test_fake_decoders_are_fused_throughout():
    with FakeTensorMode():
        model = make_llava()
        counts = fuse_elementwise(model.requires_grad_(False).get_decoder())
        assert counts == {"norms": 5, "activations": 2, "rotations": 2}
        embeds = torch.empty(1, 6, 32, requires_grad=True)
        y = model.get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state
        y.sum().backward()
        assert embeds.grad.shape == embeds.shape
