"""Self-generated negatives: what the model answers from the image as it is, the ablation of BPO (arXiv 2403.08730)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from PIL import Image

from bpo_fast.answers.generate import GenerationSettings, check_processor, generate
from bpo_fast.bootstrap.maker import Made, check_seed, draw
from bpo_fast.data.annotations import Annotation
from bpo_fast.models.conversation import Messages


@dataclass(frozen=True)
class SelfGenerated:
    """Answers to clear images.

    Args:
        seed: of sampling.
        decoding: how answers are decoded.

    Raises:
        ValueError: a seed that is no whole number of 64 bits.
    """

    kind: ClassVar[str] = "self_generated"
    needs_model: ClassVar[bool] = True
    needs_images: ClassVar[bool] = True
    needs_answer: ClassVar[bool] = False

    seed: int = 0
    decoding: GenerationSettings = field(default_factory=GenerationSettings)

    def __post_init__(self):
        check_seed(self.seed)

    def settings(self) -> dict[str, Any]:
        return {"seed": self.seed, **asdict(self.decoding)}

    def check(self, model: Any, processor: Any) -> None:
        check_processor(model, processor, Image.new("RGB", (64, 64)))

    def asks(self, sample: Annotation) -> list[Messages]:
        return [sample.prompt]

    def make(
        self, model: Any, processor: Any, samples: Sequence[Annotation], images: Sequence[Image.Image]
    ) -> list[list[Made]]:
        prompts, seeds = [sample.prompt for sample in samples], [draw(self.seed, sample) for sample in samples]
        responses = generate(model, processor, images, prompts, self.decoding, seeds=seeds)
        return [[Made(response.text, response.truncated)] for response in responses]
