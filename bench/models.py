"""A random LLaVA of any size, on CUDA made on the card in 4 bits, that throughput.py trains; and pairs for it."""

import random

import torch

from bpo_fast.demo.tiny_llava import CHECKPOINT
from bpo_fast.plan.lengths import PAPER_MIX

TEXT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def make_llava(options):
    """The demo's LLaVA at the sizes of `options`, of random weights; and its processor.

    On the CPU in float32, its language model in NF4 with `options.base` "nf4". On CUDA its weights are made there, in
    bfloat16 or NF4 one by one, so that there is never more of it in memory than is trained.
    """
    from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

    config, processor = LlavaConfig.from_pretrained(CHECKPOINT), AutoProcessor.from_pretrained(CHECKPOINT)
    text = {name: getattr(options, name) for name in TEXT} | {"max_position_embeddings": 4096}
    heads, width, side = options.num_attention_heads, options.vision_hidden_size, options.image_size
    config.text_config.update(text | {"num_key_value_heads": heads, "head_dim": options.hidden_size // heads})
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": max(1, width // 64)}
    images = {"image_size": side, "patch_size": options.patch_size, "num_hidden_layers": options.vision_layers}
    config.vision_config.update(vision | images)
    config.image_seq_length = (side // options.patch_size) ** 2
    processor.patch_size = options.patch_size
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    torch.manual_seed(0)
    if options.device == "cpu" and options.base != "nf4":
        return LlavaForConditionalGeneration(config), processor
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    if options.base == "nf4":
        for parent in list(model.get_decoder().modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(parent, name, nf4_linear(child, options.device, dtype))
        model.is_loaded_in_4bit = True  # by which PEFT chooses its layers
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.is_meta:
                made = torch.empty(weight.shape, dtype=dtype, device=options.device)
                module._parameters[name] = torch.nn.Parameter(made)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=options.device)
    model.initialize_weights()
    return model.eval(), processor


def nf4_linear(linear, device, dtype):
    """bitsandbytes' layer for a linear of the meta device, its random weights dense for no longer than this."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    options = {"compute_dtype": dtype, "compress_statistics": True, "quant_type": "nf4", "device": "meta"}
    made = Linear4bit(linear.in_features, linear.out_features, bias=linear.bias is not None, **options)
    weight = torch.empty(linear.weight.shape, dtype=dtype, device=device).normal_(std=0.02)
    kept = {"requires_grad": False, "compress_statistics": True, "quant_type": "nf4", "module": made}
    made.weight = Params4bit(weight, **kept).to(device)
    made._is_hf_initialized = True
    return made


def response_lengths(options, count):
    """(chosen, rejected) tokens of each pair: the paper's mix in a fixed random order, or 70 to 130 % of a mean."""
    rng = random.Random(1)
    if options.lengths == "paper":
        return [answers for _, *answers in rng.sample(PAPER_MIX.pairs(count), count)]
    mean = options.response_tokens
    return [[rng.randint(round(0.7 * mean), round(1.3 * mean)) for _ in range(2)] for _ in range(count)]


def make_pairs(options, tokenizer):
    """Pairs in TRL's columns: noise images, a question of 30 words, responses of as many words as they have tokens."""
    from PIL import Image

    rng, side = random.Random(0), options.image_size
    words = sorted(token[1:] for token in tokenizer.get_vocab() if token[0] == "Ġ" and token[1:].isalpha())

    def turn(role, number, *parts):
        return [{"role": role, "content": [*parts, {"type": "text", "text": " ".join(rng.choices(words, k=number))}]}]

    pairs = []
    for lengths in response_lengths(options, options.pairs * (options.steps + 1)):
        image = Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side))
        prompt = turn("user", 30, {"type": "image"})
        chosen, rejected = (turn("assistant", length) for length in lengths)
        pairs.append({"images": [image], "prompt": prompt, "chosen": chosen, "rejected": rejected})
    return pairs
