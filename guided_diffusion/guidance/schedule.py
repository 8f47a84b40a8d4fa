"""When a guidance acts, and how strongly: by t/T, by noise level, and by step."""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..diffusion.process import NoiseLevels
from ..settings.options import numbers, parse_value

Curve = tuple[tuple[float, float], ...]
"""Factors at places, (place, factor) with rising places: linear between them, and beyond them the nearest one's."""

PARTS = "t=lo,hi, sigma=lo,hi, every=k, scale=t:factor,…, sigma_scale=σ:factor,…"


def _check_curve(name: str, curve: Curve, least: float) -> None:
    places = [place for place, _ in curve]
    if any(right <= left for left, right in itertools.pairwise(places)) or (places and places[0] < least):
        raise ValueError(f"{name}: wanted rising places from {least:g} on, got {', '.join(map(str, places))}")
    if not all(math.isfinite(number) for point in curve for number in point):
        raise ValueError(f"{name}: wanted finite numbers, got {curve}")


@dataclass(frozen=True)
class Schedule:
    """The steps at which a guidance acts, how often its Δ is computed there, and what its scale is multiplied by.

    It acts where low ≤ t/T < high (1 = noise), where sigma_low < σ ≤ sigma_high, σ the noise by the image of
    x_t = α (x_0 + σ ε) (Kynkäänniemi et al. 2024), and, in respaced steps, where t < start. every: Δ is computed at the
    guided steps 0, every, 2·every, … and used again between. curve, sigma_curve: factors of the scale by t/T, and by σ,
    linear in log σ; where they are 0, the guidance does not act.
    """

    low: float = 0.0
    high: float = 1.0
    start: int | None = None
    every: int = 1
    sigma_low: float = 0.0
    sigma_high: float = math.inf
    curve: Curve = ()
    sigma_curve: Curve = ()

    def __post_init__(self):
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"guide_interval: wanted 0 ≤ low < high ≤ 1, got {self.low:g},{self.high:g}")
        if not 0 <= self.sigma_low < self.sigma_high:
            raise ValueError(f"sigma: wanted 0 ≤ low < high, got {self.sigma_low:g},{self.sigma_high:g}")
        if self.start is not None and self.start < 0:
            raise ValueError(f"guide_start: wanted 0 or more, got {self.start}")
        if self.every < 1:
            raise ValueError(f"guide_every: wanted 1 or more, got {self.every}")
        _check_curve("scale", self.curve, 0)
        _check_curve("sigma_scale", self.sigma_curve, math.ulp(0))

    def factors(self, process: NoiseLevels) -> list[float]:
        """What the scale is multiplied by at the steps t = 0 … T − 1; 0 where the guidance does not act."""
        t = np.arange(process.num_timesteps)
        time, factors = t / len(t), np.ones(len(t))
        acts = (self.low <= time) & (time < self.high)
        if self.start is not None:
            acts &= t < self.start
        if self.curve:
            places, values = zip(*self.curve, strict=True)
            factors *= np.interp(time, places, values)
        if (self.sigma_low, self.sigma_high, self.sigma_curve) != (0.0, math.inf, ()):
            with np.errstate(divide="ignore"):
                sigma = process.sigmas / process.alphas
            acts &= (self.sigma_low < sigma) & (sigma <= self.sigma_high)
            if self.sigma_curve:
                places, values = zip(*self.sigma_curve, strict=True)
                factors *= np.interp(np.log(sigma), np.log(places), values)
        return np.where(acts, factors, 0.0).tolist()

    def described(self, process: NoiseLevels, steps: str = "steps") -> str:
        """For people: the number of steps, or what they are called, and what else is not as usual."""
        acting = [factor for factor in self.factors(process) if factor]
        said = f"{len(acting)} of {process.num_timesteps} {steps}"
        if self.every > 1:
            said += f", every {self.every}"
        if {*acting} - {1.0}:
            said += f", scale × {min(acting):.3g} to {max(acting):.3g}"
        return said


def changed(schedule: Schedule, key: str, text: str) -> Schedule:
    """A schedule with what a flag's text says of it: words of `PARTS`; a ValueError names the flag and the word."""
    parts: dict[str, Any] = {}
    for word in text.split():
        name, _, value = word.partition("=")
        try:
            parts |= _part(name, value)
        except ValueError as error:
            raise ValueError(f"{key}: {error}; got {word!r}") from None
    try:
        return replace(schedule, **parts)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _part(name: str, value: str) -> dict[str, float | int | Curve]:
    if name == "every":
        return {"every": parse_value(value, int, name)}
    if name in ("scale", "sigma_scale"):
        points = [tuple(numbers(name, point.replace(":", ","), float)) for point in value.split(",")]
        if any(len(point) != 2 for point in points):
            raise ValueError(f"{name}: wanted place:factor,place:factor,…")
        return {"curve" if name == "scale" else "sigma_curve": tuple(points)}
    if name not in ("t", "sigma"):
        raise ValueError(f"wanted words of {PARTS}")
    low_high = numbers(name, value, float)
    if len(low_high) != 2:
        raise ValueError(f"{name}: wanted lo,hi")
    return dict(zip(("low", "high") if name == "t" else ("sigma_low", "sigma_high"), low_high, strict=True))
