"""gather_rows: rows of a tensor by index, with a gradient that is summed in a fixed order."""

from collections.abc import Sequence

import torch
from torch import Tensor


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, *rounds):
        ctx.num_rows = x.shape[0]
        ctx.save_for_backward(index, *rounds)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        index, *rounds = ctx.saved_tensors
        total = grad.new_zeros((ctx.num_rows, *grad.shape[1:]))
        for positions in rounds:
            total.index_add_(0, index[positions], grad[positions])
        return total, None, *(None for _ in rounds)


def gather_rows(x: Tensor, index: Tensor, rounds: Sequence[Tensor]) -> Tensor:
    """x[index], with a gradient that is bitwise repeatable on a GPU too.

    Where a row was gathered more than once, `index_select` adds its gradients by atomics, in any order. Here they are
    added round after round, and within a round no row occurs twice.

    Args:
        x: [S, ...], floating point.
        index: int64 [N], rows of x.
        rounds: int64 tensors that partition 0..N-1, so that `index` has no value twice within one of them.

    Returns:
        [N, ...].

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> gather_rows(x, torch.tensor([0, 1, 0]), [torch.tensor([0, 1]), torch.tensor([2])]).sum().backward()
        >>> x.grad
        tensor([2., 1.])
    """
    return _GatherRows.apply(x, index, *rounds)
