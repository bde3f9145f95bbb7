"""The start check: log-probs of packed rows against transformers' own forward of each conversation by itself.

The packed forward reads one-dimensional positions, causal masks and one list of image features. A model that needs more
would be trained wrongly without a word; here its first examples show it before the first step. Nothing is taken on
trust: the check runs at the start of every training, whatever the model is called.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import BatchFeature, PreTrainedModel

from bpo_fast.models.families import ANSWER_TYPES
from bpo_fast.models.load import base_model
from bpo_fast.models.packed_forward import PackingNotSeenError, enable_packed_forward, image_features, unpacked_forward
from bpo_fast.models.packing import Packing
from bpo_fast.models.prompt import image_inputs
from bpo_fast.train.collator import PreferenceCollator

# Examples that are compared: several groups of one row, in a fraction of a second.
NUM_EXAMPLES = 3



@dataclass
class _Comparison:
    """Log-probs of the same response tokens, by packed rows and by the model's own forward.

    Attributes:
        packed, plain: fp32 [N].
        spread: of the plain logits over the vocabulary, the mean of the tokens' standard deviations.
        eps: of the coarsest type that took part.
        reason: what is known to be wrong with the packed forward, if anything.
    """

    packed: torch.Tensor
    plain: torch.Tensor
    spread: float
    eps: float
    reason: str | None


def check_packed_forward(model: nn.Module, collator: PreferenceCollator, examples: Sequence[dict[str, Any]]) -> float:
    """Compare log-probs of packed rows with the model's own forward of each conversation alone.

    The examples are packed as training packs them. For each conversation, a prompt with one of its answers, the model's
    own forward gets what the processor makes of it and computes with the attention that the model was loaded with.
    Where no example shows an image, two that do are compared as well, since images are what most families differ in.

    Args:
        model: with or without an adapter.
        collator: of the training.
        examples: of the training's first batch; the first three are compared.

    Returns:
        The mean absolute difference of a response token's log-prob, in nats.

    Raises:
        ValueError: the difference is beyond `tolerance`, or the packed forward or the model's own one fails.
    """
    base = base_model(model)
    enable_packed_forward(base)
    examples = list(examples[:NUM_EXAMPLES])
    figures = [_check(model, base, replace(collator, token_budget=None), examples)]
    if collator.image_token_id is not None and not any(map(_shows_an_image, examples)):
        examples = [_image_example(collator.responses, number) for number in range(2)]
        figures.append(_check(model, base, replace(collator, token_budget=None, max_length=None), examples))
    return max(figures)


def _check(model, base, collator, examples) -> float:
    with _evaluated(model):
        found = _compare(base, collator, examples)
    difference = (found.packed - found.plain).abs()
    mean, worst = difference.mean().item(), difference.max().item()
    most = tolerance(found.eps, found.spread)
    if mean <= most and worst <= TOKEN_FACTOR * most and found.reason is None:
        return mean
    reason = "" if found.reason is None else f", {found.reason}"
    raise ValueError(
        f"model: found {_names(base)}{reason}, whose log-probs on packed rows differ from its own forward's by "
        f"{mean:.2g} nats a token on average and {worst:.2g} at most, expected {most:.1g} and {TOKEN_FACTOR * most:.1g}; "
        "use a family that docs/models.md lists."
    )


def _compare(base: PreTrainedModel, collator: PreferenceCollator, examples: list[dict]) -> _Comparison:
    (sequence,) = collator(examples)["sequences"]
    sequence = sequence.to(base.device)
    reason = None
    with _failing_in_a_sentence(base, "forward on packed rows"):
        try:
            features = image_features(base, sequence.image_inputs) if sequence.image_inputs else None
            output = base(packing=sequence.packing, image_features=features, image_rows=sequence.image_rows)
            packed = output.token_logps
        except PackingNotSeenError as error:
            packed, reason = error.token_logps, error.reason
    recorder = _Recorder(collator.processor)
    alone = replace(collator, processor=recorder)
    rows, targets = [], []
    for example in examples:
        (sequence,) = alone([example])["sequences"]
        with _failing_in_a_sentence(base, "own forward"), unpacked_forward(base) as forward:
            for inputs, answer in _conversations(base, recorder.made, sequence.packing):
                logits = forward(**inputs, use_cache=False).logits[0, -len(answer) - 1 : -1]
                rows.append(logits)
                targets.append(answer)
    dtypes = {rows[0].dtype, base.get_input_embeddings().weight.dtype}
    logits = torch.cat(rows).float()
    logps = logits.log_softmax(-1).gather(1, torch.cat(targets)[:, None].to(logits.device))[:, 0]
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    return _Comparison(packed.to(logps), logps, logits.std(-1).mean().item(), eps, reason)


def _conversations(base: PreTrainedModel, made: BatchFeature, packing: Packing):
    """Inputs of the model's own forward for a prompt with each of its answers, and the answer's ids.

    Args:
        base: whose inputs they are.
        made: what the processor made of the prompt alone.
        packing: of that prompt and its answers.
    """
    images = image_inputs(made)
    real = made["attention_mask"][0].bool()
    prompt = {name: made[name][:, real] for name in made if name not in images and name != "labels"}
    answers = packing.input_ids[packing.prefix_lengths[0] :].split(packing.branch_lengths[0])
    for answer in answers:
        kind = torch.full_like(answer, ANSWER_TYPES.get(base.config.model_type, 0))
        goes_on = {"input_ids": answer, "attention_mask": torch.ones_like(answer)}
        text = {name: torch.cat([x[0], goes_on.get(name, kind).to(x)])[None] for name, x in prompt.items()}
        yield BatchFeature({**text, **images}).to(base.device, dtype=base.dtype), answer


@dataclass
class _Recorder:
    """A processor that remembers what it made last, before the collator takes what packed rows need."""

    processor: Any
    made: BatchFeature | None = None

    def __call__(self, *args, **kwargs) -> BatchFeature:
        self.made = self.processor(*args, **kwargs)
        return self.made

    def __getattr__(self, name):
        return getattr(self.processor, name)


def _names(base: PreTrainedModel) -> str:
    return f"{type(base).__name__} over {type(base.get_decoder()).__name__}"


@contextmanager
def _failing_in_a_sentence(base: PreTrainedModel, what: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        said = str(error).strip().splitlines() or [""]
        raise ValueError(
            f"model: found {_names(base)}, whose {what} fails ({type(error).__name__}: {said[0].rstrip('.')}), expected "
            "one that computes alike on packed rows and alone; use a family that docs/models.md lists."
        ) from error


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Without dropout or gradients, and with modes and random state as they were afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    device = base_model(model).device
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _shows_an_image(example: dict) -> bool:
    return bool(example.get("images") or example.get("image"))


def _image_example(responses: Sequence[str], number: int) -> dict[str, Any]:
    shown = Image.radial_gradient("L").resize((96 + 32 * number, 64)).convert("RGB")
    text = [{"type": "text", "text": "What is this?"}]
    answers = ["A light that fades." + " And more." * number, "A dark ring on white."]
    return {
        "images": [shown],
        "prompt": [{"role": "user", "content": [{"type": "image"}, *text]}],
        **{
            name: [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
            for name, answer in zip(responses, answers, strict=False)
        },
    }
