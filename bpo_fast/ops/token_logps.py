"""Log-probabilities of target tokens from logits that exist: `token_logps`, and `sequence_logps` for a pair of models.

float16, bfloat16 and float32 logits are computed in float32, float64 in float64; see `rows.py` for the formulas.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bpo_fast.ops.checks import (
    IGNORE_INDEX,
    check_indices,
    check_same,
    check_target_range,
    check_tensor,
    check_transform,
    describe,
)
from bpo_fast.ops.logit_rows import backward_rows, few_rows, forward_rows
from bpo_fast.ops.precision import precise
from bpo_fast.ops.rows import (
    TokenStatistics,
    accumulation_dtype,
    num_processors,
    records_gradient,
    runs_directly,
    runs_in_triton,
)


class Outputs(NamedTuple):
    """Outputs of the op, or their gradients, in the order of its schema. Those not asked for are empty."""

    token_logps: Tensor  # [1, S, T] of the policy, [2, S, T] with the reference's
    logps: Tensor  # [S], sums over tokens
    ref_logps: Tensor  # [S]
    num_tokens: Tensor  # int64 [S]
    statistics: Tensor  # [4, S, T] in the order of TokenStatistics
    row_numbers: Tensor  # [2, S, T], the policy's maximum and log s of each row


@torch.library.custom_op("bpo_fast::sequence_logps", mutates_args=())
def _sequence_logps(
    logits: Tensor,
    ref_logits: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    temperature: float,
    with_sums: bool,
    with_statistics: bool,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`Outputs` of logits and ref_logits [S, T, V] and targets [S, T]. Only the backward pass reads the last flag."""
    outputs = _forward(logits, ref_logits, targets, softcap, temperature, with_sums, with_statistics)
    return _as_tensors(outputs, logits, targets)


@_sequence_logps.register_fake
def _(logits, ref_logits, targets, softcap, temperature, with_sums, with_statistics, inplace_backward):
    return _as_tensors(_new_outputs(logits, ref_logits, targets, with_sums, with_statistics), logits, targets)


def _new_outputs(logits, ref_logits, targets, with_sums, with_statistics, with_row_numbers=True):
    """Memory for the `Outputs` that are asked for, None for the others."""
    num_sequences, num_tokens = targets.shape

    def empty(*shape):
        return logits.new_empty(shape, dtype=accumulation_dtype(logits.dtype))

    return Outputs(
        token_logps=empty(1 if ref_logits is None else 2, num_sequences, num_tokens),
        logps=empty(num_sequences) if with_sums else None,
        ref_logps=empty(num_sequences) if with_sums and ref_logits is not None else None,
        num_tokens=targets.new_empty(num_sequences) if with_sums else None,
        statistics=empty(4, num_sequences, num_tokens) if with_statistics else None,
        row_numbers=empty(2, num_sequences, num_tokens) if with_row_numbers else None,
    )


def _as_tensors(outputs, logits, targets):
    """The same for the op's schema, which knows no None: an empty tensor in its place."""

    def absent(name):
        return targets.new_empty(0) if name == "num_tokens" else logits.new_empty(0, dtype=outputs.token_logps.dtype)

    return Outputs(*(absent(name) if value is None else value for name, value in outputs._asdict().items()))


@precise
def _forward(logits, ref_logits, targets, softcap, temperature, with_sums, with_statistics, with_row_numbers=True):
    """The `Outputs` that are asked for, None for the others."""
    outputs = _new_outputs(logits, ref_logits, targets, with_sums, with_statistics, with_row_numbers)
    if runs_in_triton(logits) and targets.numel():
        from bpo_fast.kernels.sequence_logps import launch_sequence_logps

        with torch.cuda.device_of(logits):  # Triton launches on the current device
            launch_sequence_logps(
                _unit_stride(logits),
                None if ref_logits is None else _unit_stride(ref_logits),
                targets,
                token_logps=outputs.token_logps,
                row_numbers=outputs.row_numbers,
                policy_sums=outputs.logps,
                reference_sums=outputs.ref_logps,
                num_targets=outputs.num_tokens,
                statistics=outputs.statistics,
                softcap=softcap,
                temperature=temperature,
                num_processors=num_processors(logits),
            )
        return outputs
    check_target_range(targets, logits.shape[-1])
    for output in outputs:
        if output is not None:
            output.zero_()
    token_logps, options = outputs.token_logps, (targets, softcap, temperature)
    forward_rows(logits, *options, token_logps[0], outputs.row_numbers, outputs.statistics)
    if ref_logits is not None:
        forward_rows(ref_logits, *options, token_logps[1])
    if with_sums:
        torch.sum(token_logps[0], dim=1, out=outputs.logps)
        if ref_logits is not None:
            torch.sum(token_logps[1], dim=1, out=outputs.ref_logps)
        torch.sum(targets != IGNORE_INDEX, dim=1, out=outputs.num_tokens)
    return outputs


