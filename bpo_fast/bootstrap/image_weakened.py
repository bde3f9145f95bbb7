"""Image-weakened negatives: what the model answers from its image with noise on it (BPO, arXiv 2403.08730, 3.1).

The weakened image is the only one that the model sees. A sample's noise depends on the seed and the sample alone, and
is the same at every step but for its scale.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from PIL import Image

from bpo_fast.answers.generate import GenerationSettings, check_processor, generate
from bpo_fast.answers.plain import equal_logits, next_logits
from bpo_fast.answers.prompts import Prompts, trial_images
from bpo_fast.bootstrap.maker import Made, check_seed, draw
from bpo_fast.data.annotations import Annotation
from bpo_fast.models.conversation import Messages
from bpo_fast.models.load import base_model
from bpo_fast.models.weaken import TARGETS, resolve_schedule
from bpo_fast.models.weakened_features import ImageNoise
from bpo_fast.ops.checks import is_int
from bpo_fast.ops.noise.schedule import NoiseSchedule
from bpo_fast.runs.fingerprint import fingerprint


@dataclass(frozen=True)
class ImageWeakened:
    """Answers to weakened images, one for each noise step.

    Args:
        target: what the noise is put on, see `models.weaken.weaken`.
        steps: step of the schedule, or several, each of which gives a sample one response.
        schedule: "sigmoid" (the paper's), "linear", "cosine", or a schedule of your own.
        seed: of the noise, and of sampling.
        decoding: how answers are decoded.

    Raises:
        ValueError: an unknown target or schedule, a step that the schedule does not have or that comes twice, or a
            seed that is no whole number of 64 bits.
    """

    kind: ClassVar[str] = "image_weakened"
    needs_model: ClassVar[bool] = True
    needs_images: ClassVar[bool] = True
    needs_answer: ClassVar[bool] = False

    target: str = "features"
    steps: int | Sequence[int] = 500
    schedule: str | NoiseSchedule = "sigmoid"
    seed: int = 0
    decoding: GenerationSettings = field(default_factory=GenerationSettings)

    def __post_init__(self):
        if self.target not in TARGETS:
            raise ValueError(f"noise_target: found {self.target!r}, expected one of {', '.join(TARGETS)}.")
        schedule = resolve_schedule(self.schedule)
        steps = (self.steps,) if is_int(self.steps) else tuple(self.steps)
        if not steps or len(set(steps)) != len(steps):
            raise ValueError(f"noise_step: found {list(steps)}, expected one step or more, each once.")
        last = schedule.num_steps - 1
        for step in steps:
            if not is_int(step) or not 0 <= step <= last:
                raise ValueError(f"noise_step: found {step!r}, expected a step from 0 to {last}.")
        check_seed(self.seed)
        object.__setattr__(self, "steps", steps)

    def settings(self) -> dict[str, Any]:
        schedule = self.schedule
        return {
            "target": self.target,
            "steps": list(self.steps),
            "schedule": schedule if isinstance(schedule, str) else fingerprint(schedule.alpha_bar.tolist()),
            "seed": self.seed,
            **asdict(self.decoding),
        }

    def check(self, model: Any, processor: Any) -> None:
        """Refuse a model whose image reaches its decoder by a way that the noise does not cover.

        Under a schedule that keeps nothing of an image, two images with the same noise must leave the same logits.

        Raises:
            ValueError: they do not, or the processor is not the model's.
        """
        images = trial_images()
        check_processor(model, processor, images[0])
        noise = ImageNoise([0], [0, 0], NoiseSchedule([0.0], name="empty"), self.target)
        prompts = Prompts.of(model, processor, ["What is this?"] * 2, images, noise)
        if not equal_logits(*(next_logits(prompts, row) for row in range(2))):
            raise ValueError(
                f"model: found {type(base_model(model)).__name__}, whose answers depend on the image past the noise "
                f"on its {self.target}, expected that to be the image's only way to the language model; set "
                "noise_target to 'pixels'."
            )

    def asks(self, sample: Annotation) -> list[Messages]:
        return [sample.prompt for _ in self.steps]

    def make(
        self, model: Any, processor: Any, samples: Sequence[Annotation], images: Sequence[Image.Image]
    ) -> list[list[Made]]:
        ids = [sample.sample_id for sample in samples]
        noise = ImageNoise(self.steps, ids, resolve_schedule(self.schedule), self.target, self.seed)
        prompts = [sample.prompt for sample in samples]
        seeds = [draw(self.seed, sample, step) for sample in samples for step in self.steps]
        responses = generate(model, processor, images, prompts, self.decoding, seeds=seeds, noise=noise)
        answered = iter(responses)
        return [[self._made(next(answered), step) for step in self.steps] for _ in samples]

    def _made(self, response, step):
        variant = str(step) if len(self.steps) > 1 else ""
        return Made(response.text, response.truncated, variant, details={"step": step})
