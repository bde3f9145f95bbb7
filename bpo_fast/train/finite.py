"""Stops a run at the first loss or gradient that is not finite, before a checkpoint can hold what came of it."""

from collections.abc import Sequence

import torch


class FiniteGuard:
    """Watches the losses and the gradient norm of each update step.

    On a CPU a step is judged before its update. On a device the verdict is copied to the host without waiting and read
    one step later, or before anything is saved: a step costs no synchronisation, and no checkpoint is ever written
    after a step that failed.
    """

    def __init__(self):
        self._losses: list[tuple[Sequence[int], torch.Tensor]] = []
        self._waiting = None

    def add_loss(self, numbers: Sequence[int], loss: torch.Tensor) -> None:
        """Note the loss (scalar) of the examples `numbers`, a part of the coming step."""
        self._losses.append((numbers, loss.detach()))

    def end_step(self, step: int, grad_norm: torch.Tensor | float | None) -> None:
        """Judge the step that the losses noted so far belong to.

        Args:
            step: its number, from 1.
            grad_norm: of all gradients, before clipping; None where they are judged elsewhere (a loss scaler's).

        Raises:
            ValueError: a loss or the norm is not finite; the sentence names step and examples.
        """
        losses, self._losses = self._losses, []
        if not losses:
            return
        numbers, values = zip(*losses, strict=True)
        values = torch.stack(values).float()
        if isinstance(grad_norm, torch.Tensor):
            norm = grad_norm.to(values).reshape(1)
        else:
            norm = values.new_full((1,), grad_norm or 0.0)
        self.check()
        judged = torch.cat([values, norm])
        if judged.is_cuda:
            host = torch.empty(judged.shape, dtype=judged.dtype, pin_memory=True)
            host.copy_(judged, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            self._waiting = (step, numbers, host, copied)
        else:
            _judge(step, numbers, judged)

    def check(self) -> None:
        """Raise for the last step, if its verdict is still on the way."""
        if self._waiting is not None:
            (step, numbers, host, copied), self._waiting = self._waiting, None
            copied.synchronize()
            _judge(step, numbers, host)


def _judge(step, numbers, judged):
    *losses, norm = judged.tolist()
    finite = judged.isfinite().tolist()
    if all(finite):
        return
    failed = [members for members, good in zip(numbers, finite[:-1], strict=True) if not good]
    if failed:
        found = f"loss: found {next(value for value, good in zip(losses, finite, strict=False) if not good)}"
    else:
        found, failed = f"gradient: found a norm of {norm}", numbers
    rows = sorted({number for members in failed for number in members})
    shown = ", ".join(map(str, rows[:20])) + (", ..." if len(rows) > 20 else "")
    raise ValueError(
        f"{found} at step {step} (rows {shown} of the training data), expected a finite number; nothing was saved "
        "since: lower learning_rate, raise warmup_steps or look at these rows."
    )
