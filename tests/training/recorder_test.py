"""Where rows of metrics go."""

import json
import sys
import types

import pytest

from olmax.errors import UserError
from olmax.training.recorder import JsonLines, TensorBoard, WeightsAndBiases, read_metrics


def test_rows_past_the_resumed_step_and_torn_lines_are_dropped(tmp_path):
    first = JsonLines(tmp_path, 0)
    first.write([{"step": step, "loss": 1.0} for step in range(1, 8)])
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 8))
    second = JsonLines(tmp_path, 5)
    second.write([{"step": 6, "loss": 2.0}])
    second.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert read_metrics(tmp_path)[-1]["loss"] == 2.0


def test_a_run_without_metrics(tmp_path):
    with pytest.raises(UserError, match="no metrics"):
        read_metrics(tmp_path)


def test_tensorboard_holds_the_numbers(tmp_path):
    writer = TensorBoard(tmp_path, 0)
    writer.write([{"step": 3, "loss": 1.5, "tokens_per_second": None}])
    writer.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in file.read_bytes()


def test_wandb_only_when_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"needs wandb: pip install 'olmax\[wandb\]'"):
        WeightsAndBiases(tmp_path, "project", {})


def test_wandb_gets_rows_and_resumes_the_same_run(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finished")

    def init(**arguments):
        calls.append(arguments)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for _ in range(2):
        writer = WeightsAndBiases(tmp_path, "project", {"a": 1})
        writer.write([{"step": 3, "loss": 1.5}])
        writer.close()
    assert calls[0] == calls[3] and calls[0]["resume"] == "allow"
    assert calls[1:3] == [(3, {"loss": 1.5}), "finished"]
    json.dumps(calls[0])
