"""Means, ratios and their differences against brute force, and the verdicts."""

import math

import numpy as np
import pytest

from olmax.reporting import estimates
from olmax.reporting.estimates import Estimate, judge


def test_mean_and_paired_difference():
    before, after = [1.0, 2.0, 4.0], [2.0, 2.5, 6.0]
    found = estimates.mean(before)
    assert found == Estimate(7 / 3, pytest.approx(np.std(before, ddof=1) / math.sqrt(3)), 3)
    change = estimates.mean_difference(before, after)
    assert change.value == pytest.approx(3.5 / 3)
    # Pairing: much smaller than what independent samples would give.
    assert change.stderr < estimates.mean(after).stderr / 2


def test_ratio_standard_error_agrees_with_the_bootstrap():
    rng = np.random.default_rng(0)
    size = rng.uniform(100, 2000, 200)
    bits = size * rng.normal(2.0, 0.3, 200)
    found = estimates.ratio(bits, size)
    assert found.value == pytest.approx(bits.sum() / size.sum())
    picks = rng.integers(0, 200, (2000, 200))
    bootstrap = np.std([bits[p].sum() / size[p].sum() for p in picks])
    assert found.stderr == pytest.approx(bootstrap, rel=0.1)


def test_ratio_difference_is_the_difference_of_ratios():
    size, before, after = [10.0, 30.0], [20.0, 45.0], [15.0, 40.0]
    change = estimates.ratio_difference(before, after, size)
    assert change.value == pytest.approx(
        estimates.ratio(after, size).value - estimates.ratio(before, size).value
    )


def test_one_value_has_no_standard_error():
    assert math.isnan(estimates.mean([3.0]).stderr)
    assert math.isnan(estimates.ratio([3.0], [2.0]).stderr)
    assert Estimate(1.5, math.nan, 1).text(1) == "1.5"


def test_average_of_independent_estimates():
    found = estimates.average([Estimate(1.0, 0.3, 5), Estimate(3.0, 0.4, 7)])
    assert found == Estimate(2.0, pytest.approx(0.25), 12)


def test_text():
    assert Estimate(0.1234, 0.0456, 9).text(2, signed=True) == "+0.12 ± 0.05"
    assert Estimate(0.5, 0.1, 9).scaled(-100) == Estimate(-50.0, 10.0, 9)


@pytest.mark.parametrize(
    ("value", "stderr", "n", "expected", "verdict"),
    [
        (1.0, 0.4, 50, "up", "shown"),
        (1.0, 0.4, 50, "down", "reversed"),
        (-1.0, 0.4, 50, "down", "shown"),
        (0.7, 0.4, 50, "up", "not shown"),
        (0.0, 0.0, 50, "up", "not shown"),
        (1.0, math.nan, 50, "up", "not shown"),
        (1.0, 0.1, 5, "up", "not shown"),
    ],
)
def test_verdict_follows_the_numbers(value, stderr, n, expected, verdict):
    assert judge(Estimate(value, stderr, n), expected=expected) == verdict
