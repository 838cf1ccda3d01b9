"""Intervals, and what is saved of them."""

import numpy as np
import pytest

from olmax import scaling
from olmax.errors import UserError
from olmax.scaling import resampling
from olmax.scaling.coverage import coverage_study, truth_of

TASKS = ("piqa_val", "hellaswag_val")
SEVEN = scaling.Target("7B", 6_887_575_552, 3_945_065_873_408)


@pytest.fixture(scope="module")
def small(runs):
    return scaling.fit_ladder(runs, tasks=scaling.get_tasks(TASKS), check=False)


@pytest.fixture(scope="module")
def draws(runs, small):
    return scaling.resample(runs, small, samples=60, seed=0)


def test_whole_runs_are_drawn(draws):
    assert draws.counts.shape == (60, 16)
    assert (draws.counts.sum(1) == 16).all()
    assert draws.failures() == {"piqa_val": 0, "hellaswag_val": 0}


def test_intervals_hold_the_prediction_and_grow_with_the_level(small, draws):
    table = draws.table(SEVEN)
    predicted = small.predict(SEVEN)["accuracy"]
    for name in TASKS:
        assert table.loc[name, "low"] < predicted[name] < table.loc[name, "high"]
        narrow = draws.interval(name, SEVEN, level=0.5)
        assert table.loc[name, "low"] <= narrow[0] < narrow[1] <= table.loc[name, "high"]
    # As in an independent run of the same procedure with 100 resamples.
    assert table.loc["piqa_val", "expected_low"] == pytest.approx(0.793, abs=0.012)
    assert table.loc["piqa_val", "expected_high"] == pytest.approx(0.829, abs=0.012)


def test_failures_are_counted_and_stay(draws):
    import dataclasses

    task = draws.tasks["piqa_val"]
    broken = dataclasses.replace(task, failed=np.arange(60) < 7)
    counted = dataclasses.replace(draws, tasks={**draws.tasks, "piqa_val": broken})
    assert counted.failures()["piqa_val"] == 7
    assert counted.table(SEVEN).loc["piqa_val", "failures"] == 7


def test_saving_keeps_predictions_and_provenance(tmp_path, runs, small, draws):
    path = scaling.save(tmp_path / "ladder.json", small, draws)
    again = scaling.load(path)
    old = small.predict(SEVEN).join(draws.table(SEVEN))
    np.testing.assert_allclose(again.predict(SEVEN).to_numpy(), old.to_numpy(), rtol=1e-6)
    assert again.fit.runs[0]["sha256"] == runs[0].sha256
    assert again.fit.procedure == small.procedure
    assert any(
        "inside the fitted range" in w for w in again.warnings(scaling.Target("x", 2e8, 4e9))
    )
    assert again.warnings(SEVEN) == []


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match=r"x\.json: not a fitted ladder"):
        scaling.load(tmp_path / "x.json")


def test_a_simulated_ladder_has_the_shape_and_noise_of_the_real_one(runs, small):
    truth = truth_of(runs, small, "piqa_val")
    ladder = truth.ladder(np.random.default_rng(0))
    assert [len(r.table) for r in ladder] == [len(r.table) for r in runs]
    simulated = np.array([r.values(truth.task, "task_loss")[-5:].mean() for r in ladder])
    real = small.tasks["piqa_val"].feature(
        np.array([[r.parameters for r in runs], [r.tokens[-1] for r in runs]])
    )
    residual = np.log(simulated / real)
    assert 0.3 * truth.run_loss < residual.std() < 2 * truth.run_loss


@pytest.mark.slow
def test_intervals_cover(runs, small):
    study = coverage_study(runs, small, [SEVEN], simulations=80, samples=100, seed=1)
    assert len(study) == 80
    # 80 draws of a coverage of 85 to 95% lie in here nearly always.
    assert 0.75 <= study["covers_run"].mean() <= 1.0


def test_draws_are_reproducible():
    np.testing.assert_array_equal(
        resampling.draw_counts(16, 5, seed=4), resampling.draw_counts(16, 5, seed=4)
    )
