"""Leaving out one size at a time."""

import dataclasses

import pytest

from olmax import scaling
from olmax.errors import UserError
from olmax.scaling.holdout import candidates, leave_one_size_out, ranking


def test_a_held_out_size_is_not_fitted(runs):
    task = scaling.TASKS["piqa_val"]
    table = leave_one_size_out(runs, [task], {"task_loss": scaling.PUBLISHED})
    assert len(table) == 16
    kept = [r for r in runs if r.size != "1.3B"]
    alone = scaling.fit_ladder(kept, tasks=[task], check=False)
    held = next(r for r in runs if r.name == "1B-5xC")
    row = table[table["run"] == "1B-5xC"].iloc[0]
    expected = alone.predict(scaling.Target.of(held)).loc["piqa_val", "accuracy"]
    assert row["predicted"] == pytest.approx(expected, abs=1e-9)


def test_means_of_two_kinds_compete(runs):
    procedures = {"task_loss": scaling.PUBLISHED, "flops": scaling.VARIANTS["flops"]}
    table = leave_one_size_out(runs, [scaling.TASKS["piqa_val"]], procedures)
    ranked = ranking(table)
    assert "mean of (task_loss) and (flops)" in ranked.index
    assert ranked["all"].is_monotonic_increasing
    assert {"190M", "370M", "760M", "1.3B"} <= set(ranked.columns)


def test_candidates_contain_the_published_procedure():
    found = candidates()
    assert found["task_loss"] == scaling.PUBLISHED
    assert found["flops"] == scaling.VARIANTS["flops"]
    assert len({dataclasses.astuple(p) for p in found.values()}) == len(found)


def test_three_sizes_are_too_few(runs):
    with pytest.raises(UserError, match="at least 4 sizes"):
        leave_one_size_out(runs[:12], [scaling.TASKS["piqa_val"]], {"a": scaling.PUBLISHED})
