"""The whole recipe at its smallest: killed, continued, reused, changed, and its soup used."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from olmax.training.recorder import read_metrics


def _start(repository, directory, stage="all", *overrides) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.olmo2", stage, "--preset", "smoke",
         "--run-dir", directory.name, *overrides],
        # A relative run directory, as by default.
        cwd=directory.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{repository / 'src'}:{repository}"},
    )  # fmt: skip


def _finish(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=900)
    return out


def _wait_for(found, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 600
    while not found():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, repository):
    """A run that was killed with SIGKILL in the middle of pretraining and run again to its end."""
    directory = tmp_path_factory.mktemp("runs") / "smoke"
    killed = _start(repository, directory)
    checkpoints = directory / "pretrain" / "checkpoints"
    _wait_for(lambda: checkpoints.is_dir() and any(checkpoints.iterdir()), killed)
    killed.send_signal(signal.SIGKILL)
    _finish(killed)
    marker = json.loads((directory / "stages" / "pretrain.json").read_text())
    again = _start(repository, directory)
    out = _finish(again)
    assert again.returncode == 0, out
    return directory, marker, out


def test_killed_run_continues_to_its_end(finished):
    directory, marker, out = finished
    assert not marker["complete"]
    assert "prepare: done before, reused" in out
    assert "pretrain: done before" not in out
    steps = [row["step"] for row in read_metrics(directory / "pretrain") if "loss" in row]
    assert steps == list(range(1, 13))
    assert "Benchmarks before and after mid-training" in out
    for name in ("report.html", "report.json", "main.png", "recipe.json"):
        assert (directory / name).stat().st_size > 1000, name


def test_report_holds_what_was_run(finished):
    directory, _, _ = finished
    numbers = json.loads((directory / "report.json").read_text())
    assert numbers["training"]["pretrain"]["tokens"] == 12 * 8 * 64
    assert set(numbers["accuracy"]) == {
        "pretrained", "ingredient1", "ingredient2", "soup", "mean of annealing runs",
    }  # fmt: skip
    anneal = numbers["training"]["ingredient1"]
    # A straight line from the last rate of pretraining to zero in five updates.
    last = numbers["training"]["pretrain"]["last_learning_rate"]
    assert anneal["first_learning_rate"] == pytest.approx(last * 4 / 5, rel=1e-5)
    assert anneal["last_learning_rate"] == 0
    orders = [numbers["training"][f"ingredient{i}"]["last_cross_entropy"] for i in (1, 2)]
    assert orders[0] != orders[1]


def test_soup_is_the_mean_of_the_ingredients(finished):
    from flax import nnx

    from olmax.interop import load_model
    from olmax.training.checkpoints import restore_model

    directory, _, _ = finished
    soup = nnx.state(load_model(directory / "soup"), nnx.Param)
    paths = [str(directory / "anneal" / f"ingredient{i}") for i in (1, 2)]
    parts = [nnx.state(restore_model(path), nnx.Param) for path in paths]
    changed = False
    for mean, first, second in zip(*map(_leaves, (soup, *parts)), strict=True):
        np.testing.assert_allclose(mean, (first + second) / 2, atol=1e-6)
        changed = changed or not np.array_equal(first, second)
    assert changed


def _leaves(state) -> list[np.ndarray]:
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def test_soup_generates(finished):
    import olmax

    directory, _, _ = finished
    handle = olmax.load(str(directory / "soup"))
    assert handle.tokenizer.vocab_size == 384
    assert handle.logits(np.array([[1, 2, 3]])).shape == (1, 3, 384)
    results = json.loads((directory / "evaluation" / "soup.json").read_text())
    assert len(results["samples"]) == 4


def test_second_run_reuses_everything_and_changes_are_noticed(finished, repository):
    directory, _, _ = finished
    before = _fingerprints(directory)
    process = _start(repository, directory)
    out = _finish(process)
    assert process.returncode == 0, out
    reused = (
        "prepare", "held-out", "pretrain", "anneal/ingredient1", "anneal/ingredient2", "soup",
        "evaluate",
    )  # fmt: skip
    assert all(f"{stage}: done before, reused" in out for stage in reused)
    assert _fingerprints(directory) == before

    process = _start(repository, directory, "pretrain", "--pretrain.schedule.peak", "1e-3")
    out = _finish(process)
    assert process.returncode == 2
    assert "pretrain.schedule.peak: 0.006 -> 0.001" in out and "--overwrite" in out
    assert _fingerprints(directory) == before


def _fingerprints(directory: pathlib.Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (directory / "stages").iterdir()}


def test_second_process_is_refused(finished, repository):
    from olmax.training.run_directory import locked

    directory, _, _ = finished
    with locked(directory):
        process = _start(repository, directory)
        out = _finish(process)
    assert process.returncode == 2 and "is being written by" in out


@pytest.mark.slow
def test_studies_run_beside_the_recipe(finished, repository):
    directory, _, _ = finished
    for stage, text in (("microanneal", "Microanneals of this run"), ("stability", "Growth expo")):
        process = _start(repository, directory, stage)
        out = _finish(process)
        assert process.returncode == 0 and text in out, out
        assert (directory / stage / "results.json").exists()
    out = _finish(_start(repository, directory, "report"))
    page = (directory / "report.html").read_text()
    assert "Growth exponents at initialisation" in page and "TinyGSM-MIND" in page, out
