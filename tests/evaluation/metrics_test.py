"""Metrics of questions whose scores are known."""

import math

import pytest

from olmax.evaluation.metrics import (
    ScoredChoice,
    ScoredQuestion,
    aggregate,
    macro_average,
    micro_average,
    primary_metric,
    question_metrics,
)
from olmax.reporting.estimates import Estimate


def question(*choices, gold=0):
    return ScoredQuestion(tuple(ScoredChoice(*choice) for choice in choices), gold)


def test_each_normalisation_can_pick_another_choice():
    # logprob, tokens, chars, bytes, unconditional
    scored = question(
        (-10.0, 2, 10, 30, -11.0),  # raw
        (-12.0, 3, 20, 20, -11.0),  # per char: -0.6; per token: -4
        (-15.0, 5, 16, 40, -15.5),  # per byte: -0.375; per token: -3
        (-20.0, 4, 20, 25, -29.0),  # pmi: +9
    )
    winners = {}
    for gold in range(4):
        for name, value in question_metrics(ScoredQuestion(scored.choices, gold)).items():
            if name.startswith("acc_") and value:
                winners[name] = gold
    # Per byte the values are -0.333, -0.6, -0.375, -0.8: the first wins there as well.
    assert winners == {
        "acc_raw": 0,
        "acc_per_char": 1,
        "acc_per_byte": 0,
        "acc_per_token": 2,
        "acc_uncond": 3,
    }


def test_ties_share_the_credit():
    tied = question((-1.0, 1, 2, 2), (-1.0, 1, 2, 2), (-3.0, 1, 2, 2))
    assert question_metrics(tied)["acc_raw"] == 0.5


def test_bits_per_byte_and_soft_metrics():
    scored = question((math.log(0.1), 1, 2, 4), (math.log(0.3), 1, 2, 2), gold=0)
    found = question_metrics(scored)
    assert found["bits_per_byte"] == pytest.approx(-math.log2(0.1) / 4)
    assert found["soft"] == pytest.approx(0.25)
    assert found["soft_log"] == pytest.approx(math.log(0.25))
    assert "acc_uncond" not in found
    assert set(question_metrics(question((-1.0, 1, 2, 4)))) == {"bits_per_byte"}


def test_aggregates_with_standard_errors():
    right = question((-1.0, 1, 1, 1), (-2.0, 1, 1, 1), gold=0)
    wrong = question((-1.0, 1, 1, 3), (-2.0, 1, 1, 3), gold=1)
    found = aggregate([right, wrong, right, right])
    assert found["acc_raw"].value == 0.75
    # sqrt(p (1 - p) / (n - 1))
    assert found["acc_raw"].stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert found["chance"].value == 0.5
    bits = 1 / math.log(2)
    assert found["bits_per_byte"].value == pytest.approx((3 * bits + 2 * bits / 3) / 4)
    assert found["bits_per_byte_micro"].value == pytest.approx((3 * bits + 2 * bits) / 6)


def test_macro_and_micro_averages():
    tasks = [Estimate(0.5, 0.1, 10), Estimate(0.8, 0.02, 30)]
    assert macro_average(tasks).value == pytest.approx(0.65)
    assert micro_average(tasks).value == pytest.approx((5 + 24) / 40)
    assert micro_average(tasks).stderr == pytest.approx(math.hypot(1.0, 0.6) / 40)


@pytest.mark.parametrize(
    ("name", "has_choices", "told", "metric"),
    [
        ("arc_challenge_test_rc_5shot", True, "acc_per_char", "acc_per_char"),
        ("arc_challenge_test_mc_5shot", True, "acc_raw", "acc_raw"),
        ("winogrande_val_rc_5shot", True, "acc_raw", "acc_per_char"),
        ("boolq_val_rc_5shot", True, "acc_raw", "acc_raw"),
        ("basic_skills_coding_rc_5shot", True, "acc_per_token", "acc_raw"),
        ("copycolors_10way", True, "acc_raw", "acc_raw"),
        ("gsm8k_gold_bpb_5shot", False, "bits_per_byte", "bits_per_byte"),
        ("mine", True, "acc_per_byte", "acc_per_byte"),
        ("mine", True, None, "acc_per_char"),
        ("mine", False, None, "bits_per_byte"),
    ],
)
def test_the_metric_of_a_task(name, has_choices, told, metric):
    assert primary_metric(name, has_choices, {"primary_metric": told}) == metric
