"""The SFT view: the annotated response alone, for what preference training is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL import Image

from bpo_fast.bootstrap.maker import Made
from bpo_fast.data.annotations import Annotation
from bpo_fast.models.conversation import Messages


@dataclass(frozen=True)
class ChosenOnly:
    """No rejected response: a row a sample, to train on with `loss_type="sft"`."""

    kind: ClassVar[str] = "sft"
    needs_model: ClassVar[bool] = False
    needs_images: ClassVar[bool] = False
    needs_answer: ClassVar[bool] = False

    def settings(self) -> dict[str, Any]:
        return {}

    def check(self, model: Any, processor: Any) -> None:
        """Any model will do: none is asked."""

    def asks(self, sample: Annotation) -> list[Messages]:
        return []

    def make(
        self, model: Any, processor: Any, samples: Sequence[Annotation], images: Sequence[Image.Image | None]
    ) -> list[list[Made]]:
        return [[Made(rejected=None)] for _ in samples]
