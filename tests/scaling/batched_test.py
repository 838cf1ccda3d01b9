"""The batched solver against scipy, planted truths and traps."""

import jax
import numpy as np
import pytest

from olmax import scaling
from olmax.scaling import batched, reference
from olmax.scaling.laws import POWER_ND, SIGMOID, SINGLE_STEP
from olmax.scaling.prepare import prepare
from olmax.scaling.resampling import draw_counts

TRUTH = np.array([6.0, 7.0, 0.33, 0.27, 0.6])
GRID = np.array(
    [(n, d) for n in (1e8, 3e8, 8e8, 2e9) for d in (2e9, 1e10, 4e10, 1e11)], np.float64
).T


def test_planted_parameters_come_back():
    values = POWER_ND(TRUTH, *GRID)
    found = batched.solve_huber(
        POWER_ND, GRID, values, np.ones((1, 16)), batched.shared_starts(POWER_ND)
    )
    np.testing.assert_allclose(found.parameters[0], TRUTH, rtol=1e-4)
    assert found.converged[0]


def test_the_process_keeps_its_precision():
    batched.solve_huber(POWER_ND, GRID, POWER_ND(TRUTH, *GRID), np.ones((1, 16)), TRUTH[None])
    assert jax.numpy.ones(1).dtype == np.float32


def test_refits_are_as_good_as_scipys(runs, fit):
    names = ["arc_challenge_test", "csqa_val"]
    counts = draw_counts(16, 12, seed=3)
    for name in names:
        data = prepare(runs, scaling.TASKS[name], fit.procedure)
        weights1, weights2 = data.resampled(counts)
        starts = np.array([POWER_ND.start, fit.tasks[name].step1.vector])
        mine = batched.solve_huber(POWER_ND, data.inputs, data.values, weights1, starts)
        # One round with the others' solutions, as resampling does.
        lent = np.broadcast_to(mine.parameters, (12, 12, 5))
        mine = batched.polish_huber(POWER_ND, data.inputs, data.values, weights1, lent).better(mine)
        second = batched.solve_squares(
            data.step2_law, data.x[None], data.y, data.groups, weights2, np.array([SIGMOID.start])
        )
        for b in range(12):
            theirs = min(
                reference.minimise_huber(
                    POWER_ND, data.inputs, data.values, weights1[b], start=tuple(s)
                ).objective
                for s in starts
            )
            assert mine.objective[b] <= theirs * (1 + 1e-6)
            stated = reference.huber_objective(
                POWER_ND, mine.parameters[b], data.inputs, data.values, weights1[b]
            )
            assert stated == pytest.approx(mine.objective[b], rel=1e-9)
            w = weights2[b][data.groups]
            theirs = reference.minimise_squares(
                data.step2_law, data.x[None, w > 0], data.y[w > 0], w[w > 0]
            ).objective
            assert second.objective[b] <= theirs * (1 + 1e-6)


def test_single_step_has_a_batched_fit_too(runs):
    procedure = scaling.VARIANTS["single_step"]
    data = prepare(runs, scaling.TASKS["piqa_val"], procedure)
    theirs = reference.minimise_huber(data.step1_law, data.inputs, data.values)
    mine = batched.solve_huber(
        SINGLE_STEP,
        data.inputs,
        data.values,
        data.weights[None],
        np.array([data.step1_law.start, theirs.parameters]),
    )
    assert mine.objective[0] <= theirs.objective * (1 + 1e-6)


def test_the_objective_is_a_sum():
    # A mean over points would be the same minimum and stop optimisers sixteen times earlier.
    values = POWER_ND(TRUTH, *GRID) * 1.01
    one = reference.huber_objective(POWER_ND, TRUTH, GRID[:, :1], values[:1])
    all_ = reference.huber_objective(POWER_ND, TRUTH, GRID, values)
    assert all_ == pytest.approx(16 * one, rel=1e-6)
