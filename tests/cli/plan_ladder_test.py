"""`olmax plan --ladder`: predicted scores beside the price."""

import json

import pytest

from olmax import scaling
from olmax.cli import plan as verb
from olmax.errors import UserError
from olmax.planning import view

FITTED = [f"{size}-{k}xC.csv" for size in ("190M", "370M", "760M", "1B") for k in (1, 2, 5, 10)]
OPTIONS = dict(model="olmo2-7b", topology="v5p:2x2x1", batch_size=8, mesh="fsdp=-1", tokens=3.9e12)


@pytest.fixture
def ladder(data_dir, tmp_path):
    folder = data_dir / "ladder" / "raw" / "ladder-runs"
    if not folder.is_dir():
        pytest.skip(f"no released ladder runs at {folder}")
    runs = scaling.read_runs([folder / name for name in FITTED])
    fit = scaling.fit_ladder(runs, tasks=[scaling.TASKS["mmlu"]], check=False)
    return str(scaling.save(tmp_path / "ladder.json", fit))


def test_scores_are_printed_and_stored(ladder, tmp_path, monkeypatch, capsys):
    plan = {"tokens": 3.9e12, "price": 1e6, "step_seconds": 1.0, "machine_code": True}
    monkeypatch.setattr(verb, "make", lambda *args, **kwargs: (dict(each) for each in [plan]))
    monkeypatch.setattr(view, "summary_text", lambda plan: "summary")
    output = tmp_path / "plan.json"
    verb.Plan(**OPTIONS, ladder=ladder, output=str(output)).run()
    out = capsys.readouterr().out
    assert "summary" in out and "48.4" in out and "The same score for less" in out
    stored = json.loads(output.read_text())["ladder"]
    assert stored["target"]["tokens"] == 3.9e12
    assert stored["same_score"]["mmlu"]["compute_ratio"] < 1


def test_a_bad_ladder_is_told_before_planning(tmp_path, monkeypatch):
    monkeypatch.setattr(verb, "make", lambda *args, **kwargs: pytest.fail("planned"))
    with pytest.raises(UserError, match=r"none\.json: not a fitted ladder"):
        verb.Plan(**OPTIONS, ladder=str(tmp_path / "none.json")).run()
