"""Tiny random models of many families, each with its processor, built without a network.

The processors are transformers' own over a tokenizer of whole words. Three parts cannot be built on a plain install
and have stand-ins: a video processor (torchvision; never called), the words of numbers that SmolVLM's processor asks
for (num2words; for videos alone), and the image processor of LFM2-VL (torchvision), which here cuts an image into
patches.
"""

from unittest import mock

import torch
import transformers
from tiny_models import CHAT_TEMPLATE, WORDS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BaseVideoProcessor, BatchFeature, PreTrainedTokenizerFast, ProcessorMixin
from transformers.image_processing_backends import PilBackend
from transformers.models.smolvlm import processing_smolvlm
from transformers.processing_utils import ImagesKwargs

IMAGE = "<image>"
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "initializer_range": 0.2,
}
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", IMAGE, "USER:", "ASSISTANT:"]


def make_tokenizer(*extra, **named):
    """A tokenizer of whole words with `extra` special tokens; `named` ones become its attributes."""
    vocab = {token: n for n, token in enumerate([*SPECIAL, *dict.fromkeys([*named.values(), *extra]), *WORDS])}
    vocab = {token: n for n, token in enumerate(vocab)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=named,
    )
    fast.add_special_tokens({"additional_special_tokens": list(dict.fromkeys([IMAGE, *extra]))})
    return fast


class NoVideos(BaseVideoProcessor):
    """Stands where a processor wants one of videos."""

    num_frames, fps, merge_size = 1, 1, 2

    def __init__(self):
        pass


class Lfm2VlImages(ImagesKwargs, total=False):
    return_row_col_info: bool


