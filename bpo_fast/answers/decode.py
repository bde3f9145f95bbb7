"""The decoding loop: prompts as embeddings in, token ids out, one forward pass of the model a token.

It does what `model.generate` does for one-dimensional positions and causal masks, without its overhead a token: the
cache grows in steps instead of being copied whole with every token, and a row whose answer has ended is dropped
instead of computed to the end of the longest one.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from bpo_fast.answers.sampling import Choice

# Tokens that a cache grows by.
ROOM = 16


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer in buffers with room for further tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._hold(key_states, value_states)
            return self.keys, self.values
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if end > self._buffers[0].shape[2]:
            self._hold(self.keys, self.values, end - start)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self._hold(self.keys[indices], self.values[indices])

    def _hold(self, keys, values, more=0):
        """Copy keys and values into new buffers with room behind them."""
        self._buffers = []
        for states in (keys, values):
            rows, heads, length, width = states.shape
            self._buffers.append(states.new_empty(rows, heads, length + more + ROOM, width))
            self._buffers[-1][:, :, :length] = states
        self.keys, self.values = (buffer[:, :, : keys.shape[2]] for buffer in self._buffers)


class Decoder:
    """A model that reads some rows' prompts, and then a token of each row at a time.

    Args:
        model: the transformers model.
        embeds: [B, L, H], prompts padded on the left.
        mask: bool [B, L], False where padded.

    Attributes:
        logits: [B, V], of the token after what each row has so far.
    """

    def __init__(self, model: PreTrainedModel, embeds: Tensor, mask: Tensor):
        self.model = model
        self._mask = mask
        self._positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        self._cache = Cache(layer_class_to_replicate=GrowingLayer)
        self._read(embeds)

    def _read(self, embeds):
        output = self.model(
            inputs_embeds=embeds,
            attention_mask=self._mask,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits = output.logits[:, -1]

    def append(self, tokens: Tensor) -> None:
        """Read one more token of each row, int64 [B]."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        self._positions = self._positions[:, -1:] + 1
        self._read(self.model.get_input_embeddings()(tokens)[:, None])

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, int64 [B']."""
        self._mask, self._positions = self._mask[rows], self._positions[rows]
        for layer in self._cache.layers:
            layer.batch_select_indices(rows)


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    embeds: Tensor,
    mask: Tensor,
    choose: Choice,
    ends: Collection[int],
    alone: Callable[[int, list[int]], Tensor],
) -> list[list[int]]:
    """Answers to R prompts.

    Args:
        model: the transformers model.
        embeds: [R, L, H], prompts padded on the left.
        mask: bool [R, L], False where padded.
        choose: of the R rows' tokens.
        ends: tokens that end an answer.
        alone: from a row and its answer so far, to the logits [V] of the next token that do not depend on the batch;
            asked where rounding could have chosen another token.

    Returns:
        The tokens of each answer, with that which ended it, if one did.
    """
    answers: list[list[int]] = [[] for _ in embeds]
    rows = torch.arange(len(embeds), device=embeds.device)
    live = rows.tolist()
    decoder = Decoder(model, embeds, mask)
    for place in range(choose.settings.max_new_tokens):
        tokens, sure = choose(decoder.logits, rows, place)
        found, certain = tokens.tolist(), sure.tolist()
        for n, row in enumerate(live):
            if row is not None and not certain[n]:
                logits = alone(row, answers[row])
                found[n] = int(choose(logits[None], rows[n : n + 1], place)[0])
                tokens[n] = found[n]
        for n, row in enumerate(live):
            if row is not None:
                answers[row].append(found[n])
                live[n] = None if found[n] in ends else row
        left = [n for n, row in enumerate(live) if row is not None]
        if not left or place + 1 == choose.settings.max_new_tokens:
            break
        # Half of them have ended, or the cache is about to grow.
        if 2 * len(left) <= len(live) or (len(left) < len(live) and place % ROOM == 0):
            kept = torch.tensor(left, device=rows.device)
            rows, tokens, live = rows[kept], tokens[kept], [live[n] for n in left]
            decoder.keep(kept)
        decoder.append(tokens)
    return answers
