"""A model's own forward of each conversation by itself, whose log-probs packed sequences must have.

The packed forward reads one-dimensional positions, causal masks and one list of image features. A model that needs
more would be trained and scored wrongly without a word; no model is known by its name here, each is compared.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from transformers import BatchFeature, PreTrainedModel

from bpo_fast.models.families import ANSWER_TYPES
from bpo_fast.models.packed_forward import PackingNotSeenError, unpacked_forward
from bpo_fast.models.packing import Packing
from bpo_fast.models.prompt import image_inputs
from bpo_fast.models.rounding import eps_of, tolerance


class OwnLogps(NamedTuple):
    """What a model's own forward makes of the answers to one prompt.

    Attributes:
        logps: fp32 [N], of their tokens.
        spreads: fp32 [N], standard deviation of the log-probs over the vocabulary.
        dtype: the coarsest that took part.
    """

    logps: torch.Tensor
    spreads: torch.Tensor
    dtype: torch.dtype


def own_logps(base: PreTrainedModel, made: BatchFeature, packing: Packing) -> OwnLogps:
    """Log-probs by the model's own forward of a prompt with each of its answers, one after the other.

    It computes with the attention that the model was loaded with.

    Args:
        base: the model, with `enable_packed_forward`.
        made: what the processor made of the prompt alone.
        packing: of that prompt and its answers, on the CPU.

    Raises:
        ValueError: it fails.
    """
    found, spreads = [], []
    with failing_in_a_sentence(base, "own forward"), unpacked_forward(base) as forward:
        for inputs, answer in _conversations(base, made, packing):
            logits = forward(**inputs, use_cache=False).logits[0, -len(answer) - 1 : -1]
            logps = logits.float().log_softmax(-1)
            found.append(logps.gather(1, answer[:, None].to(logps.device))[:, 0])
            # Entries that a model masks out of its vocabulary are no measure of rounding.
            spreads.append(logps.clamp(min=-50).std(-1))
    dtypes = (logits.dtype, base.get_input_embeddings().weight.dtype)
    return OwnLogps(torch.cat(found), torch.cat(spreads), max(dtypes, key=lambda dtype: torch.finfo(dtype).eps))


def _conversations(base, made, packing):
    """Inputs of the model's own forward for a prompt with each of its answers, and the answer's ids."""
    images = image_inputs(made)
    real = made["attention_mask"][0].bool()
    prompt = {name: made[name][:, real] for name in made if name not in images and name != "labels"}
    answers = packing.input_ids[packing.prefix_lengths[0] :].split(packing.branch_lengths[0])
    for answer in answers:
        kind = torch.full_like(answer, ANSWER_TYPES.get(base.config.model_type, 0))
        goes_on = {"input_ids": answer, "attention_mask": torch.ones_like(answer)}
        text = {name: torch.cat([x[0], goes_on.get(name, kind).to(x)])[None] for name, x in prompt.items()}
        yield BatchFeature({**text, **images}).to(base.device, dtype=base.dtype), answer


def check_alike(base: PreTrainedModel, packed: torch.Tensor, own: Sequence[OwnLogps], reason: str | None) -> float:
    """Refuse a model whose packed sequences have other log-probs than its own forward gives.

    Args:
        base: the model.
        packed: fp32 [N], of the packed forward.
        own: of the same answers in the same order.
        reason: what is known to be wrong with the packed forward, or None.

    Returns:
        The mean absolute difference, in nats.

    Raises:
        ValueError: it is beyond `tolerance`, or there is a reason.
    """
    difference = (packed - torch.cat([each.logps for each in own])).abs()
    spread = torch.cat([each.spreads for each in own]).mean().item()
    dtype = own[-1].dtype
    mean, most = difference.mean().item(), tolerance(eps_of(dtype, base.device), spread)
    if mean <= most and reason is None:
        return mean
    raise ValueError(
        f"model: found {_names(base)}, {f'{reason}, and ' if reason else ''}whose log-probs on packed sequences "
        f"differ from its own forward's by {mean:.2g} nats a token on average ({difference.max().item():.2g} at "
        f"most), expected at most {most:.1g} in {str(dtype).removeprefix('torch.')}; use a family that docs/models.md "
        "lists."
    )


def convolutions(decoder: nn.Module) -> str | None:
    """Convolutions over tokens run from one response into the next, as the states do that mostly stand behind them."""
    found = any(isinstance(part, nn.Conv1d) and part.kernel_size != (1,) for part in decoder.modules())
    return "whose layers have convolutions over tokens" if found else None


@contextmanager
def failing_in_a_sentence(base: PreTrainedModel, what: str) -> Iterator[None]:
    """One sentence for whatever a model's forward raises.

    Args:
        base: the model.
        what: its forward's name.
    """
    try:
        yield
    except (torch.OutOfMemoryError, PackingNotSeenError):
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        said = str(error).strip().splitlines() or [""]
        raise ValueError(
            f"model: found {_names(base)}, whose {what} fails ({type(error).__name__}: {said[0].rstrip('.')}), "
            "expected one that computes alike on packed sequences and alone; use a family that docs/models.md lists."
        ) from error


def _names(base: PreTrainedModel) -> str:
    return f"{type(base).__name__} over {type(base.get_decoder()).__name__}"
