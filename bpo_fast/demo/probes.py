"""Log-probs of given answers: on a fixed set of pairs while a run trains, and of words as a picture weakens."""

import torch
from transformers import TrainerCallback

from bpo_fast.bootstrap import weaken
from bpo_fast.demo import world
from bpo_fast.models.load import base_model
from bpo_fast.models.packed_forward import image_features, sum_branches
from bpo_fast.models.packing import Group, pack


def render_prompt(processor, question: str) -> str:
    """The prompt of one picture and one question, up to and with "ASSISTANT:"."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


@torch.no_grad()
def score_branches(model, processor, images, prefixes, branches) -> torch.Tensor:
    """Sequence log-probs of K continuations of each prompt, all of them in one packed row.

    Args:
        model: with `enable_packed_forward`, with or without an adapter.
        processor: its processor.
        images: G pictures.
        prefixes: G texts with one `<image>` each, as the chat template renders them.
        branches: G lists of K texts, each with the space that parts it from its prefix.

    Returns:
        fp32 [G, K].
    """
    batch = processor(text=prefixes, images=images, padding=True, add_special_tokens=False, return_tensors="pt")
    rows = zip(batch["input_ids"], batch["attention_mask"], branches, strict=True)
    tokenizer = processor.tokenizer
    groups = [
        Group(ids[mask.bool()].tolist(), [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts])
        for ids, mask, texts in rows
    ]
    packing = pack(groups).to(model.device)
    image_rows = torch.nonzero(packing.input_ids == base_model(model).config.image_token_id).flatten()
    features = image_features(model, {"pixel_values": batch["pixel_values"].to(model.device, model.dtype)})
    token_logps = model(packing=packing, image_features=features, image_rows=image_rows).token_logps
    return sum_branches(token_logps, packing).view(len(groups), -1)


class LogpsProbe(TrainerCallback):
    """Mean log-probs of the chosen and the rejected answers of fixed pairs, every `interval` steps of a run.

    The same measure for BPO and SFT, whose own metrics see other batches and, in SFT, no rejected answer at all.

    Args:
        processor: of the model in training.
        pairs: rows of a preference data set that the run does not train on.
        interval: steps between two measurements.

    Attributes:
        history: list of {"step", "chosen", "rejected"}, in nats a sequence.
    """

    def __init__(self, processor, pairs, interval):
        self.processor, self.interval, self.history = processor, interval, []
        self.images = [pair["images"][0] for pair in pairs]
        self.prefixes = [render_prompt(processor, pair["prompt"][0]["content"][1]["text"]) for pair in pairs]
        end = processor.tokenizer.eos_token
        self.branches = [
            [f" {pair[name][0]['content'][0]['text']}{end}" for name in ("chosen", "rejected")] for pair in pairs
        ]

    def _measure(self, step, model):
        logps = score_branches(model, self.processor, self.images, self.prefixes, self.branches).mean(0)
        self.history.append({"step": step, "chosen": logps[0].item(), "rejected": logps[1].item()})

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._measure(state.global_step, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.interval == 0 or state.global_step == state.max_steps:
            self._measure(state.global_step, model)


def likelihood_by_step(model, processor, scenes, steps, *, seed: int) -> dict[str, list]:
    """Likelihood of the true and of the typical object's words, as the picture weakens.

    The model has said all of the description that comes before the right object, the true count included; measured is
    the probability of the next words being the object that is there, and the one that is typical there (BPO,
    arXiv 2403.08730, figure "effect of image-weakened prompting").

    Args:
        model: with `enable_packed_forward`.
        processor: its processor.
        scenes: pictures that break the bias.
        steps: noise steps; None stands for the picture as it is.
        seed: of the noise.

    Returns:
        `steps`, and for each the mean probability over the scenes: `true`, `typical`.
    """
    prompt = render_prompt(processor, world.QUESTIONS["describe"])
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
