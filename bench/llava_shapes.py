"""A LLaVA of random weights in a given shape, its processor, and preference pairs for it: nothing is downloaded."""

import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
CHAT_TEMPLATE = (
    "<s> {% for message in messages %}{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} "
    "{% endif %}{% endfor %}{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaVA; image_size / patch_size squared is its number of image tokens."""

    hidden_size: int = 512
    intermediate_size: int = 1408
    num_layers: int = 8
    num_heads: int = 8
    vocab_size: int = 32064
    image_size: int = 336
    patch_size: int = 14
    vision_hidden_size: int = 256
    vision_layers: int = 8

    @property
    def image_tokens(self):
        return (self.image_size // self.patch_size) ** 2


def make_model(shape, seed=0):
    """Random weights in float32."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_heads,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=shape.vision_hidden_size,
            intermediate_size=4 * shape.vision_hidden_size,
            num_hidden_layers=shape.vision_layers,
            num_attention_heads=shape.vision_hidden_size // 64,
            image_size=shape.image_size,
            patch_size=shape.patch_size,
        ),
        image_token_id=SPECIAL.index("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=shape.image_tokens,
    )
    return LlavaForConditionalGeneration(config)


def make_processor(shape):
    """A processor whose tokenizer reads the words w0, w1, ... of the whole vocabulary."""
    words = [f"w{n}" for n in range(shape.vocab_size - len(SPECIAL))]
    vocab = {token: n for n, token in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": shape.image_size, "width": shape.image_size}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": shape.image_size}, crop_size=size),
        tokenizer=fast,
        patch_size=shape.patch_size,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def make_pairs(shape, count, response_tokens=100, prompt_tokens=30, seed=0):
    """Pairs in TRL's columns: noise pictures, responses of 70 to 130 % of `response_tokens`, end token included."""
    rng = random.Random(seed)

    def words(length):
        return " ".join(f"w{rng.randrange(shape.vocab_size - len(SPECIAL))}" for _ in range(length))

    def answer():
        length = rng.randint(round(0.7 * response_tokens), round(1.3 * response_tokens)) - 1
        return [{"role": "assistant", "content": [{"type": "text", "text": words(length)}]}]

    pixels = np.random.default_rng(seed)
    side = shape.image_size
    return [
        {
            "images": [Image.fromarray(pixels.integers(0, 256, (side, side, 3), dtype=np.uint8))],
            "prompt": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words(prompt_tokens)}]}
            ],
            "chosen": answer(),
            "rejected": answer(),
        }
        for _ in range(count)
    ]
