"""JSON files: plain types, whole or absent."""

import dataclasses
import json
import math
import pathlib

import numpy as np
import pytest

from olmax.reporting import files


@dataclasses.dataclass
class _Thing:
    path: pathlib.Path
    values: tuple[float, ...]


def test_jsonable_makes_plain_types(tmp_path):
    value = {
        1: _Thing(pathlib.Path("a/b"), (1.5, math.inf)),
        "array": np.arange(3, dtype=np.int32),
        "scalar": np.float32(0.5),
        "nothing": math.nan,
        "flag": np.bool_(True),
    }
    files.write_json(tmp_path / "deep" / "x.json", value)
    assert json.loads((tmp_path / "deep" / "x.json").read_text()) == {
        "1": {"path": "a/b", "values": [1.5, None]},
        "array": [0, 1, 2],
        "scalar": 0.5,
        "nothing": None,
        "flag": True,
    }


def test_unknown_type_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(TypeError, match="object"):
        files.write_json(tmp_path / "x.json", {"a": object()})
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    monkeypatch.setattr("os.replace", None)
    with pytest.raises(TypeError):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_environment_names_versions_and_device():
    env = files.environment()
    assert env["versions"]["jax"] and env["backend"] == "cpu" and env["cpus"] >= 1
