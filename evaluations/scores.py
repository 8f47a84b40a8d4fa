"""Inception score, kernel distance, FID∞, MIND and class histograms: metrics summed as features stream by."""

import numpy as np
import torch
from numpy.typing import NDArray

from evaluations.measured import Measured, of_influence
from evaluations.moments import Gaussian, Moments, frechet_distance, frechet_influence
from evaluations.neighbours import BLOCK, Rows

SPLIT = 5000
"""Samples in a split of the Inception score, as guided-diffusion's evaluator takes them."""


def inception_score(logits: Rows, order: NDArray | None = None) -> Measured:
    """exp E KL(p(y|x) ‖ p(y)), the mean over splits of 5000 (Salimans et al. 2016); the last split may be smaller.

    logits: [N, K], in file order. order: the place of every sample, where not that of the file. A sample moves its
    split's score by score · (its KL − the mean).
    """
    n = len(logits)
    splits = -(-n // SPLIT)
    place = torch.from_numpy((np.arange(n) if order is None else order) // SPLIT)
    count = place.bincount(minlength=splits).double()
    probability = torch.zeros(splits, logits[:1].shape[1], dtype=torch.float64)
    for start in range(0, n, BLOCK):
        block = logits[start : start + BLOCK].double().softmax(dim=1)
        probability.index_add_(0, place[start : start + BLOCK], block)
    log_marginal = (probability / count[:, None]).log()
    divergence = torch.empty(n, dtype=torch.float64)
    for start in range(0, n, BLOCK):
        rows = slice(start, start + BLOCK)
        log_p = logits[rows].double().log_softmax(dim=1)
        p = log_p.exp()
        divergence[rows] = torch.where(p > 0, p * (log_p - log_marginal[place[rows]]), 0.0).sum(dim=1)
    mean = torch.zeros(splits, dtype=torch.float64).index_add_(0, place, divergence) / count
    scores = mean.exp()
    influence = (n / (splits * count) * scores)[place] * (divergence - mean[place])
    return Measured(float(scores.mean()), of_influence(influence.numpy()) if n > 1 else None)


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

    The error comes from each sample's share in the statistic (its first-order projection).
    """
    n, m = len(samples), len(reference)
    if min(n, m) < 2:
        raise ValueError(f"kernel distance: wanted 2 samples or more on both sides, got {n} and {m}")
    own, theirs = _self_sums(samples, device) / (n - 1), _self_sums(reference, device) / (m - 1)
    across, _ = _kernel_sums(samples, reference, device)
    across = across / m
    value = own.mean() + theirs.mean() - 2 * across.mean()
    return Measured(float(value), of_influence(2 * (own - across).cpu().numpy()))


INFINITY_SIZES = 8


def frechet_infinity(features: Rows, reference: Gaussian, seed: int = 0) -> Measured:
    """FID∞ (Chong & Forsyth 2020): where the distance goes for N → ∞.

    A line through the distances of eight nested random subsets of N/4 to N samples against 1/N; its value at 0. The
    value is a weighted sum of the distances, so a sample counts in it by the weights of the subsets that it is in.
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
    weights = np.linalg.pinv(np.stack([np.ones(INFINITY_SIZES), 1 / sizes], axis=1))[0]
    influence = frechet_influence(total.gaussian(), reference)
    deviations = None
    if influence is not None:
        of_all = np.concatenate([influence(features[i : i + BLOCK].numpy()) for i in range(0, n, BLOCK)])
        share = np.cumsum((weights * n / sizes)[::-1])[::-1]  # of a sample that is in this subset and all larger ones
        deviations = of_influence(share[member] * (of_all - of_all.mean()))
    return Measured(float(weights @ distances), deviations)


DIRECTIONS = 1024


def sliced_distance(samples: Rows, reference: Rows, device: torch.device, seed: int = 0) -> Measured:
    """MIND: 3 d times the mean squared Wasserstein distance of features along random directions of the unit sphere.

    Along a direction the samples' sorted projections are carried to the reference's, N to M by their quantiles; the
    influence of a sample is the potential of that transport.
    """
    d = samples[:1].shape[1]
    directions = torch.randn(d, DIRECTIONS, generator=torch.Generator().manual_seed(seed))
    directions = (directions / directions.norm(dim=0)).to(device)
    n, total, influence = len(samples), 0.0, torch.zeros(len(samples), dtype=torch.float64, device=device)
    for columns in directions.split(64, dim=1):
        ours, theirs = (
            torch.cat([rows[i : i + BLOCK].to(device) @ columns for i in range(0, len(rows), BLOCK)]).double()
            for rows in (samples, reference)
        )
        ours, order = ours.sort(dim=0)
        place = ((torch.arange(n, device=device) + 0.5) / n * len(reference)).long()
        away = ours - theirs.sort(dim=0).values[place]
        total += float(away.square().mean(dim=0).sum())
        steps = (ours[1:] - ours[:-1]) * (away[1:] + away[:-1])  # 2 ∫ (x − T(x)) dx between neighbours
        potential = torch.cat([torch.zeros_like(ours[:1]), steps.cumsum(dim=0)])
        influence += torch.empty_like(ours).scatter_(0, order, potential).sum(dim=1)
    factor = 3 * d / DIRECTIONS
    return Measured(factor * total, of_influence(factor * influence.cpu().numpy()))


def class_distance(samples: Rows, reference: Rows) -> Measured:
    """Half the sum of `|p − q|` over the classes that Inception sees first (top-1): 0 for equal histograms, 1 at most.

    FID follows the histogram of ImageNet's classes (Kynkäänniemi et al. 2022); this tells how much there is to follow.
    """
    ours, theirs = (
        torch.cat([rows[i : i + BLOCK].argmax(dim=1) for i in range(0, len(rows), BLOCK)])
        for rows in (samples, reference)
    )
    classes = samples[:1].shape[1]
    away = ours.bincount(minlength=classes) / len(ours) - theirs.bincount(minlength=classes) / len(theirs)
    return Measured(float(away.abs().sum() / 2), of_influence((away.sign()[ours] / 2).double().numpy()))
