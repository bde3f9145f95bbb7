"""Answers by `model.generate` itself, and the check that says which models need it.

The loop of `answers.decode` reads embeddings, one-dimensional positions and causal masks. A model that needs more is
found by a trial, whatever it is called, and answers through its own `generate`.
"""

from collections.abc import Collection
from contextlib import nullcontext
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from bpo_fast.answers.decode import Decoder
from bpo_fast.answers.prompts import Prompts
from bpo_fast.answers.sampling import Choice
from bpo_fast.models.load import base_model
from bpo_fast.models.rounding import eps_of, tolerance
from bpo_fast.models.weaken import is_weakened
from bpo_fast.models.weakened_features import as_one_sample

# Of models that have been tried, by whether their prompts showed images.
_ALIKE: WeakKeyDictionary[nn.Module, dict[bool, bool]] = WeakKeyDictionary()


def decodes_alike(prompts: Prompts) -> bool:
    """Whether `answers.decode` computes what the model's own forward does, for prompts of this kind.

    Within a block of `weaken` it is not asked: images there have noise that only the batch as a whole has.
    """
    if is_weakened():
        return False
    base, with_images = base_model(prompts.model), bool(prompts.images[0])
    known = _ALIKE.setdefault(base, {})
    if with_images not in known:
        try:
            known[with_images] = _alike(base, prompts.trial())
        except torch.OutOfMemoryError:
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            known[with_images] = False
    return known[with_images]


@torch.no_grad()
def _alike(base, trial) -> bool:
    """The first token's logits against the model's own, and those of tokens read one by one against all at once."""
    inputs = trial.inputs([0, 1])
    own = base(**inputs, use_cache=False).logits[:, -1]
    embeds, mask = trial.embed([0, 1])
    decoder = Decoder(base, embeds, mask)
    pairs = [(own, decoder.logits)]
    more = inputs["input_ids"][:, -3:]
    for tokens in more.unbind(1):
        decoder.append(tokens)
    longer = torch.cat([embeds, base.get_input_embeddings()(more)], dim=1)
    whole = Decoder(base, longer, torch.cat([mask, mask.new_ones(more.shape)], dim=1))
    return all(equal_logits(*pair) for pair in [*pairs, (whole.logits, decoder.logits)])


def equal_logits(first: Tensor, second: Tensor) -> bool:
    """Whether only rounding parts two tensors of logits [..., V]."""
    # Entries that a model masks out of its vocabulary are no measure of rounding.
    logps = [logits.float().log_softmax(-1).clamp(min=-50) for logits in (first, second)]
    most = tolerance(eps_of(first.dtype, first.device), logps[0].std(-1).mean().item())
    return (logps[0] - logps[1]).abs().mean().item() <= most


@torch.no_grad()
def next_logits(prompts: Prompts, row: int, answer: list[int] = ()) -> Tensor:
    """Logits [V] of the token after what a row's answer has so far, computed from that row alone."""
    base = base_model(prompts.model)
    if not decodes_alike(prompts):
        number = row // prompts.levels
        with _seen(prompts, row):
            return base(**prompts.inputs([number]), use_cache=False).logits[0, -1]
    embeds, mask = prompts.embed([row])
    if answer:
        more = torch.tensor([answer], device=embeds.device)
        embeds = torch.cat([embeds, base.get_input_embeddings()(more)], dim=1)
        mask = torch.cat([mask, mask.new_ones(more.shape)], dim=1)
    return Decoder(base, embeds, mask).logits[0]


def decode_plainly(prompts: Prompts, choose: Choice, ends: Collection[int]) -> list[list[int]]:
    """Answers as `decode` gives them; rows with noise one by one, since a batch may mix the maps of its images."""
    if prompts.noise is None:
        return _generate(prompts, list(range(len(prompts))), choose, ends)
    answers = []
    for row in range(len(prompts)):
        with _seen(prompts, row):
            answers += _generate(prompts, [row], choose, ends)
    return answers


def _seen(prompts, row):
    noise = prompts.noise
    return nullcontext() if noise is None else as_one_sample(prompts.model, noise, prompts.copy_of(row))


def _generate(prompts, rows, choose, ends):
    inputs = prompts.inputs([row // prompts.levels for row in rows])
    sequences = prompts.model.generate(
        **inputs,
        # What a checkpoint says of sampling does not count.
        **{"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None},
        max_new_tokens=choose.settings.max_new_tokens,
        logits_processor=LogitsProcessorList([_Chosen(choose, rows)]),
        pad_token_id=prompts.processor.tokenizer.pad_token_id,
    )
    answers = sequences[:, inputs["input_ids"].shape[1] :].tolist()
    return [answer[: next((n for n, token in enumerate(answer, 1) if token in ends), None)] for answer in answers]


class _Chosen(LogitsProcessor):
    """Makes the token that `Choice` chooses the likeliest."""

    def __init__(self, choose, rows):
        self._choose, self._rows, self._place = choose, rows, 0

    def __call__(self, input_ids, scores):
        tokens, _ = self._choose(scores, torch.tensor(self._rows, device=scores.device), self._place)
        self._place += 1
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)