class PatchProcessor(PilBackend):
    """LFM2-VL's inputs of an image: all its patches as rows, a mask over them, and how many there are each way."""

    model_input_names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
    valid_kwargs = Lfm2VlImages
    tile_size, downsample_factor, encoder_patch_size, use_thumbnail = 64, 2, 4, False

    def __call__(self, images, **_):
        images = [image for shown in images for image in shown]
        size, patches, shapes = self.encoder_patch_size, [], []
        for image in images:
            high, wide = (side // (2 * size) * 2 for side in (image.height, image.width))
            pixels = torch.frombuffer(bytearray(image.resize((wide * size, high * size)).tobytes()), dtype=torch.uint8)
            pixels = pixels.view(high, size, wide, size, 3).float() / 127.5 - 1
            patches.append(pixels.permute(0, 2, 1, 3, 4).reshape(high * wide, -1))
            shapes.append([high, wide])
        longest = max(map(len, patches))
        mask = torch.stack([torch.arange(longest) < len(p) for p in patches]).int()
        padded = torch.stack([torch.nn.functional.pad(p, (0, 0, 0, longest - len(p))) for p in patches])
        return BatchFeature(
            {
                "pixel_values": padded,
                "pixel_attention_mask": mask,
                "spatial_shapes": torch.tensor(shapes),
                "image_rows": [1] * len(images),
                "image_cols": [1] * len(images),
                "image_sizes": [[h * size, w * size] for h, w in shapes],
            }
        )


def _processor(name, image_processor, tokenizer, *parts, image=IMAGE, **options):
    """transformers' processor class `name`, which would look for torchvision when it checks its parts."""
    with mock.patch.object(ProcessorMixin, "check_argument_for_proper_class"):
        template = CHAT_TEMPLATE.replace(IMAGE, image)
        return getattr(transformers, name)(image_processor, tokenizer, *parts, chat_template=template, **options)


def _config(name, **options):
    return getattr(transformers, name)(**options)


def _clip(**options):
    return _config("CLIPVisionConfig", **VISION | options)


def _siglip(**options):
    return _config("SiglipVisionConfig", **VISION | options)


def _model(name, config, seed=0):
    torch.manual_seed(seed)
    model = getattr(transformers, name)._from_config(config).eval()
    for parameter in model.parameters():
        if not parameter.any():  # as biases and Gemma 3's projector start, which would hide the images
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def _square(size=16):
    return {"height": size, "width": size}


def llava(text="LlamaConfig", seed=0, **options):
    """LLaVA-1.5 over the language model of a configuration class."""
    tokenizer = make_tokenizer()
    config = _config(
        "LlavaConfig",
        text_config=_config(text, **TEXT | {"vocab_size": len(tokenizer)} | options),
        vision_config=_clip(),
        image_token_id=4,
        image_seq_length=4,
    )
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=_square())
    processor = _processor(
        "LlavaProcessor",
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return _model("LlavaForConditionalGeneration", config, seed), processor


def llava_next(seed=0, **options):
    tokenizer = make_tokenizer()
    grid = [[16, 32], [32, 16], [32, 32]]
    config = _config(
        "LlavaNextConfig",
        text_config=_config("LlamaConfig", **TEXT | {"vocab_size": len(tokenizer)} | options),
        vision_config=_clip(),
        image_grid_pinpoints=grid,
        image_token_id=4,
    )
    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size=_square(), image_grid_pinpoints=grid
    )
    processor = _processor(
        "LlavaNextProcessor",
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return _model("LlavaNextForConditionalGeneration", config, seed), processor


def llava_onevision(seed=0, **options):
    tokenizer = make_tokenizer("<video>")
    grid = [[16, 32], [32, 16], [32, 32]]
    config = _config(
        "LlavaOnevisionConfig",
        text_config=_config("Qwen2Config", **TEXT | {"vocab_size": len(tokenizer)} | options),
        vision_config=_siglip(vision_use_head=False),
        image_grid_pinpoints=grid,
        image_token_id=4,
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
    )
    images = transformers.LlavaOnevisionImageProcessorPil(size=_square(), image_grid_pinpoints=grid)
    processor = _processor(
        "LlavaOnevisionProcessor",
        images,
        tokenizer,
        NoVideos(),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
    )
    return _model("LlavaOnevisionForConditionalGeneration", config, seed), processor


def internvl(seed=0, **options):
    tokenizer = make_tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    config = _config(
        "InternVLConfig",
        text_config=_config("Qwen2Config", **TEXT | {"vocab_size": len(tokenizer)} | options),
        vision_config=_config("InternVLVisionConfig", **VISION | {"image_size": [16, 16], "patch_size": [4, 4]}),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
    )
    images = transformers.GotOcr2ImageProcessorPil(size=_square(), crop_to_patches=True, max_patches=4)
    processor = _processor(
        "InternVLProcessor", images, tokenizer, NoVideos(), image="<IMG_CONTEXT>", image_seq_length=4
    )
    return _model("InternVLForConditionalGeneration", config, seed), processor


def idefics3(name="Idefics3", seed=0, **options):
    """Idefics3, or SmolVLM, which is built alike."""
    tokens = ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<video>"]
    tokens += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer = make_tokenizer(*tokens)
    config = _config(
        f"{name}Config",
        text_config=_config("LlamaConfig", **TEXT | {"vocab_size": len(tokenizer)} | options),
        vision_config=_config(f"{name}VisionConfig", **VISION | {"patch_size": 4}),
        image_token_id=4,
        scale_factor=2,
        pad_token_id=0,
    )
    images = getattr(transformers, f"{name}ImageProcessorPil")(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
    )
    parts = [NoVideos()] if name == "SmolVLM" else []
    with mock.patch.object(processing_smolvlm, "num2words", str):
        processor = _processor(f"{name}Processor", images, tokenizer, *parts, image_seq_len=4)
    return _model(f"{name}ForConditionalGeneration", config, seed), processor


def qwen_vl(name="Qwen2VL", seed=0, **options):
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5: three-dimensional positions, each with a vision part of its own."""
    tokens = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<s>", "vision_end": "</s>"}
    tokenizer = make_tokenizer("<|video_pad|>", "<|vision_start|>", "<|vision_end|>", image_token="<|image_pad|>")
    ids = {f"{part}_token_id": tokenizer.convert_tokens_to_ids(token) for part, token in tokens.items()}
    sizes = {"depth": 2, "num_heads": 2, "patch_size": 4, "initializer_range": 0.2, "hidden_size": 24}
    vision = {
        "Qwen2VL": {"embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2},
        "Qwen2_5_VL": {
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "intermediate_size": 32,
        },
        "Qwen3VL": {
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
            "intermediate_size": 32,
        },
        "Qwen3_5": {"out_hidden_size": 32, "num_position_embeddings": 64, "intermediate_size": 32},
    }[name]
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 100.0}
    text = {"rope_parameters": rope, "vocab_size": len(tokenizer)}
    if name in ("Qwen3VL", "Qwen3_5"):
        text |= {"head_dim": 8}
    if name == "Qwen3_5":
        text |= {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "head_dim": 16,
            "rope_parameters": rope | {"partial_rotary_factor": 0.5},
        }
    config = _config(f"{name}Config", text_config=TEXT | text | options, vision_config=sizes | vision, **ids)
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 256, "longest_edge": 1024}
    )
    processor = {"Qwen2_5_VL": "Qwen2_5_VLProcessor", "Qwen2VL": "Qwen2VLProcessor"}.get(name, "Qwen3VLProcessor")
    processor = _processor(processor, images, tokenizer, NoVideos(), image="<|image_pad|>")
    return _model(f"{name}ForConditionalGeneration", config, seed), processor


def gemma3(seed=0, **options):
    tokenizer = make_tokenizer(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft>")
    text = {"vocab_size": len(tokenizer), "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 512}
    text |= {"layer_types": ["sliding_attention", "full_attention"]}
    config = _config(
        "Gemma3Config",
        text_config=TEXT | text | options,
        vision_config=_siglip(vision_use_head=False).to_dict(),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
        initializer_range=0.2,
    )
    images = transformers.Gemma3ImageProcessorPil(size=_square())
    processor = _processor("Gemma3Processor", images, tokenizer, image="<start_of_image>", image_seq_length=4)
    return _model("Gemma3ForConditionalGeneration", config, seed), processor


def paligemma(seed=0, **options):
    tokenizer = make_tokenizer(image_token=IMAGE)
    images = transformers.SiglipImageProcessorPil(size=_square())
    images.image_seq_length = 4
    processor = _processor("PaliGemmaProcessor", images, tokenizer)
    text = {"vocab_size": len(tokenizer), "head_dim": 8, "model_type": "gemma"}
    config = _config(
        "PaliGemmaConfig",
        text_config=TEXT | text | options,
        vision_config=_siglip(vision_use_head=False, projection_dim=32).to_dict(),
        projection_dim=32,
        hidden_size=32,
        image_token_index=tokenizer.image_token_id,
    )
    return _model("PaliGemmaForConditionalGeneration", config, seed), processor


def glm4v(seed=0, **options):
    extra = ["<|video|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"]
    tokenizer = make_tokenizer(*extra, image_token="<|image|>")
    ids = map(tokenizer.convert_tokens_to_ids, ["<|image|>", *extra])
    names = ["image", "video", "image_start", "image_end", "video_start", "video_end"]
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 100.0}
    config = _config(
        "Glm4vConfig",
        text_config=TEXT | {"vocab_size": len(tokenizer), "rope_parameters": rope} | options,
        vision_config={
            "depth": 2,
            "hidden_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "image_size": 16,
            "out_hidden_size": 32,
            "intermediate_size": 32,
            "initializer_range": 0.2,
        },
        **{f"{name}_token_id": id for name, id in zip(names, ids, strict=True)},
    )
    images = transformers.Glm4vImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 256, "longest_edge": 2048}
    )
    processor = _processor("Glm4vProcessor", images, tokenizer, NoVideos(), image="<|image|>")
    return _model("Glm4vForConditionalGeneration", config, seed), processor


def lfm2_vl(seed=0, **options):
    tokenizer = make_tokenizer("<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", image_token=IMAGE)
    text = {"vocab_size": len(tokenizer), "layer_types": ["conv", "full_attention"]}
    config = _config(
        "Lfm2VlConfig",
        text_config=_config("Lfm2Config", **TEXT | text | options),
        vision_config=_config(
            "Siglip2VisionConfig",
            **{name: value for name, value in VISION.items() if name != "image_size"} | {"patch_size": 4},
            num_patches=64,
            vision_use_head=False,
        ),
        image_token_id=tokenizer.image_token_id,
        projector_hidden_size=32,
    )
    processor = _processor("Lfm2VlProcessor", PatchProcessor(), tokenizer)
    return _model("Lfm2VlForConditionalGeneration", config, seed), processor
