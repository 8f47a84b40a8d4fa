"""Inception score, kernel distance and FID∞: metrics summed as features stream by."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from evaluations.moments import Gaussian, Moments, frechet_distance
from evaluations.neighbours import BLOCK, Rows

SPLIT = 5000
"""Samples in a split of the Inception score, as guided-diffusion's evaluator takes them."""


@dataclass(frozen=True)
class Measured:
    """A number and its standard error; None where none is known."""

    value: float
    error: float | None = None


def inception_score(logits: Iterable[torch.Tensor], n: int, order: NDArray | None = None) -> Measured:
    """exp E KL(p(y|x) ‖ p(y)), the mean over splits of 5000 (Salimans et al. 2016); the last split may be smaller.

    logits: blocks [M, K], n in all, in file order. order: the place of every sample, where not that of the file. The
    error is the splits' standard deviation over the root of their number.
    """
    splits = -(-n // SPLIT)
    place = (np.arange(n) if order is None else order) // SPLIT
    negative_entropy, probability, start = torch.zeros(splits, dtype=torch.float64), None, 0
    for block in logits:
        log_p = block.double().log_softmax(dim=1)
        p = log_p.exp()
        split = torch.from_numpy(place[start : start + len(block)])
        if probability is None:
            probability = torch.zeros(splits, p.shape[1], dtype=torch.float64)
        negative_entropy.index_add_(0, split, (p * log_p).sum(dim=1))
        probability.index_add_(0, split, p)
        start += len(block)
    count = torch.from_numpy(np.bincount(place, minlength=splits)).double()
    marginal = probability / count[:, None]
    scores = torch.exp(negative_entropy / count - torch.special.xlogy(marginal, marginal).sum(dim=1))
    error = float(scores.std() / splits**0.5) if splits > 1 else None
    return Measured(float(scores.mean()), error)


def _kernel_sums(first: Rows, second: Rows, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the kernel (x·y/D + 1)³ over all pairs: for each row of the first, [N], and of the second, [M]."""
    sums = [torch.zeros(len(rows), dtype=torch.float64, device=device) for rows in (first, second)]
    for i in range(0, len(first), BLOCK):
        x = first[i : i + BLOCK].to(device)
        for j in range(0, len(second), BLOCK):
            y = second[j : j + BLOCK].to(device)
            block = (x @ y.T / x.shape[1] + 1).double() ** 3
            sums[0][i : i + BLOCK] += block.sum(dim=1)
            sums[1][j : j + BLOCK] += block.sum(dim=0)
    return sums[0], sums[1]


def _self_sums(rows: Rows, device: torch.device) -> torch.Tensor:
    """As `_kernel_sums` of a set with itself, each one's pair with itself left out: [N]."""
    sums, _ = _kernel_sums(rows, rows, device)
    for i in range(0, len(rows), BLOCK):
        x = rows[i : i + BLOCK].to(device)
        sums[i : i + BLOCK] -= (x.square().sum(dim=1) / x.shape[1] + 1).double() ** 3
    return sums


def kernel_distance(samples: Rows, reference: Rows, device: torch.device) -> Measured:
    """KID (Bińkowski et al. 2018): squared MMD of the cubic kernel, the U-statistic over all pairs, not of subsets.

    The error comes from each image's share in the statistic (its first-order projection), on both sides.
    """
    n, m = len(samples), len(reference)
    if min(n, m) < 2:
        raise ValueError(f"kernel distance: wanted 2 samples or more on both sides, got {n} and {m}")
    own, theirs = _self_sums(samples, device) / (n - 1), _self_sums(reference, device) / (m - 1)
    across, back = _kernel_sums(samples, reference, device)
    across, back = across / m, back / n
    value = own.mean() + theirs.mean() - 2 * across.mean()
    variance = (2 * (own - across)).var() / n + (2 * (theirs - back)).var() / m
    return Measured(float(value), float(variance.sqrt()))


INFINITY_SIZES = 8


def frechet_infinity(features: Rows, reference: Gaussian, seed: int = 0) -> Measured:
    """FID∞ (Chong & Forsyth 2020): where the distance goes for N → ∞.

    A line through the distances of eight nested random subsets of N/4 to N samples against 1/N; its value at 0, with
    the error of the fit (the subsets overlap, so it is too small).
    """
    n = len(features)
    sizes = np.linspace(n / 4, n, INFINITY_SIZES).astype(int)
    if sizes[0] <= len(reference.mean):
        raise ValueError(f"FID∞ needs more than {4 * len(reference.mean)} samples, got {n}")
    # The first subset that a sample is in.
    order = np.random.default_rng(seed).permutation(n)
    member = np.searchsorted(sizes, order, side="right")
    parts: list[Moments | None] = [None] * INFINITY_SIZES
    for start in range(0, n, BLOCK):
        block = features[start : start + BLOCK].numpy()
        for number in range(INFINITY_SIZES):
            rows = block[member[start : start + BLOCK] == number]
            if len(rows):
                moments = Moments.of(rows)
                parts[number] = moments if parts[number] is None else parts[number] + moments
    distances, total = [], None
    for part in parts:
        total = part if total is None else total + part
        distances.append(frechet_distance(total.gaussian(), reference).value)
    inverse = 1 / sizes
    coefficients, covariance = np.polyfit(inverse, distances, 1, cov=True)
    return Measured(float(coefficients[1]), float(covariance[1, 1] ** 0.5))
