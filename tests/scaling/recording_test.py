"""Metrics in the released format, on a hand-made table of log-likelihoods."""

import json
import math

import numpy as np
import pytest

from olmax import scaling
from olmax.errors import UserError
from olmax.evaluation.metrics import ScoredChoice, ScoredQuestion
from olmax.evaluation.requests import Choice, Question
from olmax.scaling.recording import released_metrics, write_run


def question(texts, logprobs, gold):
    choices = tuple(Choice("Answer:", text, None) for text in texts)
    scored = tuple(
        ScoredChoice(lp, 3, len(text), len(text.encode()))
        for lp, text in zip(logprobs, texts, strict=True)
    )
    return Question(0, "0", choices, gold), ScoredQuestion(scored, gold)


def test_bytes_for_bits_and_characters_for_accuracy():
    # "naïve café": 10 characters, 12 bytes. By bytes the other option would win.
    asked, scored = question([" naïve café", " plain words"], [-11.0, -11.5], 1)
    found = released_metrics([asked], [scored])
    assert found["bpb"] == pytest.approx(11.5 / 11 / math.log(2))
    assert -11.0 / 12 > -11.5 / 11 > -11.0 / 10
    assert found["len_norm"] == 1.0
    per = np.array([-11.0 / 10, -11.5 / 11])
    assert found["soft_log"] == pytest.approx(per[1] - np.log(np.exp(per).sum()))
    asked, scored = question([" naïve café", " plain words"], [-11.0, -11.5], 0)
    assert released_metrics([asked], [scored])["bpb"] == pytest.approx(11.0 / 12 / math.log(2))


def test_the_leading_space_counts_in_no_length():
    one = released_metrics(*([x] for x in question([" ab", " cd"], [-1.0, -2.0], 0)))
    other = released_metrics(*([x] for x in question(["ab", "cd"], [-1.0, -2.0], 0)))
    assert one == other
    assert one["bpb"] == pytest.approx(1.0 / 2 / math.log(2))


def test_a_tie_goes_to_the_first():
    asked, scored = question([" ab", " cd"], [-1.0, -1.0], 1)
    assert released_metrics([asked], [scored])["len_norm"] == 0.0


def test_a_run_is_written_and_read(tmp_path):
    rows = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "eval/downstream_bpb/t_rc_bpb": 2.0, "eval/downstream/t_rc_len_norm": 0.25},
        {"step": 2, "eval/downstream_soft_log/t_rc_soft_log": -1.4},
        {"step": 4, "eval/downstream_bpb/t_rc_bpb": 1.5, "eval/downstream/t_rc_len_norm": 0.5}
        | {"eval/downstream_soft_log/t_rc_soft_log": -1.2},
    ]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = dict(batch_tokens=64, learning_rate=0.01, parameters=1000, flops_per_token=7e3)
    write_run(metrics, tmp_path / "1K-1xC.csv", **settings)
    run = scaling.read_run(tmp_path / "1K-1xC.csv")
    assert (run.size, run.parameters, run.flops_per_token) == ("1K", 1000, 7000)
    np.testing.assert_array_equal(run.tokens, [128, 256])
    (task,) = scaling.find_tasks(run.table.columns)
    np.testing.assert_array_equal(run.values(task, "rc_accuracy"), [0.25, 0.5])
    np.testing.assert_array_equal(run.values(task, "task_ce"), [1.4, 1.2])
    metrics.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(UserError, match="no evaluations"):
        write_run(metrics, tmp_path / "x.csv", **settings)
