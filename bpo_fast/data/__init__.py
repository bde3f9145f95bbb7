"""Annotated data in, preference pairs out."""

from bpo_fast.data.annotations import Annotation, Skip, read_annotations, read_image
from bpo_fast.data.formats import preference_row
from bpo_fast.data.pairs import load_preference_dataset, write_pairs

__all__ = [
    "Annotation",
    "Skip",
    "load_preference_dataset",
    "preference_row",
    "read_annotations",
    "read_image",
    "write_pairs",
]
