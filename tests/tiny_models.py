"""A random LLaVA of a few thousand parameters with its processor, and preference pairs for it."""

import random

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = [f"w{n}" for n in range(90)]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:"]
VOCAB_SIZE = len(SPECIAL) + len(WORDS)
CHAT_TEMPLATE = (
    "<s> {% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} "
    "{% endif %}{% endfor %}{% else %}ASSISTANT: {% for part in message['content'] %}{{ part['text'] }} "
    "{% endfor %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


def make_processor(image_size=16, patch_size=8, words=WORDS):
    vocab = {token: n for n, token in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": image_size, "width": image_size}
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=size)
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=fast,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def make_llava(seed=0, image_size=16, patch_size=8, vocab_size=VOCAB_SIZE, **text):
    torch.manual_seed(seed)
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    } | text
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=vocab_size, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2, **text
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=image_size,
            patch_size=patch_size,
            initializer_range=0.2,
        ),
        image_token_id=SPECIAL.index("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(image_size // patch_size) ** 2,
    )
    return LlavaForConditionalGeneration(config).eval()


def make_pairs(count, seed=0, image_size=16, words=WORDS, longest=9):
    """Examples in TRL's vision preference columns: random pictures, prompts and answers of random length."""
    rng = random.Random(seed)

    def text():
        return " ".join(rng.choices(words, k=rng.randint(1, longest)))

    def turn(role, *parts):
        return [{"role": role, "content": [*parts, {"type": "text", "text": text()}]}]

    def image():
        return Image.frombytes("RGB", (image_size, image_size), rng.randbytes(3 * image_size * image_size))

    return [
        {
            "images": [image()],
            "prompt": turn("user", {"type": "image"}),
            "chosen": turn("assistant"),
            "rejected": turn("assistant"),
        }
        for _ in range(count)
    ]
