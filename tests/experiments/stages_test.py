"""Stages are done once, redone when their inputs change, and never look done when they are not."""

import io
import json

import pytest
from rich.console import Console

from experiments.stages import Stages
from olmax.errors import UserError


def _stages(tmp_path, **kwargs) -> Stages:
    return Stages(tmp_path, Console(file=io.StringIO()), **kwargs)


def _run(stages, stage, settings, directory, **kwargs) -> bool:
    with stages.run(stage, settings, outputs=[stage], **kwargs) as wanted:
        if wanted:
            (directory / stage).write_text(json.dumps(settings))
    return wanted


def test_complete_stage_is_reused(tmp_path):
    assert _run(_stages(tmp_path), "a", {"x": 1}, tmp_path)
    assert not _run(_stages(tmp_path), "a", {"x": 1}, tmp_path)


def test_stage_whose_output_is_gone_is_done_again(tmp_path):
    _run(_stages(tmp_path), "a", {"x": 1}, tmp_path)
    (tmp_path / "a").unlink()
    assert _run(_stages(tmp_path), "a", {"x": 1}, tmp_path)


def test_interrupted_stage_is_not_complete(tmp_path):
    stages = _stages(tmp_path)
    with pytest.raises(KeyboardInterrupt), stages.run("a", {}, outputs=["a"]):
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="stage a is not complete"):
        stages.fingerprint("a")
    assert _run(stages, "a", {}, tmp_path)


def test_changed_settings_start_anew_without_old_results(tmp_path):
    _run(_stages(tmp_path), "a", {"x": 1, "y": 2}, tmp_path)
    stages = _stages(tmp_path)
    with stages.run("a", {"x": 3, "y": 2}, outputs=["a"]) as wanted:
        assert wanted and not (tmp_path / "a").exists()
        (tmp_path / "a").write_text("new")


def test_changed_settings_of_a_costly_stage_are_refused(tmp_path):
    _run(_stages(tmp_path), "a", {"x": {"lr": 1}}, tmp_path)
    with pytest.raises(UserError, match=r"x\.lr: 1 -> 3.*--overwrite"):
        _run(_stages(tmp_path), "a", {"x": {"lr": 3}}, tmp_path, costly=True)
    assert (tmp_path / "a").exists()
    assert _run(_stages(tmp_path, overwrite=True), "a", {"x": {"lr": 3}}, tmp_path, costly=True)


def test_stage_follows_the_stages_it_reads(tmp_path):
    stages = _stages(tmp_path)
    with pytest.raises(UserError, match="stage a is not complete"):
        _run(stages, "b", {}, tmp_path, after=["a"])
    _run(stages, "a", {"x": 1}, tmp_path)
    assert _run(stages, "b", {}, tmp_path, after=["a"])
    assert not _run(stages, "b", {}, tmp_path, after=["a"])
    _run(stages, "a", {"x": 2}, tmp_path)
    assert _run(stages, "b", {}, tmp_path, after=["a"])


def test_damaged_marker_means_not_done(tmp_path):
    _run(_stages(tmp_path), "a", {}, tmp_path)
    (tmp_path / "stages" / "a.json").write_text('{"complete": tr')
    assert _run(_stages(tmp_path), "a", {}, tmp_path)


def test_wall_time_is_kept(tmp_path):
    _run(_stages(tmp_path), "a", {}, tmp_path)
    assert 0 <= _stages(tmp_path).seconds("a") < 60
