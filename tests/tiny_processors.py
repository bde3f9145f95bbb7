"""Parts of the processors of tiny models: tokenizers of whole words, and stand-ins for what a plain install lacks.

Stand-ins are a video processor (torchvision; never called), the words of numbers that SmolVLM's processor asks for
(num2words; for videos alone), and the image processor of LFM2-VL (torchvision), which here cuts an image into patches.
"""

from unittest import mock

import torch
import transformers
from tiny_models import CHAT_TEMPLATE, SPECIAL, WORDS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BaseVideoProcessor, BatchFeature, PreTrainedTokenizerFast, ProcessorMixin
from transformers.image_processing_backends import PilBackend
from transformers.models.smolvlm import processing_smolvlm
from transformers.processing_utils import ImagesKwargs

IMAGE = "<image>"


def make_tokenizer(*extra, **named):
    """A tokenizer of whole words with `extra` special tokens; `named` ones become its attributes."""
    vocab = {token: n for n, token in enumerate(dict.fromkeys([*SPECIAL, *named.values(), *extra, *WORDS]))}
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


def make_processor(name, image_processor, tokenizer, *parts, image=IMAGE, **options):
    """transformers' processor class `name`, which would look for torchvision when it checks its parts."""
    checked = mock.patch.object(ProcessorMixin, "check_argument_for_proper_class")
    with checked, mock.patch.object(processing_smolvlm, "num2words", str):
        template = CHAT_TEMPLATE.replace(IMAGE, image)
        return getattr(transformers, name)(image_processor, tokenizer, *parts, chat_template=template, **options)
