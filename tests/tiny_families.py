"""Tiny random models of many families, each with transformers' own processor for it, built without a network."""

import functools
import itertools
import random

import torch
import transformers
from PIL import Image
from tiny_models import make_pairs
from tiny_processors import IMAGE, NoVideos, PatchProcessor, make_processor, make_tokenizer

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
    processor = make_processor(
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
    processor = make_processor(
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
    processor = make_processor(
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
    processor = make_processor(
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
    processor = make_processor(f"{name}Processor", images, tokenizer, *parts, image_seq_len=4)
    return _model(f"{name}ForConditionalGeneration", config, seed), processor


def qwen_vl(name="Qwen2VL", seed=0, **options):
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5: three-dimensional positions, each with a vision part of its own."""
    tokens = {
        "image": "<|image_pad|>",
        "video": "<|video_pad|>",
        "vision_start": "<|vision_start|>",
        "vision_end": "<|vision_end|>",
    }
    tokenizer = make_tokenizer(*tokens.values(), image_token=tokens["image"])
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
    processor = make_processor(processor, images, tokenizer, NoVideos(), image="<|image_pad|>")
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
    processor = make_processor("Gemma3Processor", images, tokenizer, image="<start_of_image>", image_seq_length=4)
    return _model("Gemma3ForConditionalGeneration", config, seed), processor


def paligemma(seed=0, **options):
    tokenizer = make_tokenizer(image_token=IMAGE)
    images = transformers.SiglipImageProcessorPil(size=_square())
    images.image_seq_length = 4
    processor = make_processor("PaliGemmaProcessor", images, tokenizer)
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
    processor = make_processor("Glm4vProcessor", images, tokenizer, NoVideos(), image="<|image|>")
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
    processor = make_processor("Lfm2VlProcessor", PatchProcessor(), tokenizer)
    return _model("Lfm2VlForConditionalGeneration", config, seed), processor


def _over(text, **options):
    return functools.partial(llava, text, **options)


# Families whose packed sequences compute what their own forward does.
EXACT = {
    "LLaVA over Llama": llava,
    "LLaVA over Mistral": _over("MistralConfig"),
    "LLaVA over Qwen2": _over("Qwen2Config"),
    "LLaVA over Qwen3": _over("Qwen3Config", head_dim=8),
    "LLaVA over Gemma": _over("GemmaConfig", head_dim=8),
    "LLaVA-NeXT": llava_next,
    "LLaVA-OneVision": llava_onevision,
    "InternVL": internvl,
    "SmolVLM": functools.partial(idefics3, "SmolVLM"),
    "Idefics3": idefics3,
}

# Families that the start check refuses -> builder, class of the model, class of its decoder.
LLAVA = "LlavaForConditionalGeneration"
REFUSED = {
    "LLaVA over StableLM": (_over("StableLmConfig"), LLAVA, "StableLmModel"),
    "LLaVA over Nemotron": (_over("NemotronConfig"), LLAVA, "NemotronModel"),
    "LLaVA over GPT-OSS": (
        _over("GptOssConfig", head_dim=8, num_local_experts=4, num_experts_per_tok=2),
        LLAVA,
        "GptOssModel",
    ),
    "LLaVA over Lfm2": (_over("Lfm2Config", layer_types=["conv", "full_attention"]), LLAVA, "Lfm2Model"),
    "LLaVA over FalconH1": (
        _over("FalconH1Config", mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=16),
        LLAVA,
        "FalconH1Model",
    ),
    "Qwen2-VL": (qwen_vl, "Qwen2VLForConditionalGeneration", "Qwen2VLTextModel"),
    "Qwen2.5-VL": (
        functools.partial(qwen_vl, "Qwen2_5_VL"),
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLTextModel",
    ),
    "Qwen3-VL": (functools.partial(qwen_vl, "Qwen3VL"), "Qwen3VLForConditionalGeneration", "Qwen3VLTextModel"),
    "Qwen3.5": (functools.partial(qwen_vl, "Qwen3_5"), "Qwen3_5ForConditionalGeneration", "Qwen3_5TextModel"),
    "Gemma 3": (gemma3, "Gemma3ForConditionalGeneration", "Gemma3TextModel"),
    "PaliGemma": (paligemma, "PaliGemmaForConditionalGeneration", "GemmaModel"),
    "GLM-4V": (glm4v, "Glm4vForConditionalGeneration", "Glm4vTextModel"),
    "LFM2-VL": (lfm2_vl, "Lfm2VlForConditionalGeneration", "Lfm2Model"),
}


def make_examples(count=3, seed=0):
    """Preference pairs whose images have several sizes, so that tiling families cut them into one or more tiles."""
    rng = random.Random(seed)
    examples = make_pairs(count, seed)
    for example, (width, height) in zip(examples, itertools.cycle([(16, 16), (40, 24), (24, 48)]), strict=False):
        example["images"] = [Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))]
    return examples
