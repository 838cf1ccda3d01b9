"""Predicted scores beside a plan, and the cheapest model of the same score."""

import dataclasses

import numpy as np
import pytest
from rich.console import Console

from olmax import scaling
from olmax.errors import UserError
from olmax.scaling.budget import ALL, add_outlook, outlook, outlook_tables, same_score
from olmax.scaling.procedure import VARIANTS

SEVEN = scaling.Target("7B", 6_887_575_552, 3_945_065_873_408)


def test_the_optimum_is_where_both_terms_fall_alike(fit):
    # At the least N D on a curve of constant loss: alpha A / N^alpha = beta B / D^beta.
    found = same_score(fit, SEVEN, ("mmlu",))
    p = fit.tasks["mmlu"].step1.parameters
    of_n = p["alpha"] * np.exp(p["log_A"]) / found.parameters ** p["alpha"]
    of_d = p["beta"] * np.exp(p["log_B"]) / found.tokens ** p["beta"]
    assert of_n == pytest.approx(of_d, rel=1e-2)
    again = fit.predict(scaling.Target("", found.parameters, found.tokens))
    assert again.loc["mmlu", "accuracy"] == pytest.approx(found.score, abs=1e-6)
    assert found.compute_ratio == pytest.approx(
        found.parameters * found.tokens / (SEVEN.parameters * SEVEN.tokens)
    )
    assert found.compute_ratio < 0.7 and not found.at_edge


def test_an_optimal_plan_cannot_be_improved(fit):
    best = same_score(fit, SEVEN, ("mmlu", "piqa_val"))
    again = same_score(fit, scaling.Target("", best.parameters, best.tokens), ("mmlu", "piqa_val"))
    assert again.compute_ratio == pytest.approx(1.0, abs=1e-4)


def test_an_outlook_goes_into_the_plan(fit, capsys):
    plan = {"tokens": 3.9e12, "price": 1e6}
    saved = scaling.SavedLadder(fit)
    add_outlook(saved, plan, "olmo2-7b", 4096, Console(width=140))
    out = capsys.readouterr().out
    assert "The same score for less" in out and ALL in out
    stored = plan["ladder"]
    assert stored["target"]["parameters"] == 6_887_575_552
    assert stored["predictions"]["mmlu"]["accuracy"] == pytest.approx(0.484, abs=1e-3)
    assert 0 < stored["same_score"][ALL]["compute_ratio"] < 1


def test_intervals_are_shown_where_there_are_draws(runs):
    fit = scaling.fit_ladder(runs, tasks=[scaling.TASKS["piqa_val"]], check=False)
    draws = scaling.resample(runs, fit, samples=20)
    found = outlook(scaling.SavedLadder(fit, draws), SEVEN, price=5e5)
    assert found.predictions["piqa_val"]["low"] < found.predictions["piqa_val"]["high"]
    scores, less = outlook_tables(found)
    assert [c.heading for c in scores.columns][1:] == ["predicted %", "from", "to"]
    assert len(less.rows) == 1


def test_compute_alone_says_nothing_about_sizes(runs):
    task = [scaling.TASKS["piqa_val"]]
    fit = scaling.fit_ladder(runs, tasks=task, procedure=VARIANTS["flops"], check=False)
    with pytest.raises(UserError, match="over FLOPs alone"):
        same_score(fit, SEVEN, ("piqa_val",))
    seven = dataclasses.replace(SEVEN, flops_per_token=49_412_071_424)
    found = outlook(scaling.SavedLadder(fit), seven)
    assert found.same_score == {} and "FLOPs alone" in found.warnings[-1]
    assert len(outlook_tables(found)) == 1
