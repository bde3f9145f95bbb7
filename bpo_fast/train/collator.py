"""Preference examples to packed sequences: prompts, images, groups."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from transformers import ProcessorMixin

from bpo_fast.data.images import upright_rgb
from bpo_fast.losses.preference import Batch
from bpo_fast.models.conversation import shorten
from bpo_fast.models.one_buffer import in_one_buffer, out_of_buffer, together
from bpo_fast.models.packing import Group, Packing, pack, plan_sequences
from bpo_fast.models.prompt import answer_ids, encode, image_inputs, prompt_ids, render
from bpo_fast.models.weakened_roots import Weakening, second_root
from bpo_fast.train.kept import FeatureCache, ReferenceCache, digest
from bpo_fast.train.loading import in_row

# Options of a chat template that are the renderer's own.
_RESERVED = ("conversation", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict")


@dataclass
class PackedSequence:
    """One packed sequence of a batch and the images that its prefixes show.

    Attributes:
        packing: its index tensors.
        image_inputs: the processor's image tensors (`pixel_values`, ...), empty without images.
        image_rows: int64 [M], the positions of its image tokens; with second roots [2M], those of the images as they
            are first.
        batch: the whole batch, of which this sequence holds some groups; means are over the batch.
        numbers: rows of its examples in the data set, where the examples say them; for messages.
        image_features: [M, H] of its images, where a cache keeps them; then there are no `image_inputs`.
        ref_token_logps: fp32 [N], the reference's log-probs, where a cache keeps them.
        token_weights: fp32 [N], factors of the tokens' log-probs, where an example has any.
        noise_ids: int64 [B], of the noise on each pair's images, where pairs have second roots.
        num_image_rows: image tokens of each pair's prompt, where pairs have second roots.
    """

    packing: Packing
    image_inputs: dict[str, torch.Tensor]
    image_rows: torch.Tensor
    batch: Batch
    numbers: tuple[int, ...] = ()
    image_features: torch.Tensor | None = None
    ref_token_logps: torch.Tensor | None = None
    token_weights: torch.Tensor | None = None
    noise_ids: torch.Tensor | None = None
    num_image_rows: tuple[int, ...] = ()

    def _tensors(self) -> list[torch.Tensor]:
        given = (x for name in _OPTIONAL if (x := getattr(self, name)) is not None)
        return [self.image_rows, *self.image_inputs.values(), *given, *self.packing.tensors()]

    def _with(self, tensors: Iterable) -> PackedSequence:
        rest = iter(tensors)
        return replace(
            self,
            image_rows=next(rest),
            image_inputs={name: next(rest) for name in self.image_inputs},
            **{name: next(rest) for name in _OPTIONAL if getattr(self, name) is not None},
            packing=self.packing.with_tensors(rest),
        )

    def __reduce__(self):
        # A worker process sends one buffer, with one file descriptor, and not a tensor after the other.
        buffer, places = in_one_buffer(self._tensors())
        return _received, (buffer, places, vars(self._with(range(len(places)))))

    def _map(self, function) -> PackedSequence:
        return self._with(together(self._tensors(), function))

    def to(self, device, non_blocking: bool = False) -> PackedSequence:
        """The same sequence with its tensors on `device`, copied there as one."""
        return self._map(lambda buffer: buffer.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedSequence:
        """The same sequence with its tensors in page-locked memory, as a data loader asks for."""
        return self._map(torch.Tensor.pin_memory)


# The tensors of a packed sequence that it may be without.
_OPTIONAL = ("image_features", "ref_token_logps", "token_weights", "noise_ids")


def _received(buffer, places, rest) -> PackedSequence:
    return PackedSequence(**rest)._with(out_of_buffer(buffer, places))


@dataclass
class PreferenceCollator:
    """Makes packed sequences of examples in TRL's vision preference columns.

    An example has `prompt`, `chosen` and, unless only the chosen answers are trained on, `rejected` as lists of chat
    messages or plain strings, and `images` (a list) or `image`. It may have `tools` (a list of schemas) and
    `chat_template_kwargs` (variables of the chat template), each also as JSON text. Tokens are those of TRL's
    DPOTrainer; see `models.prompt`. It may have `chosen_token_weights` and `rejected_token_weights`: a number of at
    least 0 for each token that `models.prompt.answer_ids` makes of the rendered response, its end token included.
    Where there are none (or None) every weight is 1; where the chosen answers alone are trained on they are not read.

    Args:
        processor: of the model; its tokenizer and chat template are used.
        image_token_id: id of the placeholder that an image feature replaces.
        max_length: most positions of prompt and response together; a longer response is cut at its end.
        token_budget: most tokens of one packed sequence; None packs the batch in one.
        responses: columns that become a group's branches, in this order.
        weakening: of the images of second roots, where a loss reads them; None for pairs of one group.
        features: what is kept of images, or None. Used for examples that say what they have `shown`; see `Examples`.
        references: what is kept of the reference, or None; used for the same.
    """

    processor: ProcessorMixin
    image_token_id: int | None
    max_length: int | None = None
    token_budget: int | None = None
    responses: Sequence[str] = ("chosen", "rejected")
    weakening: Weakening | None = None
    features: FeatureCache | None = None
    references: ReferenceCache | None = None

    def __call__(self, examples: list[dict]) -> dict[str, list[PackedSequence]]:
        """Collate a batch.

        Returns:
            {"sequences": [...]}: as many packed sequences as the token budget asks for.

        Raises:
            ValueError: an example that cannot be trained on: a column is missing or of the wrong form, the
                conversation cannot be rendered (see `models.prompt.render`), the prompt fills `max_length`, a response
                has no tokens, chosen and rejected have the same, weights are not one a token, or there is no image to
                weaken.
        """
        shown = [example.get("shown") for example in examples]
        is_kept = self.features is not None and None not in shown
        images = [] if is_kept else _row_by_row(example_images, examples)
        counts = [each.count for each in shown] if is_kept else map(len, images)
        rendered = _row_by_row(self.render, examples, counts)
        prompts = [prompt for prompt, _ in rendered]
        if is_kept:
            ids = [self.features.prompt_ids(*each) for each in zip(shown, prompts, strict=True)]
        else:
            encoded = encode(self.processor, prompts, images)
            ids = prompt_ids(encoded)
        pairs = _row_by_row(self._pair, examples, ids, rendered)
        batch = Batch(len(pairs), sum(len(pair.roots[0].branches[0]) for pair in pairs))
        plan = plan_sequences([sum(map(len, pair.roots)) for pair in pairs], self.token_budget)
        sequences = []
        for members in plan:
            here = [pairs[n] for n in members]
            packing = pack(_by_roots(pair.roots for pair in here))
            image_rows = torch.nonzero(packing.input_ids == self.image_token_id).flatten()
            numbers = tuple(examples[n]["number"] for n in members if "number" in examples[n])
            if not is_kept and len(plan) > 1:
                # Image tensors cannot be parted in general, so each sequence's images are processed by themselves.
                encoded = encode(self.processor, [prompts[n] for n in members], [images[n] for n in members])
            inputs = {} if is_kept else image_inputs(encoded)
            kept = self._kept([(shown[n], *rendered[n]) for n in members], here)
            others = _weights_of(here), *self._noise_of([rendered[n] for n in members], here)
            sequences.append(PackedSequence(packing, inputs, image_rows, batch, numbers, *kept, *others))
        return {"sequences": sequences}

    def _kept(self, members: list[tuple], pairs: list[_Pair]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What caches keep of a sequence's examples: image features [M, H], and the reference's log-probs [N]."""
        features, logps = [], []
        if any(shown is None for shown, *_ in members):
            return None, None
        if self.features is not None:
            features = [self.features.rows(shown) for shown, *_ in members if shown.count]
        if self.references is not None:
            logps = [self.references.token_logps(*each, self.max_length, self.weakening) for each in members]
        has_logps = bool(logps) and all(each is not None for each in logps)
        if has_logps:
            logps = _by_roots(each.split(pair.root_tokens) for each, pair in zip(logps, pairs, strict=True))
        return torch.cat(features) if features else None, torch.cat(logps) if has_logps else None

    def _noise_of(
        self, rendered: list[tuple[str, list[str]]], pairs: list[_Pair]
    ) -> tuple[torch.Tensor | None, tuple[int, ...]]:
        """Noise ids int64 [B], which go by the text of a pair's second root, and its number of image tokens."""
        if self.weakening is None:
            return None, ()
        noise_ids = [int(digest(prompt, answers[0])[:15], 16) for prompt, answers in rendered]
        num_rows = (list(pair.roots[0].prefix).count(self.image_token_id) for pair in pairs)
        return torch.tensor(noise_ids), tuple(num_rows)

    def render(self, example: dict, num_images: int) -> tuple[str, list[str]]:
        """The text of an example's prompt, which shows so many images, and of its responses."""
        for name in ("prompt", *self.responses):
            if example.get(name) is None:
                raise ValueError(f"example: found no '{name}', expected prompt, {', '.join(self.responses)}.")
        answers = [example[name] for name in self.responses]
        options = _template_options(example)
        return render(self.processor, example["prompt"], answers, num_images=num_images, template_options=options)

    def _pair(self, example: dict, prompt_ids: list[int], rendered: tuple[str, list[str]]) -> _Pair:
        prompt, answers = rendered
        if self.weakening is not None and self.image_token_id not in prompt_ids:
            raise ValueError(
                f"images: found none in the prompt {shorten(prompt)}, expected at least one, which the loss weakens; "
                "drop the example."
            )
        whole = [self._answer_ids(prompt_ids, prompt, answer) for answer in answers]
        room = None if self.max_length is None else self.max_length - len(prompt_ids)
        branches = [ids[:room] for ids in whole]
        if len(branches) == 2 and branches[0] == branches[1]:
            raise ValueError(
                f"chosen and rejected: found the same {len(branches[0])} tokens {shorten(answers[0])} for both, "
                "expected a preference; drop the example, or raise max_length if it cut the difference off."
            )
        group = Group(prompt_ids, branches)
        roots = (group,) if self.weakening is None else (group, second_root(group))
        given = [f"{name}_token_weights" for name in self.responses]
        if len(given) == 1 or all(example.get(name) is None for name in given):
            return _Pair(roots)
        weights = [_token_weights(name, example.get(name), ids)[:room] for name, ids in zip(given, whole, strict=True)]
        return _Pair(roots, weights)

    def _answer_ids(self, prompt_ids: list[int], prompt: str, answer: str) -> list[int]:
        if self.max_length is not None and len(prompt_ids) >= self.max_length:
            raise ValueError(
                f"max_length: found {self.max_length}, expected more than the {len(prompt_ids)} tokens of the prompt "
                f"{shorten(prompt)} with its image; raise max_length or drop the example."
            )
        ids = answer_ids(self.processor, answer)
        if not ids:
            raise ValueError(
                f"response: found no tokens after the prompt {shorten(prompt)}, expected an answer; drop the example."
            )
        return ids


