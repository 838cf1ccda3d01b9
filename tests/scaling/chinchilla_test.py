"""Approaches 2 and 3 on planted surfaces."""

import numpy as np
import pytest

from olmax.errors import UserError
from olmax.scaling.chinchilla import fit_isoflop, fit_surface
from olmax.scaling.laws import POWER_ND

# The published refit of Chinchilla's data (Besiroglu et al., arXiv 2404.10102).
CHINCHILLA = np.array([np.log(477.05), np.log(2141.9), 0.34721, 0.36714, 1.81705])


def test_a_planted_surface_and_its_optimum_come_back():
    rng = np.random.default_rng(0)
    n = np.exp(rng.uniform(np.log(5e7), np.log(1e10), 60))
    d = n * np.exp(rng.uniform(np.log(3), np.log(300), 60))
    surface = fit_surface(n, d, POWER_ND(CHINCHILLA, n, d), starts=20)
    np.testing.assert_allclose(surface.vector, CHINCHILLA, rtol=1e-3)
    best_n, best_d = surface.optimum(6e22)
    sizes = best_n * np.geomspace(0.5, 2, 41)
    losses = surface.loss(sizes, 6e22 / 6 / sizes)
    assert np.argmin(losses) == 20
    assert best_n * best_d * 6 == pytest.approx(6e22)
    n2, d2 = surface.cheapest(float(surface.loss(best_n, best_d)))
    assert n2 == pytest.approx(best_n, rel=1e-6) and d2 == pytest.approx(best_d, rel=1e-6)
    with pytest.raises(UserError, match="out of reach"):
        surface.cheapest(1.5)


def test_isoflop_exponent():
    budgets = np.repeat([1e19, 1e20, 1e21, 1e22], 7)
    alpha, beta = CHINCHILLA[2], CHINCHILLA[3]
    log_g = (np.log(alpha / beta) + CHINCHILLA[0] - CHINCHILLA[1]) / (alpha + beta)
    best = np.exp(log_g) * (budgets / 6) ** (beta / (alpha + beta))
    n = best * np.tile(np.geomspace(0.5, 2, 7), 4)
    fit = fit_isoflop(budgets, n, POWER_ND(CHINCHILLA, n, budgets / 6 / n))
    assert fit.exponent == pytest.approx(beta / (alpha + beta), abs=2e-3)
    assert fit.at_edge == ()
    assert len(fit.budgets) == 4


def test_isoflop_needs_budgets():
    with pytest.raises(UserError, match="two budgets"):
        fit_isoflop([1e19, 1e20], [1e8, 1e8], [3.0, 2.9])
