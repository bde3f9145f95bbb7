"""The bare matrix products of a training step, timed one after the other: the floor of throughput.py's steps.

Products of one decoder layer are timed on random tensors of the step's shapes and dtype, and counted as often as it
takes them; attention is its own call, with its gradient. Norms, activations, dequantisation, the loss, the optimiser
and all host work are left out.
"""

import statistics
from functools import partial

import torch
from measure import elapsed, flush_buffer

from bpo_fast.models.attention import packed_attention


def median_seconds(step, device, repeats=5):
    """Median time of a step that has run once before, with an empty cache on CUDA."""
    step()
    flushed = flush_buffer(device)
    return statistics.median(elapsed(step, 1, flushed) for _ in range(repeats))


def products(shapes, device, dtype):
    """A step that takes the product of [m, k] and [k, n] for each (m, k, n)."""
    made = {}
    for m, k, n in shapes:
        made[m, k, n] = [torch.randn(*size, device=device, dtype=dtype) for size in ((m, k), (k, n))]
        made[m, k, n].append(torch.empty(m, n, device=device, dtype=dtype))
    return lambda: [torch.mm(*made[shape][:2], out=made[shape][2]) for shape in shapes]


def layer_shapes(text, tokens, mlp_tokens, rank):
    """(forward, low-rank forward, backward) products of a decoder layer with LoRA on its seven linears."""
    width, inner = text.hidden_size, text.intermediate_size
    kv = text.num_key_value_heads * text.head_dim
    linears = [(tokens, width, width)] * 2 + [(tokens, width, kv)] * 2
    linears += [(mlp_tokens, width, inner)] * 2 + [(mlp_tokens, inner, width)]
    low_rank = [shape for m, k, n in linears for shape in ((m, k, rank), (m, rank, n))]
    # The gradient of the input through the frozen weight; of the input through the adapter, and of A and B.
    backward = [(m, n, k) for m, k, n in linears]
    for m, k, n in linears:
        backward += [(m, n, rank), (m, rank, k), (k, m, rank), (rank, m, n)]
    return linears, low_rank, backward


def layer_seconds(text, packing, rank, device, dtype, only_tail=False):
    """Seconds of a layer's products: (forward, low-rank forward, backward, attention, attention's backward).

    Args:
        only_tail: of the last layer, which computes for the rows that are read (`models.last_layer`).
    """
    tokens = len(packing.input_ids)
    shapes = layer_shapes(text, tokens, len(packing.tail_rows) if only_tail else tokens, rank)
    linears = [median_seconds(products(each, device, dtype), device) for each in shapes]
    return *linears, *attention_seconds(text, packing, device, dtype, only_tail)


def attention_seconds(text, packing, device, dtype, only_tail):
    """(forward, backward) seconds of a layer's attention over a packed sequence."""
    heads = (text.num_attention_heads, text.num_key_value_heads, text.num_key_value_heads)
    sizes = [(1, number, len(packing.input_ids), text.head_dim) for number in heads]
    rows = [torch.randn(size, device=device, dtype=dtype, requires_grad=True) for size in sizes]
    attention = partial(packed_attention, *rows, packing, only_tail=only_tail)
    gradient = torch.ones_like(attention())

    def forward():
        with torch.no_grad():
            attention()

    def both():
        torch.autograd.grad(attention(), rows, gradient)

    once = median_seconds(forward, device)
    return once, max(0.0, median_seconds(both, device) - once)


def vision_shapes(vision, images):
    """Products of the vision tower's layers over so many images."""
    tokens, width = images * ((vision.image_size // vision.patch_size) ** 2 + 1), vision.hidden_size
    layer = [(tokens, width, width)] * 4
    layer += [(tokens, width, vision.intermediate_size), (tokens, vision.intermediate_size, width)]
    return layer


def floor_seconds(config, packings, *, rank, live_reference, live_images, device, dtype):
    """(seconds without, seconds with every layer's forward recomputed) of the products of a step's packed sequences.

    Args:
        config: of the LLaVA.
        packings: the step's packed sequences, on the device.
        rank: of the LoRA adapter.
        live_reference: the reference's forward pass is taken in the step.
        live_images: number of images that the vision tower sees in the step.
        device: "cuda" or "cpu".
        dtype: of the products.
    """
    text, total, recomputed = config.text_config, 0.0, 0.0
    for packing in packings:
        rows = len(packing.targets)
        layer, last = (layer_seconds(text, packing, rank, device, dtype, only_tail) for only_tail in (False, True))
        layers = [(text.num_hidden_layers - 1) * each + tail for each, tail in zip(layer, last, strict=True)]
        base, low_rank, backward, attention, attention_backward = layers
        head = [(rows, text.hidden_size, text.vocab_size)]
        logits = median_seconds(products(head, device, dtype), device)
        gradient = median_seconds(products([(rows, text.vocab_size, text.hidden_size)], device, dtype), device)
        forward = base + low_rank + attention
        total += forward + backward + attention_backward + logits + gradient
        total += base + attention + logits if live_reference else 0.0
        recomputed += forward
    if live_images:
        vision = config.vision_config
        layer = median_seconds(products(vision_shapes(vision, live_images), device, dtype), device)
        total += vision.num_hidden_layers * layer
    return total, total + recomputed
