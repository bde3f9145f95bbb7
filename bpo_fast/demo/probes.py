"""The demo's measurements: log-probs of fixed pairs while a run trains, and of words as an image weakens."""

from collections.abc import Sequence

from torch import nn
from transformers import ProcessorMixin, TrainerCallback

from bpo_fast.answers.score import score_branches
from bpo_fast.demo import world
from bpo_fast.models.prompt import question, render
from bpo_fast.models.weaken import weaken


class LogpsProbe(TrainerCallback):
    """Mean log-probs of the chosen and the rejected answers of fixed pairs, every `interval` steps of a run.

    The same measure for BPO and SFT, whose own metrics see other batches and, in SFT, no rejected answer at all.

    Args:
        processor: of the model in training.
        pairs: examples of a preference data set that the run does not train on.
        interval: steps between two measurements.

    Attributes:
        history: list of {"step", "chosen", "rejected"}, in nats a sequence.
    """

    def __init__(self, processor: ProcessorMixin, pairs: Sequence[dict], interval: int):
        self.processor, self.interval, self.history = processor, interval, []
        self.images = [pair["images"][0] for pair in pairs]
        rendered = [render(processor, pair["prompt"], [pair["chosen"], pair["rejected"]]) for pair in pairs]
        self.prefixes, self.branches = zip(*rendered, strict=True)

    def _measure(self, step, model):
        logps = score_branches(model, self.processor, self.images, self.prefixes, self.branches).mean(0)
        self.history.append({"step": step, "chosen": logps[0].item(), "rejected": logps[1].item()})

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._measure(state.global_step, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.interval == 0 or state.global_step == state.max_steps:
            self._measure(state.global_step, model)


def likelihood_by_step(
    model: nn.Module,
    processor: ProcessorMixin,
    scenes: Sequence[world.Scene],
    steps: Sequence[int | None],
    *,
    seed: int,
) -> dict[str, list]:
    """Likelihood of the true and of the typical object's words, as the image weakens.

    The model has said all of the description that comes before the right object, the true count included; measured is
    the probability of the next words being the object that is there, and the one that is typical there (BPO,
    arXiv 2403.08730, figure "effect of image-weakened prompting").

    Args:
        model: with `enable_packed_forward`.
        processor: its processor.
        scenes: scenes that break the bias.
        steps: noise steps; None stands for the image as it is.
        seed: of the noise.

    Returns:
        `steps`, and for each the mean probability over the scenes: `true`, `typical`.
    """
    prompt = render(processor, question(world.QUESTIONS["describe"]))[0]
    images, prefixes, branches = [], [], []
    for scene in scenes:
        plural = "s" if scene.count > 1 else ""
        before, _, _ = world.describe(scene).partition(f" {scene.right}{plural}. The ground")
        images.append(world.draw(scene))
        prefixes.append(f"{prompt} {before}")
        branches.append([f" {scene.right}{plural}", f" {world.typical_company(scene.left)[0]}{plural}"])
    result = {"steps": list(steps), "true": [], "typical": []}
    for step in steps:
        with weaken(model, step, seed=seed):
            true, typical = score_branches(model, processor, images, prefixes, branches).exp().mean(0).tolist()
        result["true"].append(true)
        result["typical"].append(typical)
    return result
