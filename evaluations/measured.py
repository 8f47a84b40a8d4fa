"""A number with its standard error, and the error of a difference between two numbers of paired samples."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

CONFIDENCE = 1.96
"""Standard errors to each side of an interval that holds 95 %."""


@dataclass(frozen=True, eq=False)
class Measured:
    """A number, its standard error over other samples (the reference stays), and where an interval says more, that.

    deviations: a vector whose Euclidean norm is the error, of the same draws for every set of samples; between two sets
    whose samples are paired, the norm of the difference of their vectors is the error of the difference.
    """

    value: float
    deviations: Array | None = field(default=None, repr=False)
    interval: tuple[float, float] | None = None

    @property
    def error(self) -> float | None:
        return None if self.deviations is None else float(np.linalg.norm(self.deviations))

    def described(self) -> dict[str, Any]:
        """As it stands in JSON."""
        interval = {} if self.interval is None else {"interval": list(self.interval)}
        return {"value": self.value, "error": self.error} | interval

    def minus(self, other: "Measured") -> "Measured":
        """The difference to the same number of paired samples; without error where either has none."""
        known = self.deviations is not None and other.deviations is not None
        return Measured(self.value - other.value, self.deviations - other.deviations if known else None)


def of_influence(influence: Array) -> Array:
    """Deviations of a number from what each of n samples moves it by, [n], up to a constant (delta method).

    The error is std(IF)/√n.
    """
    n = len(influence)
    return (influence - influence.mean()) / np.sqrt(n * (n - 1))


def of_share(hits: Array) -> Measured:
    """The mean of n numbers, one a sample."""
    return Measured(float(hits.mean()), of_influence(hits))


def of_parts(values: Array, kept: float) -> Array:
    """Deviations of a number from its values [B] on random parts that keep a share of the samples (delete-d jackknife).

    Parts without replacement vary by (1 − kept)/kept of what whole sets do (Shao & Wu 1989).
    """
    return (values - values.mean()) * np.sqrt(kept / (1 - kept) / len(values))


def wilson(share: float, n: int) -> tuple[float, float]:
    """The interval of 95 % of a share seen among n (Wilson 1927): also of 0 and 1, where the standard error is 0."""
    square = CONFIDENCE**2 / n
    middle = (share + square / 2) / (1 + square)
    half = CONFIDENCE * np.sqrt(share * (1 - share) / n + square / (4 * n)) / (1 + square)
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))
