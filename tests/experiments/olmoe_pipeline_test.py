"""The whole miniature at its smallest, through its notebook: run, continued, reused, reported."""

import json
import os
import pathlib
import subprocess
import sys

import nbclient
import nbformat
import pytest

from olmax.training.recorder import read_metrics

RUNS = ("moe", "dense", "unbalanced")


@pytest.fixture(scope="module")
def notebook(repository):
    return nbformat.read(repository / "experiments" / "olmoe" / "colab.ipynb", as_version=4)


def test_notebook_is_kept_without_outputs(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None


@pytest.fixture(scope="module")
def finished(tmp_path_factory, repository):
    """The notebook after it ran with the smallest preset, and its run directory."""
    notebook = nbformat.read(repository / "experiments" / "olmoe" / "colab.ipynb", as_version=4)
    root = tmp_path_factory.mktemp("olmoe")
    run_dir = root / "run"
    changed = {
        "OLMAX_COLAB_PRESET": "smoke",
        "OLMAX_COLAB_RUN_DIR": str(run_dir),
        "PYTHONPATH": os.pathsep.join(
            filter(
                None,
                [str(repository / "src"), str(repository), os.environ.get("PYTHONPATH", "")],
            )
        ),
    }
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        nbclient.NotebookClient(
            notebook, timeout=800, kernel_name="python3", resources={"metadata": {"path": root}}
        ).execute()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return notebook, run_dir


@pytest.mark.timeout(900)
def test_notebook_runs(finished):
    notebook, run_dir = finished
    images = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "display_data" and "image/png" in output.data
    ]
    assert len(images) == 3
    assert "of the tokens in layer 0" in str(notebook.cells[-1].outputs)
    for name in ("report.html", "report.json", "main.png", "recipe.json"):
        assert (run_dir / name).stat().st_size > 1000, name


def test_report_holds_what_was_run(finished):
    _, run_dir = finished
    numbers = json.loads((run_dir / "report.json").read_text())
    assert set(numbers["bits_per_byte"]) == set(RUNS)
    assert all(numbers["training"][name]["tokens"] == 10 * 4 * 32 for name in RUNS)
    assert numbers["training"]["unbalanced"]["load_balance_loss"] == 0
    assert "load_balance_loss" not in numbers["training"]["dense"]
    rows = read_metrics(run_dir / "moe")
    loss = [row for row in rows if "loss" in row][-1]
    parts = ("cross_entropy", "load_balance_loss", "router_z_loss", "z_loss")
    assert loss["loss"] == pytest.approx(sum(loss[name] for name in parts), rel=1e-6)
    # Near balance the loss costs its weight.
    assert loss["load_balance_loss"] == pytest.approx(0.01, rel=0.2)
    saturation = numbers["routing"]["saturation"]
    assert list(saturation) == ["20 %", "40 %"]
    assert all(0 < value <= 100 for found in saturation.values() for value in found["k"])
    page = (run_dir / "report.html").read_text()
    for text in ("one row a comparison", "Router saturation", "not over seeds"):
        assert text in page


def test_second_run_reuses_everything_and_changes_are_noticed(finished, repository):
    _, run_dir = finished

    def start(stage, *overrides):
        return subprocess.run(
            [sys.executable, "-m", "experiments.olmoe", stage, "--preset", "smoke",
             "--run-dir", str(run_dir), *overrides],
            cwd=repository, capture_output=True, text=True, check=False,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{repository / 'src'}"},
        )  # fmt: skip

    before = _markers(run_dir)
    again = start("all")
    assert again.returncode == 0, again.stderr
    for stage in ("prepare", "held-out", *(f"train/{run}" for run in RUNS), "evaluate", "routing"):
        assert f"{stage}: done before, reused" in again.stdout
    assert _markers(run_dir) == before
    refused = start("train", "--train.objective.router.load-balance", "0.1")
    assert refused.returncode == 2 and "--overwrite" in refused.stderr
    assert _markers(run_dir) == before


def _markers(directory: pathlib.Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (directory / "stages").iterdir()}
