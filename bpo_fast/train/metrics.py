"""What is logged of packed sequences, summed on their device until a log asks for it."""

import torch

# Sequences whose values wait to be summed; their scalars are few bytes each, but a block of memory each too.
_MOST_WAITING = 256


class MetricSums:
    """Sums and counts of named metrics over packed sequences.

    Values wait on the device until they are taken, so that a step costs no synchronisation.

    Example:
        >>> sums = MetricSums()
        >>> sums.add({"logps": (torch.tensor(-3.0), 2)})
        >>> sums.add({"logps": (torch.tensor(-1.0), 1)})
        >>> sums.take(torch.device("cpu"))
        (['logps'], tensor([-4.,  3.], dtype=torch.float64))
    """

    def __init__(self):
        self._waiting: list[dict[str, tuple]] = []
        self._sums: torch.Tensor | None = None
        self._names: list[str] = []

    def add(self, metrics: dict[str, tuple]) -> None:
        """Note the metrics of one sequence, name -> (sum, count); all sequences have the same names."""
        self._waiting.append(metrics)
        if len(self._waiting) == _MOST_WAITING:
            self._fold(next(sum.device for sum, _ in metrics.values()))

    def take(self, device: torch.device) -> tuple[list[str], torch.Tensor] | None:
        """Names, and fp64 [2 x names] with each one's sum and count since this was last asked; None without any."""
        if self._waiting:
            self._fold(device)
        sums, self._sums = self._sums, None
        return None if sums is None else (self._names, sums)

    def _fold(self, device):
        waiting, self._waiting = self._waiting, []
        self._names = list(waiting[0])
        numbers = [number for metrics in waiting for name in self._names for number in metrics[name]]
        sums = torch.stack([_float64(number, device) for number in numbers]).view(len(waiting), -1).sum(0)
        self._sums = sums if self._sums is None else self._sums + sums


def _float64(number: torch.Tensor | int, device: torch.device) -> torch.Tensor:
    """A scalar on the device; a host's number is filled in there, which unlike a copy waits for nothing."""
    if isinstance(number, torch.Tensor):
        return number.to(torch.float64)
    return torch.full((), number, dtype=torch.float64, device=device)
