"""Inception score, kernel distance and FID∞ against definitions and limits."""

import math

import numpy as np
import pytest
import torch

from evaluations import scores
from evaluations.moments import Moments, frechet_distance
from evaluations.scores import (
    class_distance,
    frechet_infinity,
    inception_score,
    kernel_distance,
    sliced_distance,
)


def logits(n, classes=10, seed=0, sharpness=3.0):
    return torch.randn(n, classes, generator=torch.Generator().manual_seed(seed)) * sharpness


def by_definition(x, split):
    values = []
    for part in x.double().softmax(dim=1).split(split):
        divergence = (part * (part.log() - part.mean(dim=0).log())).sum(dim=1).mean()
        values.append(float(divergence.exp()))
    return values


@pytest.mark.parametrize(("n", "split"), [(60, 20), (50, 20), (15, 20)])
@pytest.mark.parametrize("cut", [7, 100])
def test_inception_score_is_upstreams(monkeypatch, n, split, cut):
    monkeypatch.setattr(scores, "SPLIT", split)
    x = logits(n)
    values = by_definition(x, split)
    monkeypatch.setattr(scores, "BLOCK", cut)
    found = inception_score(x)
    assert found.value == pytest.approx(np.mean(values), rel=1e-12)


def test_inception_score_moves_as_its_influence_says(monkeypatch):
    """A sample that counts a little more moves the score by its influence: seen by doubling all others."""
    monkeypatch.setattr(scores, "SPLIT", 10_000)
    x, times = logits(20), 200
    found = inception_score(x)
    for sample in (0, 7):
        more = torch.cat([x.repeat(times, 1), x[sample : sample + 1]])
        moved = (inception_score(more).value - found.value) * (20 * times + 1)
        assert moved == pytest.approx(found.deviations[sample] * (20 * 19) ** 0.5, rel=0.01, abs=1e-3)


def test_inception_score_of_certain_and_of_blind_networks():
    certain = torch.eye(10).repeat(20, 1) * 100
    assert inception_score(certain).value == pytest.approx(10)
    assert inception_score(torch.zeros(200, 10)).value == pytest.approx(1)


def test_shuffling_mends_sorted_classes(monkeypatch):
    monkeypatch.setattr(scores, "SPLIT", 100)
    in_classes = torch.eye(10).repeat_interleave(100, dim=0) * 100
    assert inception_score(in_classes).value == pytest.approx(1)
    order = np.random.default_rng(0).permutation(1000)
    assert inception_score(in_classes, order).value > 8


def test_kernel_distance_is_the_u_statistic(monkeypatch):
    monkeypatch.setattr(scores, "BLOCK", 13)
    x, y = logits(30, 5, 1, 1.0), logits(40, 5, 2, 1.2)

    def kernel(a, b):
        return (a.double() @ b.double().T / 5 + 1) ** 3

    own, theirs = kernel(x, x), kernel(y, y)
    wanted = (
        (own.sum() - own.trace()) / (30 * 29) + (theirs.sum() - theirs.trace()) / (40 * 39) - 2 * kernel(x, y).mean()
    )
    found = kernel_distance(x, y, torch.device("cpu"))
    assert found.value == pytest.approx(float(wanted), rel=1e-6)
    with pytest.raises(ValueError, match="got 1 and 40"):
        kernel_distance(x[:1], y, torch.device("cpu"))


def test_sliced_distance_of_known_sets():
    """A shift by a vector costs 3 times its squared length (the mean of cos² over directions is 1/d), any N and M."""
    x = logits(300, 6, 1, 1.0)
    shift = torch.tensor([1.0, -2.0, 0.5, 0.0, 0.0, 1.0])
    found = sliced_distance(x + shift, x, torch.device("cpu"))
    assert found.value == pytest.approx(3 * float(shift.square().sum()), rel=0.1)
    assert sliced_distance(x, x, torch.device("cpu")).value == 0
    assert sliced_distance(x, x.repeat(3, 1), torch.device("cpu")).value == pytest.approx(0, abs=1e-10)
    assert sliced_distance(x.repeat(2, 1), x, torch.device("cpu")).value == pytest.approx(0, abs=1e-10)


def test_sliced_distance_by_definition(monkeypatch):
    monkeypatch.setattr(scores, "DIRECTIONS", 8)
    x, y = logits(40, 3, 1, 1.0), logits(40, 3, 2, 1.4)
    directions = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    directions = directions / directions.norm(dim=0)
    away = (x @ directions).sort(dim=0).values - (y @ directions).sort(dim=0).values
    assert sliced_distance(x, y, torch.device("cpu")).value == pytest.approx(
        3 * 3 / (8 * 40) * float(away.square().sum())
    )


def test_class_distance():
    one, other = torch.eye(4)[[0, 0, 1, 2]], torch.eye(4)[[0, 1, 1, 3]]
    assert class_distance(one, one[[2, 0, 3, 1]]).value == 0
    assert class_distance(one, other).value == pytest.approx(0.5)
    assert class_distance(torch.eye(4)[[0, 1]], torch.eye(4)[[2, 3]]).value == 1


def test_frechet_infinity_takes_the_bias_away():
    """Two draws of one distribution: the distance at N is above 0, its limit is 0."""
    reference = Moments.of(logits(200_000, 8, 3, 1.0).numpy()).gaussian()
    limits, at_n = [], []
    for seed in range(10):
        x = logits(400, 8, 10 + seed, 1.0)
        limits.append(frechet_infinity(x, reference, seed).value)
        at_n.append(frechet_distance(Moments.of(x.numpy()).gaussian(), reference).value)
    assert min(at_n) > 0.02
    assert abs(np.mean(limits)) < np.mean(at_n) / 3
    with pytest.raises(ValueError, match="more than 32 samples"):
        frechet_infinity(logits(20, 8), reference)


def test_errors_are_finite_numbers():
    found = kernel_distance(logits(10, 5), logits(12, 5, 1), torch.device("cpu"))
    assert math.isfinite(found.error)
    assert found.error > 0
