"""Means and covariances of features, summed as they stream by, and the Fréchet distance between two of them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
import scipy.linalg
import scipy.linalg.blas
from numpy.typing import NDArray

Array = NDArray[np.float64]

ACCURACY = 1e-9
"""How much of tr Σ₁ + tr Σ₂ rounding may cost before the Cholesky form gives way to the nuclear norm."""


@dataclass(frozen=True)
class Moments:
    """Sums over n features of D numbers in float64: `total` Σx, [D], and `products` the upper half of Σxxᵀ, [D, D].

    Adding two gives the moments of both sets together, in any order.
    """

    n: int
    total: Array
    products: Array

    @classmethod
    def of(cls, features: NDArray) -> "Moments":
        """The moments of features [N, D]."""
        x = features.astype(np.float64)
        return cls(len(x), x.sum(axis=0), scipy.linalg.blas.dsyrk(1.0, x.T))

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.n + other.n, self.total + other.total, self.products + other.products)

    @classmethod
    def sum(cls, parts: Iterable["Moments"]) -> "Moments":
        """The moments of all parts together, holding one at a time."""
        return reduce(cls.__add__, parts)

    def gaussian(self) -> "Gaussian":
        """Mean and covariance (ddof = 1)."""
        if self.n < 2:
            raise ValueError(f"a covariance needs 2 samples or more, got {self.n}")
        mean = self.total / self.n
        upper = np.triu(self.products)
        products = upper + np.triu(upper, 1).T
        return Gaussian(mean, (products - self.n * np.outer(mean, mean)) / (self.n - 1), self.n)


@dataclass(frozen=True)
class Gaussian:
    """Mean μ [D] and covariance Σ [D, D] of n samples; n is None where it is not known.

    factor: [n − 1, D] with Σ = factorᵀ factor, kept where samples are fewer than dimensions.
    """

    mean: Array
    covariance: Array
    n: int | None = None
    factor: Array | None = None

    def with_features(self, features: NDArray) -> "Gaussian":
        """The same with its factor, from the features [N, D] themselves."""
        return replace(self, factor=_centred(features.astype(np.float64)) / np.sqrt(len(features) - 1))

    def root(self) -> Array:
        """Some R with RᵀR = Σ, by eigenvalues."""
        values, vectors = scipy.linalg.eigh(self.covariance, driver="evd", check_finite=False)
        return np.sqrt(values.clip(min=0))[:, None] * vectors.T

    def quick_root(self) -> Array | None:
        """Some R with RᵀR = Σ, by Cholesky or from the features; None where Σ is singular."""
        if self.factor is not None:
            return self.factor
        try:
            return scipy.linalg.cholesky(self.covariance, check_finite=False)
        except np.linalg.LinAlgError:
            return None


def _centred(x: Array) -> Array:
    """[N, …] to [N − 1, …]: rows of an orthonormal basis in which the mean has no share."""
    return scipy.linalg.helmert(len(x)) @ x


@dataclass(frozen=True)
class FrechetDistance:
    """d² = ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½ (Dowson & Landau 1982; Heusel et al. 2017), and its parts."""

    mean_term: float
    traces: tuple[float, float]
    cross_trace: float

    @property
    def value(self) -> float:
        value = self.mean_term + sum(self.traces) - 2 * self.cross_trace
        # No square is negative; equal Gaussians come out a rounding below 0.
        return 0.0 if -1e-9 * sum(self.traces) <= value <= 0 else value


def frechet_distance(first: Gaussian, second: Gaussian) -> FrechetDistance:
    """The Fréchet distance of two Gaussians of the same dimension."""
    traces = float(np.trace(first.covariance)), float(np.trace(second.covariance))
    difference = first.mean - second.mean
    return FrechetDistance(float(difference @ difference), traces, _cross_trace(first, second, sum(traces)))


def _cross_trace(first: Gaussian, second: Gaussian, scale: float) -> float:
    """tr (Σ₁Σ₂)^½ = Σ λ^½ (R Σ₂ Rᵀ) with RᵀR = Σ₁; where rounding makes that inaccurate, the norm |R₁R₂ᵀ|_*."""
    if first.factor is None and second.factor is not None:
        first, second = second, first
    root = first.quick_root()
    if root is not None:
        values = scipy.linalg.eigvalsh(root @ second.covariance @ root.T, driver="evr", check_finite=False)
        roots = np.sqrt(values.clip(min=0))
        # An eigenvalue is known up to its share of the largest one's rounding; its root up to this:
        rounding = 4 * np.finfo(np.float64).eps * values[-1]
        lost = np.minimum(np.sqrt(rounding), rounding / np.maximum(roots, 1e-300)).sum()
        if lost <= ACCURACY * scale:
            return float(roots.sum())
    one, other = (side.root() if side.factor is None else side.factor for side in (first, second))
    return float(scipy.linalg.svdvals(one @ other.T, check_finite=False).sum())


def frechet_jackknife(features: NDArray, reference: Gaussian) -> Array:
    """Deviations of the distance of few samples [N, D], by leaving out one at a time: [N], their norm is its error."""
    x = features.astype(np.float64)
    n = len(x) - 1
    products = x @ reference.covariance @ x.T
    distances = []
    for left_out in range(len(x)):
        rest = np.delete(np.arange(len(x)), left_out)
        mean_term = ((x[rest].mean(axis=0) - reference.mean) ** 2).sum()
        values = scipy.linalg.eigvalsh(_centred(_centred(products[np.ix_(rest, rest)]).T))
        cross_trace = np.sqrt(values.clip(min=0) / (n - 1)).sum()
        distances.append(mean_term + x[rest].var(axis=0, ddof=1).sum() - 2 * cross_trace)
    return (np.mean(distances) - np.array(distances)) * np.sqrt(n / len(x))


def frechet_influence(samples: Gaussian, reference: Gaussian):
    """The influence function of the Fréchet distance on the samples' side, or None where the samples are all the same.

    IF(x) = 2 (μ_s − μ_r)·(x − μ_s) + (x − μ_s)ᵀ (I − T) (x − μ_s), up to a constant, with T the optimal transport map
    from the samples' Gaussian to the reference's; the standard error of the distance of n samples is std(IF)/√n
    (delta method; of fewer samples than dimensions it holds for these samples, and is a little too large). Directions
    in which the samples do not differ at all are left out. Returns a function from features [N, D] to IF [N].
    """
    variances, directions = scipy.linalg.eigh(samples.covariance, driver="evd", check_finite=False)
    kept = variances > 1e-12 * max(variances[-1], 0)
    if not kept.any():
        return None
    deviations, directions = np.sqrt(variances[kept]), directions[:, kept]
    low = directions * deviations
    values, vectors = scipy.linalg.eigh(low.T @ reference.covariance @ low, driver="evd", check_finite=False)
    # T = R Q λ^½ Qᵀ Rᵀ for Σ_s = LLᵀ, LᵀΣ_rL = QλQᵀ and RᵀL = 1: its quadratic form is a sum of squares.
    half = (directions / deviations) @ vectors * np.sqrt(np.sqrt(values.clip(min=0)))
    shift = 2 * (samples.mean - reference.mean)

    def influence(features: NDArray) -> Array:
        x = features.astype(np.float64) - samples.mean
        return x @ shift + (x * x).sum(axis=1) - ((x @ half) ** 2).sum(axis=1)

    return influence
