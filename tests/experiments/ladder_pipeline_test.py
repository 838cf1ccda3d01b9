"""The notebook runs the smallest ladder from top to bottom, and what it leaves is used again."""

import copy
import dataclasses
import json
import os

import nbclient
import nbformat
import pytest
from rich.console import Console

from experiments.ladder import pipeline
from experiments.ladder.presets import smoke
from olmax import scaling
from olmax.errors import UserError


@pytest.fixture(scope="module")
def notebook(repository):
    return nbformat.read(repository / "experiments" / "ladder" / "colab.ipynb", as_version=4)


@pytest.fixture(scope="module")
def finished(notebook, repository, tmp_path_factory):
    """(executed notebook, its run directory)."""
    folder = tmp_path_factory.mktemp("ladder")
    environment = {
        "OLMAX_COLAB_PRESET": "smoke",
        "OLMAX_COLAB_RUN_DIR": str(folder / "run"),
        "PYTHONPATH": os.pathsep.join([str(repository / "src"), str(repository)]),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        executed = copy.deepcopy(notebook)
        client = nbclient.NotebookClient(
            executed, timeout=800, kernel_name="python3", resources={"metadata": {"path": folder}}
        )
        client.execute()
    return executed, folder / "run"


def test_notebook_is_kept_without_outputs(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_notebook_runs(finished):
    executed, run_dir = finished
    images = [
        output
        for cell in executed.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "display_data" and "image/png" in output.data
    ]
    assert len(images) == 3
    page = (run_dir / "report.html").read_text()
    assert "The prediction was written before the target was trained" in page
    assert "Step 2: loss to accuracy" in page


@pytest.mark.slow
def test_runs_are_in_the_released_format(finished):
    _, run_dir = finished
    rungs = smoke().rungs()
    runs = scaling.read_runs([run_dir / "runs" / f"{rung.name}.csv" for rung in rungs])
    for rung, run in zip(rungs, runs, strict=True):
        assert (run.parameters, run.tokens[-1]) == (rung.shape.parameters, rung.tokens)
        assert run.flops_per_token == rung.shape.flops_per_token
        assert run.table["_step"].iloc[-1] == rung.steps
        assert 4 <= len(run.table) <= 5
    names = {task.name for task in scaling.find_tasks(runs[0].table.columns)}
    assert names == {"sums", "stories", "docs_order", "code_order"}


@pytest.mark.slow
def test_prediction_stands_before_the_target(finished):
    _, run_dir = finished
    prediction = json.loads((run_dir / "prediction.json").read_text())
    assert prediction["target_was_trained"] is False
    assert prediction["compute_ratio"] >= 4
    csv = run_dir / "target" / f"{smoke().target_rung().name}.csv"
    assert (run_dir / "prediction.json").stat().st_mtime < csv.stat().st_mtime
    report = json.loads((run_dir / "report.json").read_text())
    for task, row in report["results"].items():
        assert row["accuracy"] == prediction["predictions"][task]["accuracy"]
        assert 0 <= row["low"] <= row["high"] <= 1


@pytest.mark.slow
def test_complete_stages_are_reused_and_changed_ones_refused(finished, capsys):
    _, run_dir = finished
    again = dataclasses.replace(smoke(), run_dir=str(run_dir))
    before = {path: path.stat().st_mtime_ns for path in run_dir.glob("*/*.csv")}
    pipeline.run(again, "train", Console(width=130))
    assert capsys.readouterr().out.count("done before, reused") == 6
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.glob("*/*.csv")}
    with pytest.raises(UserError, match=r"train/4K-0.05xC was made with other settings.*seed"):
        pipeline.run(dataclasses.replace(again, seed=1), "train", Console(width=130))
    with pytest.raises(UserError, match="stage predict is not complete"):
        elsewhere = dataclasses.replace(smoke(), run_dir=str(run_dir.parent / "other"))
        pipeline.run(elsewhere, "target", Console(width=130))


@pytest.mark.slow
def test_own_runs_go_through_the_command_line(finished, tmp_path):
    from olmax.cli.ladder import Fit

    _, run_dir = finished
    output = tmp_path / "ladder.json"
    Fit((str(run_dir / "runs"),), target=("20K,200K",), resamples=0, output=str(output)).run()
    fit = scaling.load(output).fit
    stored = scaling.load(run_dir / "ladder.json").fit
    assert set(fit.tasks) == set(stored.tasks)
    assert {run["sha256"] for run in fit.runs} == {run["sha256"] for run in stored.runs}
