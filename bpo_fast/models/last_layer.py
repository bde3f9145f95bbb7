"""The last layer computes for the rows that somebody reads.

Behind it only the response rows meet the head (`Packing.logit_rows`), while an image and its question are most of a
packed sequence. Keys and values are needed of every position, all the rest of the layer only of `Packing.tail_rows`:
there the attention gets no other queries and the MLP no other rows, forward and backward, and what would come of the
others is 0 in their place. Nothing that is read changes: attention and MLP work row by row of the queries.
"""

from __future__ import annotations

from torch import Tensor, nn

from bpo_fast.models.packing import Packing

_MARK = "_last_layer"


class LastLayer:
    """What the attention of a last layer was called with, for the MLP behind it, which is given rows alone.

    It comes by way of the attention, whose arguments are the same when the layer is computed again in a backward pass,
    where neither the layer's own hooks nor its decoder are called.

    Attributes:
        packing: of the call that runs; None before its attention, without a packing, and behind the MLP.
    """

    packing: Packing | None = None

    def forget(self, *_) -> None:
        """A new call of the layer: an MLP that comes before the attention computes for all rows."""
        self.packing = None

    def tail(self, _, args):
        """What the MLP is given."""
        if self.packing is None:
            return None
        x, *others = args
        return x.index_select(1, self.packing.tail_rows), *others

    def whole(self, _, args, output):
        """What the MLP's caller gets."""
        packing, self.packing = self.packing, None
        if packing is None:
            return None
        length = len(packing.input_ids)
        if isinstance(output, Tensor):
            return in_place_of_all(output, packing.tail_rows, length)
        return in_place_of_all(output[0], packing.tail_rows, length), *output[1:]  # with a router's logits


def cut_last_layer(decoder: nn.Module) -> None:
    """Let a decoder's last layer compute for the tail rows of a packing that its attention is called with.

    A layer without a part called `mlp` has its attention cut alone; a decoder whose layers are not in `layers` stays
    as it is.

    Args:
        decoder: of a transformers model, before or after an adapter was put on its modules.
    """
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers) or hasattr(layers[-1], _MARK):
        return
    last = LastLayer()
    for module in layers[-1].modules():
        setattr(module, _MARK, last)
    layers[-1].register_forward_pre_hook(last.forget)
    if isinstance(mlp := getattr(layers[-1], "mlp", None), nn.Module):
        mlp.register_forward_pre_hook(last.tail)
        mlp.register_forward_hook(last.whole)


def last_layer_of(module: nn.Module) -> LastLayer | None:
    """The `LastLayer` that a module is a part of, or None."""
    return getattr(module, _MARK, None)


def in_place_of_all(rows: Tensor, index: Tensor, length: int) -> Tensor:
    """Rows [1, T, ...] at their places among `length`, the others 0: [1, length, ...].

    Example:
        >>> import torch
        >>> in_place_of_all(torch.tensor([[2.0, 3.0]]), torch.tensor([1, 2]), 4)
        tensor([[0., 2., 3., 0.]])
    """
    return rows.new_zeros(rows.shape[0], length, *rows.shape[2:]).index_copy(1, index, rows)
