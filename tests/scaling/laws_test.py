"""Values and derivatives of the laws."""

import numpy as np
import pytest

from olmax.scaling.laws import LAWS

RNG = np.random.default_rng(0)
INPUTS = {
    "N": np.array([1e8, 4e8, 1e9]),
    "D": np.array([2e9, 3e10, 2e11]),
    "C": np.array([1e18, 1e19, 1e21]),
    "L": np.array([0.5, 0.9, 2.0]),
}


def inputs_of(law):
    return [INPUTS[name] for name in law.inputs]


@pytest.mark.parametrize("name", LAWS)
def test_derivatives(name):
    law = LAWS[name]
    p = np.clip(np.array(law.start) + 0.01, law.lower, law.upper)
    x = inputs_of(law)
    _, slopes = law.function(np, list(p), x)
    for i in range(len(p)):
        h = 1e-6 * max(1, abs(p[i]))
        up, down = p.copy(), p.copy()
        up[i] += h
        down[i] -= h
        numeric = (law(up, *x) - law(down, *x)) / (2 * h)
        np.testing.assert_allclose(
            np.broadcast_to(slopes[i], numeric.shape), numeric, rtol=2e-5, atol=1e-8
        )


@pytest.mark.parametrize("name", [n for n, law in LAWS.items() if law.curvature])
def test_second_derivatives(name):
    law = LAWS[name]
    p = np.clip(np.array(law.start) + 0.01, law.lower, law.upper)
    x = inputs_of(law)
    bends = law.curvature(np, list(p), x)
    for i in range(len(p)):
        h = 1e-6 * max(1, abs(p[i]))
        up, down = p.copy(), p.copy()
        up[i] += h
        down[i] -= h
        above, below = (law.function(np, list(q), x)[1] for q in (up, down))
        for j in range(i, len(p)):
            numeric = (np.asarray(above[j]) - np.asarray(below[j])) / (2 * h)
            expected = bends.get((i, j), np.zeros(3))
            np.testing.assert_allclose(
                np.broadcast_to(numeric, expected.shape), expected, rtol=1e-4, atol=1e-6
            )


@pytest.mark.parametrize("name", [n for n, law in LAWS.items() if law.released])
def test_released_arithmetic_is_the_same_function(name):
    law = LAWS[name]
    x = inputs_of(law)
    value, slopes = law.function(np, list(law.start), x)
    other, others = law.released(np, list(law.start), x)
    np.testing.assert_allclose(value, other, rtol=1e-10)
    for a, b in zip(slopes, others, strict=True):
        np.testing.assert_allclose(np.broadcast_to(a, value.shape), b, rtol=1e-9, atol=1e-12)


def test_bounds_move_the_start_and_are_reported():
    law = LAWS["sigmoid"].bounded(a=(-0.5, -0.4), b=(0.999, 1.0))
    assert law.start[0] == -0.5
    assert law.at_bounds([-0.45, 1.0, 3.0, 1.0]) == ("b",)


def test_logistic_does_not_overflow():
    with np.errstate(over="raise", invalid="raise"):
        assert LAWS["sigmoid"]([-1, 1.0, 1e3, 1.0], 50.0) == 0.0