def _unit_stride(logits):
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def _fill_gradient(grad_tokens, grad_sums, logits, targets, row_numbers, softcap, temperature, grad_logits):
    if not targets.numel():
        return
    if runs_in_triton(logits):
        from bpo_fast.kernels.sequence_logps_backward import launch_sequence_logps_backward

        with torch.cuda.device_of(logits):
            launch_sequence_logps_backward(
                _unit_stride(logits),
                targets,
                row_numbers,
                grad_logits,
                grad_token_logps=grad_tokens,
                grad_sums=grad_sums,
                softcap=softcap,
                temperature=temperature,
            )
        return
    grad = torch.zeros_like(row_numbers[0])
    if grad_tokens is not None:
        grad += grad_tokens
    if grad_sums is not None:
        grad += grad_sums[:, None]
    backward_rows(grad, logits, targets, row_numbers, softcap, temperature, grad_logits)


@torch.library.custom_op("bpo_fast::sequence_logps_backward", mutates_args=())
def _sequence_logps_backward(
    grad_tokens: Tensor | None,
    grad_sums: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    row_numbers: Tensor,
    softcap: float | None,
    temperature: float,
) -> Tensor:
    """grad [S, T] of the policy's token log-probs and [S] of their sums -> gradient of the logits [S, T, V]."""
    # The kernel writes the rows that are ignored too; PyTorch's path leaves them as they are.
    make = torch.empty if runs_in_triton(logits) else torch.zeros
    grad_logits = make(logits.shape, dtype=logits.dtype, device=logits.device)
    _fill_gradient(grad_tokens, grad_sums, logits, targets, row_numbers, softcap, temperature, grad_logits)
    return grad_logits


@_sequence_logps_backward.register_fake
def _(grad_tokens, grad_sums, logits, targets, row_numbers, softcap, temperature):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.custom_op("bpo_fast::sequence_logps_backward_", mutates_args=("logits",))
def _sequence_logps_backward_(
    grad_tokens: Tensor | None,
    grad_sums: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    row_numbers: Tensor,
    softcap: float | None,
    temperature: float,
) -> None:
    """The same, written over the logits, whose vocabulary is contiguous."""
    if not runs_in_triton(logits):
        logits.masked_fill_((targets == IGNORE_INDEX)[..., None], 0)
    _fill_gradient(grad_tokens, grad_sums, logits, targets, row_numbers, softcap, temperature, logits)


def _setup_context(ctx, inputs, output):
    logits, _, targets, ctx.softcap, ctx.temperature, *_, ctx.inplace_backward = inputs
    ctx.num_constants = len(inputs) - 1
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, Outputs(*output).row_numbers)


def _backward(ctx, *grads):
    grads, constants = Outputs(*grads), [None] * ctx.num_constants
    if grads.token_logps is None and grads.logps is None:
        return None, *constants
    grad_tokens = None if grads.token_logps is None else grads.token_logps[0].contiguous()
    grad_sums = None if grads.logps is None or not grads.logps.numel() else grads.logps.contiguous()
    arguments = (grad_tokens, grad_sums, *ctx.saved_tensors, ctx.softcap, ctx.temperature)
    logits = ctx.saved_tensors[0]
    # Elements that share memory, as after expand(), cannot hold their gradients.
    own_memory = all(stride > 0 or size == 1 for size, stride in zip(logits.shape, logits.stride(), strict=True))
    if ctx.inplace_backward and logits.stride(-1) == 1 and own_memory:
        _sequence_logps_backward_(*arguments)
        return logits, *constants
    return _sequence_logps_backward(*arguments), *constants


_sequence_logps.register_autograd(_backward, setup_context=_setup_context)


class SequenceLogps(NamedTuple):
    """Log-probs of S sequences of T positions, float32 (float64 for float64 inputs), in nats.

    `token_logps` and `ref_token_logps` [S, T], 0 where ignored; their sums `logps` and `ref_logps` [S]; `num_tokens`
    int64 [S], how many targets are not ignored; `statistics` of the policy's tokens, each [S, T]. None where not asked
    for.
    """

    token_logps: Tensor
    logps: Tensor | None
    ref_token_logps: Tensor | None
    ref_logps: Tensor | None
    num_tokens: Tensor | None
    statistics: TokenStatistics | None