@dataclass(frozen=True)
class _Pair:
    """The groups of an example, and the weights of its responses' tokens, if it has any."""

    roots: tuple[Group, ...]
    weights: list[list[float]] | None = None

    @property
    def root_tokens(self) -> list[int]:
        return [sum(map(len, root.branches)) for root in self.roots]


def _by_roots(parts: Iterable[Sequence]) -> list:
    """What each pair has of its roots, in the order that they are packed in: all first roots, then all second."""
    return [each for of_root in zip(*parts, strict=True) for each in of_root]


def _weights_of(pairs: list[_Pair]) -> torch.Tensor | None:
    """fp32 [N] of the tokens of a packed sequence; None where no pair has any."""
    if all(pair.weights is None for pair in pairs):
        return None

    def of_roots(pair):
        weights = pair.weights or [[1.0] * len(branch) for branch in pair.roots[0].branches]
        return [[x for branch in weights[: len(root.branches)] for x in branch] for root in pair.roots]

    return torch.tensor([x for part in _by_roots(map(of_roots, pairs)) for x in part])


def _token_weights(name: str, values: Any, ids: list[int]) -> list[float]:
    """The weights of a response's tokens, checked; 1 where none are given."""
    if values is None:
        return [1.0] * len(ids)
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list | tuple) or len(values) != len(ids):
        found = f"{len(values)} weights" if isinstance(values, list | tuple) else shorten(values)
        raise ValueError(
            f"{name}: found {found}, expected {len(ids)}, one for each token of the response, its end token included."
        )
    for value in values:
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{name}: found {value!r}, expected finite numbers of at least 0.")
    return [float(value) for value in values]


