"""Log-probs of given answers: K answers to one prompt are K branches of one packed sequence.

The image is seen once, prompt and image are decoded once, and only the answers' rows meet the head. An answer is
scored as it is trained on: what the chat template makes of it, its end token included (one that was cut at
max_new_tokens as well).

`score_answers` is what log-probs that are kept are made by: a prompt has a forward of its own, so that their bits
depend on no other sample. `score_batch` packs several prompts, which differs from it by rounding. `check_scoring` says
beforehand of a model whether packed sequences give it the log-probs of its own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from PIL import Image
from torch import nn
from transformers import ProcessorMixin

from bpo_fast.answers.prompts import trial_images
from bpo_fast.models.conversation import Messages
from bpo_fast.models.load import base_model
from bpo_fast.models.own_forward import check_alike, convolutions, failing_in_a_sentence, own_logps
from bpo_fast.models.packed_forward import enable_packed_forward, image_features, sum_branches
from bpo_fast.models.packing import Group, Packing, pack, plan_sequences
from bpo_fast.models.prompt import answer_ids, encode, image_inputs, prompt_ids, render

# Answers to the trial image, of other lengths than each other.
_TRIAL = ("Grains of every colour.", "A field of noise, without any shape in it.")


class Score(NamedTuple):
    """What a model makes of one answer.

    Attributes:
        logp: log-prob of the whole answer, in nats.
        num_tokens: its tokens.
    """

    logp: float
    num_tokens: int

    @property
    def mean(self) -> float:
        """Log-prob a token: the length-normalised one."""
        return self.logp / self.num_tokens


def score_answers(
    model: nn.Module, processor: ProcessorMixin, image: Image.Image, prompt: str | Messages, answers: Sequence[str]
) -> list[Score]:
    """Score K answers to one prompt, in a forward of their own.

    Args:
        model: with or without an adapter, in evaluation mode; the packed forward is switched on if it was not.
        processor: its processor.
        image: what the prompt shows.
        prompt: messages, such as `Annotation.prompt`, or one question.
        answers: K texts.

    Returns:
        K scores: the same bits whatever else is scored, but for the other answers of the prompt.

    Raises:
        ValueError: an empty answer or one with an image's placeholder (see `models.prompt.render`), or a decoder that
            packed sequences cannot be computed with.

    Example:

        chosen, rejected = score_answers(model, processor, image, sample.prompt, [sample.answer, response.text])
        gap = chosen.mean - rejected.mean
    """
    return score_batch(model, processor, [image], [prompt], [answers])[0]


@torch.no_grad()
def score_batch(
    model: nn.Module,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    prompts: Sequence[str | Messages],
    answers: Sequence[Sequence[str]],
    *,
    token_budget: int | None = None,
) -> list[list[Score]]:
    """Score the answers to several prompts, whose images are seen as one batch and whose tokens share forwards.

    Args:
        model, processor: as for `score_answers`.
        images: G images.
        prompts: G prompts with one image each.
        answers: G lists of texts.
        token_budget: most tokens of one forward; a prompt with more has one for itself. None takes all in one.
    """
    rendered = [render(processor, prompt, texts) for prompt, texts in zip(prompts, answers, strict=True)]
    prefixes, branches = zip(*rendered, strict=True)
    found: dict[int, list[Score]] = {}
    for members, packing, token_logps in _forwards(model, processor, images, prefixes, branches, token_budget):
        scores = map(Score, sum_branches(token_logps, packing).tolist(), packing.num_tokens.tolist())
        for number in members:
            found[number] = [next(scores) for _ in answers[number]]
    return [found[number] for number in range(len(prompts))]


@torch.no_grad()
def score_branches(
    model: nn.Module,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    prefixes: Sequence[str],
    branches: Sequence[Sequence[str]],
) -> torch.Tensor:
    """Log-probs of K continuations of each rendered text, words in the middle of an answer among them.

    Args:
        model, processor: as for `score_answers`.
        images: G images.
        prefixes: G texts with one image placeholder each, as `models.prompt.render` gives them.
        branches: G lists of K texts, each with the space that parts it from its prefix.

    Returns:
        fp32 [G, K], in nats.
    """
    ((_, packing, token_logps),) = _forwards(model, processor, images, prefixes, branches, None)
    return sum_branches(token_logps, packing).view(len(prefixes), -1)


@torch.no_grad()
def check_scoring(model: nn.Module, processor: ProcessorMixin) -> None:
    """Refuse a model whose packed sequences give answers other log-probs than its own forward does, on a trial image.

    Args:
        model, processor: as for `score_answers`.

    Raises:
        ValueError: they do, or a forward fails.
    """
    base, image = base_model(model), trial_images()[0]
    prefix, branches = render(processor, "What is this?", list(_TRIAL))
    made = encode(processor, [prefix], [[image]])
    with failing_in_a_sentence(base, "forward on packed sequences"):
        ((_, packing, token_logps),) = _forwards(model, processor, [image], [prefix], [branches], None)
    own = own_logps(base, made, packing.to("cpu"))
    check_alike(base, token_logps, [own], convolutions(base.get_decoder()))


def _forwards(
    model, processor, images, prefixes, branches, token_budget
) -> list[tuple[list[int], Packing, torch.Tensor]]:
    """Of each forward the numbers of its prompts, its packing, and the log-probs fp32 [N] of their answers' tokens."""
    base = base_model(model)
    if not hasattr(base, "_unpacked_forward"):
        enable_packed_forward(base)
    batch = encode(processor, prefixes, [[image] for image in images])
    groups = [
        Group(ids, [answer_ids(processor, text) for text in texts])
        for ids, texts in zip(prompt_ids(batch), branches, strict=True)
    ]
    image_token = base.config.image_token_id
    ends = list(accumulate(group.prefix.count(image_token) for group in groups))
    # Where features are more or fewer than image tokens, the last prompt's forward says so.
    features = image_features(model, image_inputs(batch.to(base.device, dtype=base.dtype))).tensor_split(ends[:-1])
    lengths = list(map(len, groups))
    if token_budget is not None:
        token_budget = max(token_budget, *lengths)
    found = []
    for members in plan_sequences(lengths, token_budget):
        packing = pack([groups[number] for number in members])
        rows = torch.nonzero(packing.input_ids == image_token).flatten().to(base.device)
        packing = packing.to(base.device)
        shown = torch.cat([features[number] for number in members])
        output = model(packing=packing, image_features=shown, image_rows=rows)
        found.append((members, packing, output.token_logps))
    return found
