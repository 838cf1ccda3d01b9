"""The notebook runs from top to bottom with the smallest preset, and is kept without outputs."""

import os

import nbclient
import nbformat
import pytest


@pytest.fixture(scope="module")
def notebook(repository):
    return nbformat.read(repository / "experiments" / "olmo2" / "colab.ipynb", as_version=4)


def test_notebook_is_kept_without_outputs(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None


@pytest.mark.timeout(900)
def test_notebook_runs(notebook, repository, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    monkeypatch.setenv("OLMAX_COLAB_PRESET", "smoke")
    monkeypatch.setenv("OLMAX_COLAB_RUN_DIR", str(run_dir))
    paths = [str(repository / "src"), str(repository), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    client = nbclient.NotebookClient(
        notebook, timeout=800, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    images = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "display_data" and "image/png" in output.data
    ]
    assert len(images) == 3
    assert (run_dir / "report.html").exists()
    assert "log-likelihood of the right answer" in str(notebook.cells[-1].outputs)
