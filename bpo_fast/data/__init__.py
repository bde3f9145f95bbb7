"""Annotated data in, preference pairs out."""

from bpo_fast.data.annotations import Annotation, Skip, read_annotations
from bpo_fast.data.formats import preference_row
from bpo_fast.data.images import image_path, read_image, upright_rgb
from bpo_fast.data.pairs import load_preference_dataset, write_pairs

__all__ = [
    "Annotation",
    "Skip",
    "image_path",
    "load_preference_dataset",
    "preference_row",
    "read_annotations",
    "read_image",
    "upright_rgb",
    "write_pairs",
]
