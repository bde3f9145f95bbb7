"""The options of the preference losses, written once: names, defaults, ranges, help.

`BPOConfig`, the command line with its help, and the check of a resumed run take them from here. To add one, add a
field.
"""

import difflib
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from typing import Any

from bpo_fast.losses.table import F_DIVERGENCES, LOSSES, losses_that


def _option(default: Any, text: str, wanted: str = "", holds: Callable[[float], bool] | None = None) -> dict[str, Any]:
    """What the field of an option is made of: its help; a number's range as words (`wanted`) and a test (`holds`)."""
    return {"default": default, "metadata": {"help": text, "wanted": wanted, "holds": holds}}


@dataclass(frozen=True)
class LossConfig:
    """Which losses, with which weights and numbers. Names and defaults are those of TRL's DPOConfig.

    Args:
        loss_type: name of a loss, or several names; docs/losses.md has formulas and sources. "simpo", "cpo" and "orpo"
            take no reference, and "sft" beside them makes their papers' whole objectives: `["cpo", "sft"]` with
            weights `[1, alpha]`, `["sft", "orpo"]`.
        beta: strength of the pull to the reference, positive.
        loss_weights: a weight for each name; None weighs all by 1.
        label_smoothing: probability that a preference is the wrong way round, in [0, 0.5). For the losses that
            docs/losses.md marks as smoothed ("exo_pair" needs it); others beside one of those are not smoothed.
        average_logps: divide log-probs by the response's number of tokens before anything else. The losses that are
            averages by definition ("ipo", "sigmoid_norm", "simpo", "orpo") are not averaged twice.
        ld_alpha: weight, in [0, 1], of the tokens past the length of the shorter response of a pair (LD-DPO,
            2409.06411); None leaves all at 1. "sft" has every token at 1.
        f_divergence_type: "reverse_kl" (standard DPO), "forward_kl", "js_divergence" or "alpha_divergence" (f-DPO,
            2309.16240). An exponential that would overflow is held below the largest number of its dtype.
        f_alpha_divergence_coef: alpha of "alpha_divergence"; 0 is the forward KL, 1 the reverse KL.
        use_weighting: weigh each pair by exp of the mean over its responses' tokens of
            log p(token) - log sum_v p(v)^2 (WPO, 2406.11827, eq. 2), both responses' weights multiplied; a constant
            in the gradient.
        discopop_tau: temperature of "discopop", positive.
        simpo_gamma: margin of "simpo", at least 0.
        mdpo_conditional_weight: weight of "mdpo"'s second term, which prefers the image to the weakened one; positive.
        mdpo_anchor_weight: weight of its third, which holds up the chosen response; at least 0.
        mdpo_anchor: reward (beta times the log-ratio) that the third term asks of the chosen response.

    Raises:
        TypeError, ValueError: an option of the wrong kind, out of its range, or at odds with another.

    Example:
        >>> LossConfig(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]).weights  # MPO
        (0.8, 0.2, 1.0)
    """

    loss_type: str | list[str] = field(
        **_option("sigmoid", f"One or several of {', '.join(LOSSES)}; see docs/losses.md.")
    )
    beta: float = field(**_option(0.1, "Strength of the pull to the reference.", "a positive number", lambda x: x > 0))
    loss_weights: list[float] | None = field(**_option(None, "A weight for each loss type; all 1 by default."))
    label_smoothing: float = field(
        **_option(0.0, "Probability of a reversed preference.", "a number in [0, 0.5)", lambda x: 0 <= x < 0.5)
    )
    average_logps: bool = field(**_option(False, "Divide log-probs by the response's number of tokens."))
    ld_alpha: float | None = field(
        **_option(
            None,
            "Weight of the tokens past the shorter response's length (LD-DPO); 1 by default.",
            "None or a number in [0, 1]",
            lambda x: 0 <= x <= 1,
        )
    )
    f_divergence_type: str = field(
        **_option("reverse_kl", f"Pull to the reference (f-DPO): {', '.join(F_DIVERGENCES)}.")
    )
    f_alpha_divergence_coef: float = field(
        **_option(0.5, "Alpha of alpha_divergence.", "a finite number", lambda x: True)
    )
    use_weighting: bool = field(**_option(False, "Weigh pairs by their likelihood (WPO)."))
    discopop_tau: float = field(**_option(0.05, "Temperature of discopop.", "a positive number", lambda x: x > 0))
    simpo_gamma: float = field(**_option(0.5, "Margin of simpo.", "a number of at least 0", lambda x: x >= 0))
    mdpo_conditional_weight: float = field(
        **_option(1.0, "Weight of mdpo's term of the weakened image.", "a positive number", lambda x: x > 0)
    )
    mdpo_anchor_weight: float = field(
        **_option(1.0, "Weight of mdpo's anchor.", "a number of at least 0", lambda x: x >= 0)
    )
    mdpo_anchor: float = field(
        **_option(0.0, "Reward that mdpo's anchor asks of the chosen response.", "a finite number", lambda x: True)
    )

    @property
    def loss_types(self) -> tuple[str, ...]:
        """The names, also of a single one."""
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)

    @property
    def weights(self) -> tuple[float, ...]:
        """A weight for each of `loss_types`."""
        return (1.0,) * len(self.loss_types) if self.loss_weights is None else tuple(self.loss_weights)

    @property
    def needs_reference(self) -> bool:
        """Whether one of the losses reads the reference."""
        return not losses_that("reference_free").issuperset(self.loss_types)

    @property
    def reads_weakened(self) -> bool:
        """Whether one of the losses reads the chosen response after the weakened image."""
        return not losses_that("reads_weakened").isdisjoint(self.loss_types)

    @property
    def responses_per_pair(self) -> int:
        """Chosen and rejected; a third, the chosen one after the weakened image, where a loss reads it."""
        return 3 if self.reads_weakened else 2

    @property
    def is_plain_sigmoid(self) -> bool:
        """Whether the loss is that of `ops.sigmoid_preference`."""
        plain = (("sigmoid",), (1.0,), "reverse_kl", False)
        return (self.loss_types, self.weights, self.f_divergence_type, self.use_weighting) == plain

    def __post_init__(self):
        if not isinstance(self.loss_type, str | list | tuple):
            raise TypeError(f"loss_type: found {self.loss_type!r}, expected the name of a loss or a list of names.")
        if not isinstance(self.loss_weights, list | tuple | None):
            raise TypeError(f"loss_weights: found {self.loss_weights!r}, expected a list of numbers or None.")
        if not self.loss_types:
            raise ValueError("loss_type: found an empty list, expected the name of at least one loss.")
        for name in self.loss_types:
            _check_choice("loss_type", name, LOSSES)
        _check_choice("f_divergence_type", self.f_divergence_type, F_DIVERGENCES)
        for name in ("average_logps", "use_weighting"):
            # Any text is true to Python, 'no' and 'false' too.
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name}: found {value!r}, expected True or False.")
        for option in fields(self):
            value, holds = getattr(self, option.name), option.metadata["holds"]
            if holds and not (value is None and option.default is None) and not (_is_finite(value) and holds(value)):
                raise ValueError(f"{option.name}: found {value!r}, expected {option.metadata['wanted']}.")
        if len(self.weights) != len(self.loss_types) or not all(map(_is_finite, self.weights)):
            raise ValueError(
                f"loss_weights: found {self.loss_weights!r}, expected a finite number for each of "
                f"{', '.join(self.loss_types)}."
            )
        self._check_combinations(set(self.loss_types))

    def _check_combinations(self, types: set[str]) -> None:
        smoothed, of_differences = losses_that("smoothed"), losses_that("of_score_differences")
        batchwise = losses_that("sorts_batch") | {"sft"}
        if self.label_smoothing and smoothed.isdisjoint(types):
            raise ValueError(
                f"label_smoothing: found {self.label_smoothing}, expected 0 for loss_type={self.loss_type!r}, which "
                f"does not read it; set it to 0 or use one of {_listed(smoothed)}."
            )
        if "exo_pair" in types and not self.label_smoothing:
            raise ValueError("label_smoothing: found 0, expected above 0 for 'exo_pair'; its paper recommends 1e-3.")
        if self.f_divergence_type != "reverse_kl" and not of_differences.issuperset(types):
            raise ValueError(
                f"f_divergence_type: found {self.f_divergence_type!r}, expected 'reverse_kl' for "
                f"{_listed(types - of_differences)}; other divergences go with {_listed(of_differences)} only."
            )
        if self.use_weighting and not batchwise.isdisjoint(types):
            raise ValueError(
                f"use_weighting: found True, expected False for {_listed(types & batchwise)}; it weighs single pairs, "
                "and these losses join the pairs of a batch."
            )


LOSS_OPTIONS = tuple(option.name for option in fields(LossConfig))


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def _listed(names: Collection[str]) -> str:
    return ", ".join(map(repr, sorted(names)))


def _near(value: object, choices: Collection[str]) -> str:
    near = difflib.get_close_matches(str(value), choices, n=1)
    return f"; did you mean {near[0]!r}?" if near else "."


def _check_choice(name: str, value: object, choices: Collection[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: found {value!r}, expected one of {', '.join(choices)}{_near(value, choices)}")


def loss_config(**options: Any) -> LossConfig:
    """A LossConfig of keyword arguments that a caller passed on.

    Raises:
        TypeError: an argument that is no option of a loss.

    Example:
        >>> loss_config(beta=0.5, simpo_gama=0.5)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        TypeError: simpo_gama: found no such option of a loss, expected one of ...; did you mean 'simpo_gamma'?
    """
    for name in options:
        if name not in LOSS_OPTIONS:
            expected = f"expected one of {', '.join(LOSS_OPTIONS)}"
            raise TypeError(f"{name}: found no such option of a loss, {expected}{_near(name, LOSS_OPTIONS)}")
    return LossConfig(**options)
