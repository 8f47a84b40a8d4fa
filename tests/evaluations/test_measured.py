"""Standard errors: what they are made of, and whether they are those of repeated draws."""

import numpy as np
import pytest
from calibration import CASES, calibrate

from evaluations.measured import Measured, of_influence, of_parts, of_share, wilson

DRAWS = 60
NOISE = 3 / (2 * DRAWS) ** 0.5
"""Three standard errors of a spread seen over so many draws, as a share of it."""
CONSERVATIVE = {"coverage", "recall"}
"""Their errors, by parts of the samples, may be up to half as large again (docs/evaluation.md)."""


def test_error_of_a_mean():
    x = np.random.default_rng(0).random(50)
    found = of_share(x)
    assert found.error == pytest.approx(x.std(ddof=1) / 50**0.5)
    y = x + 0.1 * np.random.default_rng(1).random(50)
    difference = found.minus(of_share(y))
    assert difference.value == pytest.approx((x - y).mean())
    assert difference.error == pytest.approx((x - y).std(ddof=1) / 50**0.5)


def test_no_error_where_either_has_none():
    assert Measured(2.0, of_influence(np.arange(3.0))).minus(Measured(1.0)).error is None
    assert Measured(1.0).described() == {"value": 1.0, "error": None}


def test_parts_of_a_mean_give_the_error_of_a_mean():
    rng = np.random.default_rng(0)
    x = rng.random(200)
    parts = np.array([rng.permutation(x)[:120].mean() for _ in range(4000)])
    assert np.linalg.norm(of_parts(parts, 0.6)) == pytest.approx(of_share(x).error, rel=0.05)


def test_interval_at_the_ends():
    assert wilson(0.0, 100) == pytest.approx((0.0, 0.037), abs=1e-3)
    assert wilson(1.0, 100) == pytest.approx((0.963, 1.0), abs=1e-3)
    low, high = wilson(0.3, 10_000)
    assert (low + high) / 2 == pytest.approx(0.3, abs=1e-3)
    assert (high - low) / 2 == pytest.approx(1.96 * (0.21 / 10_000) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("case", CASES[1:3], ids=str)
def test_claimed_errors_are_those_of_repeated_draws(case):
    for name, row in calibrate(case, DRAWS).items():
        large = 1.5 if name in CONSERVATIVE else 1.15
        assert 0.85 - NOISE < row["claimed_over_true"] < large + NOISE, name
        assert row["difference_claimed_over_true"] > 0.85 - NOISE, name
        if abs(row["difference"]) > row["difference_spread"]:
            assert row["difference_claimed_over_true"] < large + NOISE, name
        assert row["difference_claimed_over_true"] < row["difference_unpaired_over_true"], name
