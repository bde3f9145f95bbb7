"""Noise schedules: how much of a signal a diffusion forward step keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from bpo_fast.ops.checks import is_int


class NoiseSchedule:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, for steps t = 0 .. num_steps - 1.

    Build one with `NoiseSchedule.sigmoid`, `.linear` or `.cosine`, or from an `alpha_bar` of your own.

    Args:
        alpha_bar: [T], the share of the signal's power that step t keeps: in [0, 1], never above the one before.
        name: name of the schedule in error messages and reports.

    Attributes:
        alpha_bar: float64 [T] on the CPU.
        name: as given.
        num_steps: T.

    Raises:
        ValueError: alpha_bar is not a non-empty, non-increasing vector of numbers in [0, 1].

    Example:
        >>> schedule = NoiseSchedule.sigmoid()
        >>> signal, noise = schedule.scales(500)
        >>> print(f"{schedule.alpha_bar[500]:.6f} {signal:.6f} {noise:.6f}")
        0.744799 0.863017 0.505175
    """

    def __init__(self, alpha_bar: torch.Tensor | Sequence[float], name: str = "custom"):
        alpha_bar = torch.as_tensor(alpha_bar, dtype=torch.float64, device="cpu").clone()
        if alpha_bar.ndim != 1 or alpha_bar.numel() == 0:
            raise ValueError(f"alpha_bar: found shape {list(alpha_bar.shape)}, expected [T] with T of at least 1.")
        wrong = ~((alpha_bar >= 0) & (alpha_bar <= 1))
        wrong[1:] |= alpha_bar.diff() > 0
        if wrong.any():
            step = int(wrong.nonzero()[0])
            raise ValueError(
                f"alpha_bar: found {alpha_bar[step].item()} at step {step}, expected numbers from 0 to 1 that never "
                "rise from one step to the next."
            )
        self.alpha_bar = alpha_bar
        self.name = name
        self.num_steps = alpha_bar.numel()
        scales = torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()], dim=1).to(torch.float32)
        self._tables = {torch.device("cpu"): scales}

    @classmethod
    def sigmoid(cls, num_steps: int = 1000) -> NoiseSchedule:
        """The schedule of BPO (arXiv 2403.08730) and VCD (arXiv 2311.16922).

        beta_t = sigmoid(linspace(-6, 6, T))_t * (0.5e-2 - 1e-5) + 1e-5; abar = cumprod(1 - beta). The betas do not
        grow when T shrinks: fewer steps end with less noise.

        Example:
            >>> print(f"{NoiseSchedule.sigmoid().alpha_bar[999]:.6f}")
            0.081249
        """
        ramp = torch.linspace(-6, 6, _checked_num_steps(num_steps), dtype=torch.float64)
        return cls._from_betas(torch.sigmoid(ramp) * (0.5e-2 - 1e-5) + 1e-5, "sigmoid")

    @classmethod
    def linear(cls, num_steps: int = 1000) -> NoiseSchedule:
        """The schedule of DDPM (Ho et al., arXiv 2006.11239).

        beta = linspace(1e-4, 0.02, T); abar = cumprod(1 - beta). As with `sigmoid`, fewer steps end with less noise.

        Example:
            >>> print(f"{NoiseSchedule.linear().alpha_bar[0]:.4f}")
            0.9999
        """
        betas = torch.linspace(1e-4, 0.02, _checked_num_steps(num_steps), dtype=torch.float64)
        return cls._from_betas(betas, "linear")

    @classmethod
    def cosine(cls, num_steps: int = 1000) -> NoiseSchedule:
        """The schedule of Nichol and Dhariwal (arXiv 2102.09672, eq. 17), with s = 0.008 and betas of at most 0.999.

        abar(i) = f(i) / f(0), f(i) = cos^2((i / T + s) / (1 + s) * pi / 2), step t standing for i = t + 1.

        Example:
            >>> print(f"{NoiseSchedule.cosine().alpha_bar[499]:.4f}")
            0.4938
        """
        position = torch.arange(_checked_num_steps(num_steps) + 1, dtype=torch.float64) / num_steps
        f = torch.cos((position + 0.008) / 1.008 * math.pi / 2) ** 2
        return cls._from_betas((1 - f[1:] / f[:-1]).clamp(max=0.999), "cosine")

    @classmethod
    def _from_betas(cls, betas, name):
        return cls(torch.cumprod(1 - betas, dim=0), name)

    def scales(self, step: int) -> tuple[float, float]:
        """(sqrt(abar_t), sqrt(1 - abar_t)) of one step, in double precision.

        Raises:
            ValueError: the schedule has no such step.

        Example:
            >>> signal, noise = NoiseSchedule.sigmoid().scales(0)
            >>> print(f"{signal:.6f} {noise:.6f}")
            0.999989 0.004726
        """
        kept = self.alpha_bar[self.checked_step(step)].item()
        return math.sqrt(kept), math.sqrt(1 - kept)

    def checked_step(self, step: int, name: str = "step") -> int:
        """`step`, if the schedule has it; `name` is the argument that an error names.

        Raises:
            ValueError: the schedule has no such step.
        """
        if not 0 <= step < self.num_steps:
            raise ValueError(
                f"{name}: found {step}, expected 0 to {self.num_steps - 1}, the steps of the {self.name} schedule."
            )
        return step

    def table(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """float32 [T, 2] on `device`, row t being (sqrt(abar_t), sqrt(1 - abar_t)); copied there once.

        Example:
            >>> NoiseSchedule.linear(4).table().shape
            torch.Size([4, 2])
        """
        device = torch.device(device)
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]

    def __repr__(self):
        return f"NoiseSchedule({self.name}, num_steps={self.num_steps})"


def _checked_num_steps(num_steps):
    if not is_int(num_steps) or num_steps < 1:
        raise ValueError(f"num_steps: found {num_steps!r}, expected an int of at least 1.")
    return num_steps
