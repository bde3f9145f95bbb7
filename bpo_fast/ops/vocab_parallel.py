"""Token log-probs where each process holds a part of the head: the vocabulary of a tensor-parallel model.

With l_i the log-sum-exp of the logits of process i and x_y the target's logit, which one of them has,

    log p_y = x_y - log sum_i exp(l_i),    d log p_y / d l_i = -exp(l_i - log sum_i exp(l_i)),

so two numbers per token are exchanged forward, and a gradient of the hidden states backward. Where the tokens are
split instead (sequence parallel), each process calls `linear_token_logps` on its own, and sums are added up.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from bpo_fast.ops.checks import IGNORE_INDEX, check_indices, check_same, check_tensor, check_transform
from bpo_fast.ops.head_products import target_logits
from bpo_fast.ops.linear_token_logps import check_head, linear_logsumexp
from bpo_fast.ops.rows import final_logits


class _SumGradients(torch.autograd.Function):
    """The identity on a tensor that all processes hold, whose gradients of their own parts add up."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Merge(torch.autograd.Function):
    """log p of each token from each process's log-sum-exp, and its target logit where `here`."""

    @staticmethod
    def forward(ctx, logsumexp, target_logit, here, group):
        largest = logsumexp.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        sums = torch.stack([(logsumexp - largest).exp(), target_logit * here, here])
        dist.all_reduce(sums, group=group)
        # As in the kernels: maximum and log of the sum are never added.
        log_sum = torch.where(sums[2] == 1, sums[0].log(), float("nan"))
        ctx.save_for_backward((logsumexp - largest - log_sum).exp(), here)
        return sums[1] - largest - log_sum

    @staticmethod
    def backward(ctx, grad):
        share, here = ctx.saved_tensors
        return -grad * share, grad * here, None, None


def vocab_parallel_token_logps(
    hidden: Tensor,
    weight_shard: Tensor,
    targets: Tensor,
    *,
    vocab_start: int,
    group: "dist.ProcessGroup | None" = None,
    bias_shard: Tensor | None = None,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """`linear_token_logps` over a head whose rows are spread over the processes of `group`; a collective call.

    Args:
        hidden: [..., H], the same on every process.
        weight_shard: [V_i, H], rows vocab_start .. vocab_start + V_i - 1 of the head; sizes may differ.
        targets: int64 or int32 [...], ids in the whole vocabulary, the same on every process; -100 = ignored.
        vocab_start: the first row that this process holds.
        group: the processes that share the head; by default all.
        bias_shard: [V_i] or None.
        logit_softcap: as in `linear_token_logps`.
        temperature: as in `linear_token_logps`.

    Returns:
        float32 [...] (float64 for float64 inputs), the same on every process, differentiable: the gradient of hidden
        is added up over the processes, those of weight_shard and bias_shard are each process's own.

    Raises:
        TypeError, ValueError: as `linear_token_logps`. A target that no process holds gives NaN, and so does its
            gradient.

    Example:
        ```python
        # torchrun --nproc-per-node 2: each process holds half of the head
        half = len(head) // 2
        shard = head[rank * half : (rank + 1) * half]
        logps = vocab_parallel_token_logps(hidden, shard, targets, vocab_start=rank * half)
        ```
    """
    check_tensor("hidden", hidden, ("...", "H"))
    check_indices("targets", targets, hidden.shape[:-1])
    check_same("targets", targets, "hidden", hidden)
    check_head(
        "hidden", hidden, weight=("weight_shard", weight_shard), bias=("bias_shard", bias_shard), lora=("lora", None)
    )
    check_transform(logit_softcap, temperature)
    flat = targets.reshape(-1).to(torch.int64)
    kept = (flat != IGNORE_INDEX).nonzero().squeeze(1)
    rows = _SumGradients.apply(hidden.reshape(-1, hidden.shape[-1])[kept], group)
    transform = {"logit_softcap": logit_softcap, "temperature": temperature}
    logsumexp = linear_logsumexp(rows, weight_shard, bias=bias_shard, **transform)
    local = flat[kept] - vocab_start
    here = (local >= 0) & (local < len(weight_shard))
    logit = target_logits(rows, weight_shard, local.clamp(0, len(weight_shard) - 1), bias_shard)
    logit = final_logits(logit, logit_softcap, temperature)
    merged = _Merge.apply(logsumexp, logit, here.to(logit.dtype), group)
    return merged.new_zeros(flat.shape).index_copy(0, kept, merged).view(targets.shape)
