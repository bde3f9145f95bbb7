"""What a training reads of its caches, and by which keys; `caches` fills them."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from bpo_fast.models.weakened_roots import Weakening
from bpo_fast.runs.fingerprint import fingerprint
from bpo_fast.runs.tensor_cache import TensorCache
from bpo_fast.train.examples import ImagesShown


def prompt_key(shown: ImagesShown, prompt: str) -> str:
    """Of a rendered prompt with the images that it shows: its token ids."""
    return f"prompt-{digest(shown.key, prompt)}"


def pair_key(
    shown: ImagesShown, prompt: str, answers: Sequence[str], max_length: int | None, weakening: Weakening | None = None
) -> str:
    """Of a rendered prompt with its answers, cut at `max_length`: their log-probs, the weakened image's too."""
    noise = [] if weakening is None else [asdict(weakening)]
    return f"pair-{digest(shown.key, prompt, list(answers), max_length, *noise)}"


class FeatureCache:
    """What the collator reads instead of images; its tensors are made by `feature_cache.fill_features`.

    Args:
        tensors: under `images-...`, features [M, H] of the images that a prompt shows; under `prompt-...`, ids [P].
    """

    def __init__(self, tensors: TensorCache):
        self.tensors = tensors

    def prompt_ids(self, shown: ImagesShown, prompt: str) -> list[int]:
        """The ids of a rendered prompt, image tokens expanded.

        Raises:
            ValueError: the prompt was rendered otherwise when the cache was filled.
        """
        key = prompt_key(shown, prompt)
        if key not in self.tensors:
            raise ValueError(
                f"cache_image_features: found the prompt {prompt!r:.80}, which the chat template rendered otherwise "
                "before the first step, expected the same; leave the time out of the chat template."
            )
        return self.tensors[key].tolist()

    def rows(self, shown: ImagesShown) -> torch.Tensor:
        """[M, H]: the features of an example's images."""
        return self.tensors[shown.key]


class ReferenceCache:
    """What the collator reads of the reference; its tensors are made by `reference_cache.fill_reference`.

    Args:
        tensors: under `pair-...`, fp32 [N]: log-probs of the tokens of chosen and rejected, one after the other, and
            of chosen once more where the pair has a second root.
    """

    def __init__(self, tensors: TensorCache):
        self.tensors = tensors

    def token_logps(
        self,
        shown: ImagesShown,
        prompt: str,
        answers: Sequence[str],
        max_length: int | None,
        weakening: Weakening | None,
    ) -> torch.Tensor | None:
        """fp32 [N] of a rendered pair, or None where it was not kept."""
        key = pair_key(shown, prompt, answers, max_length, weakening)
        return self.tensors.get(key)


def digest(*values: Any) -> str:
    """The SHA-256 of JSON values in 64 digits."""
    return fingerprint(values).removeprefix("sha256:")