def sequence_logps(
    logits: Tensor,
    ref_logits: Tensor | None,
    targets: Tensor,
    *,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
    with_sums: bool = True,
    with_statistics: bool = False,
    inplace_backward: bool = False,
) -> SequenceLogps:
    """Token and sequence log-probs under a policy and, in the same launch, under a reference: `SequenceLogps`.

    `logits` and `ref_logits` (or None) are [S, T, V], `targets` int64 [S, T] with -100 where nothing is predicted; no
    shift. Differentiable in `logits`; the reference is a constant. `with_sums` asks for the sums and `num_tokens`; the
    other arguments are those of `token_logps`.
    """
    arguments = (
        logits,
        None if ref_logits is None else ref_logits.detach(),
        targets.contiguous(),
        None if logit_softcap is None else float(logit_softcap),
        float(temperature),
        with_sums,
        with_statistics,
    )
    if records_gradient(logits) or not runs_directly(logits, ref_logits, targets):
        found = Outputs(*_sequence_logps(*arguments, inplace_backward))
    else:
        found = _forward(*arguments, False)  # no row numbers
    return SequenceLogps(
        token_logps=found.token_logps[0],
        logps=found.logps if with_sums else None,
        ref_token_logps=None if ref_logits is None else found.token_logps[1],
        ref_logps=found.ref_logps if with_sums and ref_logits is not None else None,
        num_tokens=found.num_tokens if with_sums else None,
        statistics=TokenStatistics(*found.statistics.detach()) if with_statistics else None,
    )


def token_logps(
    logits: Tensor,
    targets: Tensor,
    *,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
    with_statistics: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, TokenStatistics]:
    """Log-probability of each target token, log softmax(logits)[target], without a copy of the logits.

    Args:
        logits: float16, bfloat16, float32 or float64, [..., V], on any device; any strides.
        targets: int64 or int32, [...], the token that each row of logits predicts (nothing is shifted here), in [0, V)
            or -100: such a row gives 0, has no gradient, and its logits are not read.
        logit_softcap: cap c of logits c * tanh(logits / c) (Gemma 2), or None.
        temperature: divides the logits, after the cap.
        with_statistics: return the tokens' `TokenStatistics` too, from the same pass.
        inplace_backward: let the backward pass write the gradient over the logits, which nothing else may then read.

    Returns:
        float32 [...] (float64 for float64 logits), in nats, differentiable in `logits`; with statistics, a tuple of it
        and a `TokenStatistics`. The backward pass writes the gradient in one pass into one buffer of the logits'
        dtype, with `inplace_backward` their own.

    Raises:
        TypeError: logits that are not floating point, targets that are not int32 or int64.
        ValueError: shapes or devices that do not fit, a cap or a temperature that is not positive, a target outside
            the vocabulary. Where a kernel runs, checking targets would mean waiting for them: on a CUDA device such a
            target gives NaN, and so does every element of its row's gradient (float64 is checked there too).

    Example:
        >>> token_logps(torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.tensor([0, -100]))
        tensor([-0.6931,  0.0000])
    """
    if logit_softcap is None and temperature == 1.0 and not with_statistics:  # noqa: SIM102
        if runs_directly(logits, targets) and not (records_gradient(logits) or runs_in_triton(logits)):
            logps = few_rows(logits, targets)
            if logps is not None:
                return logps
    check_tensor("logits", logits, ("...", "V"))
    check_indices("targets", targets, logits.shape[:-1])
    check_same("targets", targets, "logits", logits)
    check_transform(logit_softcap, temperature)
    if not logits.shape[-1]:
        raise ValueError(f"logits: found {describe(logits)}, expected [..., V] with V of at least 1.")
    rows = logits.reshape(1, -1, logits.shape[-1]) if logits.ndim != 3 else logits
    found = sequence_logps(
        rows,
        None,
        targets.reshape(rows.shape[:2]).to(torch.int64),
        logit_softcap=logit_softcap,
        temperature=temperature,
        with_sums=False,
        with_statistics=with_statistics,
        inplace_backward=inplace_backward,
    )
    logps = found.token_logps.reshape(targets.shape)
    if not with_statistics:
        return logps
    return logps, TokenStatistics(*(values.reshape(targets.shape) for values in found.statistics))