def _row_by_row(function, examples: list[dict], *others) -> list:
    """What the function makes of each example; whatever fails says which row it was, where the examples say it."""
    found = []
    for example, *values in zip(examples, *others, strict=True):
        with in_row(example.get("number")):
            found.append(function(example, *values))
    return found


def example_images(example: dict) -> list[Image.Image]:
    """The images of an example, as the model sees them."""
    if "images" not in example and "image" not in example:
        raise ValueError("example: found no 'images', expected a list of images.")
    images = example["images"] if "images" in example else example["image"]
    if images is None:
        return []
    images = list(images) if isinstance(images, list | tuple) else [images]
    for image in images:
        if not isinstance(image, Image.Image):
            raise ValueError(f"images: found {shorten(image)}, expected decoded images; see bpo_fast.data.read_image.")
    return list(map(upright_rgb, images))


def _template_options(example: dict) -> dict[str, Any]:
    """`tools` and `chat_template_kwargs` as keywords of the chat template, as TRL's DPOTrainer reads them."""
    tools = _json("tools", example.get("tools"), list)
    options = _json("chat_template_kwargs", example.get("chat_template_kwargs"), dict) or {}
    for name in _RESERVED:
        if name in options:
            raise ValueError(f"chat_template_kwargs: found '{name}', expected variables of the chat template alone.")
    return ({"tools": tools} if tools else {}) | options


def _json(name: str, value: Any, kind: type) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"{name}: found {shorten(value)}, expected a {kind.__name__} or its JSON text.") from None
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{name}: found {shorten(value)}, expected a {kind.__name__} or its JSON text.")
    return _without_none(value)


def _without_none(value: Any) -> Any:
    """Without the keys that an Arrow schema added: it gives every row those of all rows, with None."""
    if isinstance(value, dict):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return list(map(_without_none, value)) if isinstance(value, list) else value
