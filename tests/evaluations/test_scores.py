"""Inception score, kernel distance and FID∞ against definitions and limits."""

import math

import numpy as np
import pytest
import torch

from evaluations import scores
from evaluations.moments import Moments, frechet_distance
from evaluations.scores import frechet_infinity, inception_score, kernel_distance


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
    found = inception_score(x.split(cut), n)
    assert found.value == pytest.approx(np.mean(values), rel=1e-12)
    if n > split:
        assert found.error == pytest.approx(np.std(values, ddof=1) / len(values) ** 0.5, rel=1e-12)
    else:
        assert found.error is None


def test_inception_score_of_certain_and_of_blind_networks():
    certain = torch.eye(10).repeat(20, 1) * 100
    assert inception_score([certain], 200).value == pytest.approx(10)
    assert inception_score([torch.zeros(200, 10)], 200).value == pytest.approx(1)


def test_shuffling_mends_sorted_classes(monkeypatch):
    monkeypatch.setattr(scores, "SPLIT", 100)
    in_classes = torch.eye(10).repeat_interleave(100, dim=0) * 100
    assert inception_score([in_classes], 1000).value == pytest.approx(1)
    order = np.random.default_rng(0).permutation(1000)
    assert inception_score([in_classes], 1000, order).value > 8


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


def test_kernel_distance_error_is_that_of_repeated_draws():
    values, errors = [], []
    for seed in range(60):
        found = kernel_distance(logits(80, 5, 100 + seed, 1.0), logits(80, 5, 500 + seed, 1.6), torch.device("cpu"))
        values.append(found.value)
        errors.append(found.error)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.3)


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
