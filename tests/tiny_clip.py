"""Random models of images and texts, a few thousand parameters each, with their processors."""

import torch
from tiny_processors import make_tokenizer
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
)

SIZES = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = {"image_size": 16, "patch_size": 8}
LENGTH = 24


def make_clip(family="clip", seed=0, tokenizer=None):
    """(model, processor): by default of the words of tiny_models, with and without punctuation behind them."""
    if tokenizer is None:
        tokenizer = make_tokenizer()
        tokenizer.add_tokens([f"w{n}{end}" for n in range(10) for end in ".!"])
    tokenizer.model_max_length = LENGTH
    words = {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH, "bos_token_id": 1, "eos_token_id": 2}
    text, vision = SIZES | words | {"pad_token_id": 0}, SIZES | IMAGES
    square = {"height": 16, "width": 16}
    torch.manual_seed(seed)
    if family == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
        images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=square)
        processor = CLIPProcessor(images, tokenizer)
    else:
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        processor = SiglipProcessor(SiglipImageProcessorPil(size=square), tokenizer)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval(), processor


def save_clip(folder, family="clip", seed=0, tokenizer=None):
    for part in make_clip(family, seed, tokenizer):
        part.save_pretrained(folder)
