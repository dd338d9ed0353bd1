"""What is fixed about each loss, readable without torch: names, arguments, temperature orders.

`config` checks `loss.name`, `loss.kwargs` and `loss.temperature_scaling` against these facts;
`losses/` maps the same names to functions (a test holds that both have the same keys).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pocl_dist.errors import ConfigError

TEMPERATURE_SCALINGS = ("auto", "squared", "linear", "none", "published")


@dataclass(frozen=True)
class KwargSpec:
    """One number that a divergence takes, with its default and the range where it makes sense."""

    default: float
    low: float = 0.0
    high: float = 1.0
    includes_low: bool = False
    includes_high: bool = False

    def contains(self, value: float) -> bool:
        """Returns whether `value` is in range; nan is not."""
        is_above = value >= self.low if self.includes_low else value > self.low
        is_below = value <= self.high if self.includes_high else value < self.high
        return is_above and is_below

    def allowed(self) -> str:
        """Returns the range in interval notation, e.g. `[0, 1)`."""
        opening = "[" if self.includes_low else "("
        closing = "]" if self.includes_high else ")"
        return f"{opening}{self.low:g}, {self.high:g}{closing}"


@dataclass(frozen=True)
class LossSpec:
    """The static facts of one divergence.

    `temperature_order` is k where the gradient falls with T**-k, so that T**k keeps its size (2 for
    the KL family, Hinton et al. 2015, section 2.1; 1 for total variation). `published_order` is the
    k of the code released with POCL (arXiv 2506.05695), 0 where that code does not scale.
    """

    name: str
    temperature_order: int
    published_order: int
    kwargs: Mapping[str, KwargSpec] = field(default_factory=dict)


def _exponent(default: float) -> KwargSpec:
    """Returns an exponent of probabilities: in [0, 1] no power of one overflows."""
    return KwargSpec(default, includes_low=True, includes_high=True)


# At student_weight 0 or 1, or skew 1, the mixture is one of the two distributions and the loss has
# no gradient; skew 0 is the plain KL and reverse_weight 0 or 1 one of its two directions.
_SKEW = {"skew": KwargSpec(0.1, includes_low=True)}
_REVERSE_WEIGHT = {"reverse_weight": KwargSpec(0.9, includes_low=True, includes_high=True)}

LOSSES: dict[str, LossSpec] = {
    spec.name: spec
    for spec in (
        LossSpec("forward_kl", 2, 2),
        LossSpec("reverse_kl", 2, 0),
        LossSpec("jensen_shannon", 2, 2, {"student_weight": KwargSpec(0.9)}),
        LossSpec("total_variation", 1, 0),
        LossSpec("skew_forward_kl", 2, 0, _SKEW),
        LossSpec("skew_reverse_kl", 2, 2, _SKEW),
        LossSpec("symmetric_kl", 2, 0, _REVERSE_WEIGHT),
        # Not in the code released with POCL: what their own code does, which has no temperature.
        LossSpec("adaptive_kl", 2, 0, {"head_mass": KwargSpec(0.5)}),
        # The exponents that ABKD uses for instruction following (arXiv 2505.04560, section 5.1).
        LossSpec("alpha_beta", 2, 0, {"alpha": _exponent(0.2), "beta": _exponent(0.7)}),
    )
}


def check_loss(name: str, kwargs: Mapping[str, object]) -> None:
    """Raises ConfigError (a ValueError) for an unknown loss or argument or a value out of range."""
    if name not in LOSSES:
        raise ConfigError(f"loss.name: unknown loss {name!r}; {_choices(name, LOSSES)}")
    specs = LOSSES[name].kwargs
    for key, value in kwargs.items():
        if key not in specs:
            allowed = _choices(key, specs) if specs else f"{name} takes no arguments"
            raise ConfigError(f"loss.kwargs.{key}: unknown argument of {name}; {allowed}")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (is_number and specs[key].contains(float(value))):  # type: ignore[arg-type]
            allowed = f"must be a number in {specs[key].allowed()}"
            raise ConfigError(f"loss.kwargs.{key}: {value!r} is not allowed for {name}; {allowed}")


def complete_kwargs(name: str, kwargs: Mapping[str, object]) -> dict[str, float]:
    """Returns every argument of the loss, defaults filled in; raises like `check_loss`."""
    check_loss(name, kwargs)
    specs = LOSSES[name].kwargs
    return {key: float(kwargs.get(key, spec.default)) for key, spec in specs.items()}  # type: ignore[arg-type]


def check_temperature(temperature: float) -> None:
    """Raises ConfigError unless `temperature` is a finite number above 0."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"curriculum.temperature: {temperature!r} must be finite and above 0")


def check_temperature_scaling(scaling: str) -> None:
    """Raises ConfigError unless `scaling` is one of TEMPERATURE_SCALINGS."""
    if scaling not in TEMPERATURE_SCALINGS:
        allowed = _choices(scaling, TEMPERATURE_SCALINGS)
        raise ConfigError(f"loss.temperature_scaling: unknown scaling {scaling!r}; {allowed}")


def temperature_scale(
    temperature: float, scaling: str, *, temperature_order: int, published_order: int
) -> float:
    """Returns the factor on the divergence: T to the order that `scaling` names."""
    check_temperature(temperature)
    check_temperature_scaling(scaling)
    orders = {
        "auto": temperature_order,
        "squared": 2,
        "linear": 1,
        "none": 0,
        "published": published_order,
    }
    return float(temperature ** orders[scaling])


def _choices(value: str, allowed: Iterable[str]) -> str:
    """Returns the allowed names, led by the one that `value` resembles."""
    names = list(allowed)
    close = difflib.get_close_matches(str(value), names, n=1)
    suggestion = f"did you mean {close[0]!r}? " if close else ""
    return f"{suggestion}Allowed: {', '.join(names)}"
