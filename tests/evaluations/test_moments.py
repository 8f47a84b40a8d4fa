"""Streaming moments and the Fréchet distance: closed forms, invariances, and its standard error."""

import numpy as np
import pytest
import scipy.linalg

from evaluations import moments
from evaluations.moments import (
    Gaussian,
    Moments,
    frechet_distance,
    frechet_influence,
    frechet_jackknife,
)


def definite(rng, d, decay=3.0):
    """A covariance whose eigenvalues fall by e^decay."""
    q, _ = np.linalg.qr(rng.standard_normal((d, d)))
    return (q * np.exp(-np.linspace(0, decay, d))) @ q.T


def features(seed=0, n=400, d=12):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + rng.standard_normal(d)).astype(np.float32)


@pytest.mark.parametrize("decay", [1, 8, 40])
def test_commuting_covariances(decay):
    rng = np.random.default_rng(1)
    q, _ = np.linalg.qr(rng.standard_normal((30, 30)))
    a, b = np.exp(-np.linspace(0, decay, 30)), rng.permutation(np.exp(-np.linspace(0, decay, 30)))
    mean = rng.standard_normal((2, 30))
    distance = frechet_distance(Gaussian(mean[0], (q * a) @ q.T), Gaussian(mean[1], (q * b) @ q.T))
    wanted = ((mean[0] - mean[1]) ** 2).sum() + ((a**0.5 - b**0.5) ** 2).sum()
    assert abs(distance.value - wanted) <= 1e-9 * (a.sum() + b.sum())


def test_transported_covariance():
    rng = np.random.default_rng(2)
    first, a = definite(rng, 40), definite(rng, 40, 1.0)
    distance = frechet_distance(Gaussian(np.zeros(40), first), Gaussian(np.zeros(40), a @ first @ a))
    assert distance.cross_trace == pytest.approx(np.trace(a @ first), rel=1e-10)


def test_the_three_ways_agree(monkeypatch):
    x, y = features(3), features(4)
    first, second = Moments.of(x).gaussian(), Moments.of(y).gaussian()
    by_cholesky = frechet_distance(first, second).value
    by_features = frechet_distance(first.with_features(x), second.with_features(y)).value
    by_root = scipy.linalg.sqrtm(first.covariance @ second.covariance).real
    monkeypatch.setattr(moments, "ACCURACY", 0.0)
    by_nuclear_norm = frechet_distance(first, second).value
    wanted = ((first.mean - second.mean) ** 2).sum() + np.trace(first.covariance + second.covariance - 2 * by_root)
    for value in (by_cholesky, by_nuclear_norm, by_features):
        assert value == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("n", [400, 8])
def test_identical_sets_are_at_distance_zero(n):
    x = features(5, n)
    gaussian = Moments.of(x).gaussian()
    gaussian = gaussian.with_features(x) if n < 12 else gaussian
    assert abs(frechet_distance(gaussian, gaussian).value) <= 1e-9


@pytest.mark.parametrize("seed", range(8))
def test_no_distance_of_equal_sets_is_below_zero(seed):
    x = (np.random.default_rng(seed).standard_normal((200, 24)) * np.geomspace(1, 1e-3, 24)).astype(np.float32)
    found = frechet_distance(Moments.of(x).gaussian(), Moments.of(x[::-1].copy()).gaussian()).value
    assert found >= 0
    assert not np.signbit(found)


def test_fewer_samples_than_dimensions():
    x, y = features(6, n=7), features(7, n=300)
    second = Moments.of(y).gaussian()
    exact = frechet_distance(Moments.of(x).gaussian().with_features(x), second).value
    without_features = frechet_distance(Moments.of(x).gaussian(), second).value
    assert without_features == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("cuts", [[], [200], [3, 3, 90, 91, 250, 399]])
def test_any_cut_and_order_give_the_same_distance(cuts):
    x, second = features(8), Moments.of(features(9)).gaussian()
    whole = Moments.of(x).gaussian()
    order = np.random.default_rng(0).permutation(len(x))
    parts = [Moments.of(part) for part in np.split(x[order], cuts)]
    cut = Moments.sum(parts[::-1]).gaussian()
    assert cut.n == len(x)
    scale = np.trace(whole.covariance) + np.trace(second.covariance)
    assert abs(frechet_distance(cut, second).value - frechet_distance(whole, second).value) <= 1e-9 * scale
    np.testing.assert_allclose(whole.covariance, np.cov(x.astype(np.float64).T), rtol=1e-9, atol=1e-9)


def test_distance_is_symmetric_and_its_parts_add_up():
    first, second = Moments.of(features(10)).gaussian(), Moments.of(features(11)).gaussian()
    distance = frechet_distance(first, second)
    assert distance.value == pytest.approx(frechet_distance(second, first).value, rel=1e-10)
    assert distance.value == distance.mean_term + sum(distance.traces) - 2 * distance.cross_trace


def test_influence_is_the_derivative():
    """Mixing a little of one point into the samples' Gaussian changes the distance as IF says."""
    x, reference = features(12), Moments.of(features(13)).gaussian()
    samples = Moments.of(x).gaussian()
    influence = frechet_influence(samples, reference)
    points = features(14, n=5).astype(np.float64)

    def mixed(weight, point):
        mean = (1 - weight) * samples.mean + weight * point
        away = point - samples.mean
        return Gaussian(mean, (1 - weight) * samples.covariance + weight * (1 - weight) * np.outer(away, away))

    weight = 1e-5
    values = influence(points)
    # IF is known up to a constant, which is that of the mean over the samples' Gaussian: tr((I − T)Σ).
    offset = np.mean(influence(x)) * len(x) / (len(x) - 1)
    for point, value in zip(points, values, strict=True):
        ahead, behind = (frechet_distance(mixed(w, point), reference).value for w in (weight, -weight))
        assert (ahead - behind) / (2 * weight) == pytest.approx(value - offset, rel=1e-3, abs=1e-2)


def test_errors_are_those_of_repeated_draws():
    reference = Moments.of(features(15, n=4000)).gaussian()
    population = features(16, n=20000)
    rng = np.random.default_rng(0)
    values, errors, jackknifed = [], [], []
    for _ in range(200):
        x = population[rng.integers(0, len(population), 300)]
        samples = Moments.of(x).gaussian()
        values.append(frechet_distance(samples, reference).value)
        errors.append(frechet_influence(samples, reference)(x).std(ddof=1) / len(x) ** 0.5)
        if len(jackknifed) < 3:
            jackknifed.append(np.linalg.norm(frechet_jackknife(x, reference)))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.2)
    assert np.mean(jackknifed) == pytest.approx(np.std(values), rel=0.35)


def test_influence_where_samples_do_not_differ_in_all_directions():
    """A feature that is the same for all samples adds its distance and nothing to the error."""
    x, y = features(18), features(19)
    samples, reference = Moments.of(x).gaussian(), Moments.of(y).gaussian()
    constant = [np.concatenate([z, np.full((len(z), 1), value)], axis=1) for z, value in ((x, 0.0), (y, 3.0))]
    wide = [Moments.of(z).gaussian() for z in constant]
    np.testing.assert_allclose(
        frechet_influence(*wide)(constant[0]), frechet_influence(samples, reference)(x), rtol=1e-6, atol=1e-6
    )
    assert frechet_distance(*wide).value == pytest.approx(frechet_distance(samples, reference).value + 9, rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(9, 12), (30, 12)])
def test_jackknife_leaves_out_one_at_a_time(n, d):
    x, reference = features(20, n, d), Moments.of(features(21, 300, d)).gaussian()
    distances = []
    for left_out in range(n):
        rest = np.delete(x, left_out, axis=0)
        distances.append(frechet_distance(Moments.of(rest).gaussian().with_features(rest), reference).value)
    wanted = ((n - 1) * np.var(distances)) ** 0.5
    assert np.linalg.norm(frechet_jackknife(x, reference)) == pytest.approx(wanted, rel=1e-5)


def test_no_influence_where_all_samples_are_the_same():
    x = features(17, n=6)
    assert frechet_influence(Gaussian(np.zeros(2), np.zeros((2, 2))), Gaussian(np.zeros(2), np.eye(2))) is None
    with pytest.raises(ValueError, match="2 samples or more, got 1"):
        Moments.of(x[:1]).gaussian()
