"""What a model path may be, and what is said of those that are none."""

import json
from typing import ClassVar

import fsspec
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from olmax.errors import UserError
from olmax.interop import detect, load_model, save_huggingface
from olmax.interop.source import local_directory


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        load_model(tmp_path / "absent")


def test_a_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="a model path is a directory"):
        load_model(tmp_path / "model.safetensors")


def test_unreachable_hub(monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError) as error:
        load_model("allenai/OLMo-2-1124-7B")
    assert "allenai/OLMo-2-1124-7B" in str(error.value)
    assert "\n" not in str(error.value)


def test_hub_id_with_revision(monkeypatch, checkpoints):
    import huggingface_hub

    asked = {}

    def download(repository, *, revision, allow_patterns):
        asked.update(repository=repository, revision=revision)
        return str(checkpoints["olmo2_mha"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert local_directory("a/b@stage1-step1000-tokens5B") == checkpoints["olmo2_mha"]
    assert asked == {"repository": "a/b", "revision": "stage1-step1000-tokens5B"}


def test_configuration_that_is_no_json(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="must hold a mapping"):
        load_model(tmp_path)


def test_configuration_without_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        load_model(tmp_path)


def test_other_directories_are_not_recognised(tmp_path):
    assert detect(tmp_path) is None
    # A run directory of ours also has a config.json with a model in it.
    (tmp_path / "config.json").write_text(json.dumps({"model": {"d_model": 64}}))
    assert detect(tmp_path) is None


class MemoryBucket(MemoryFileSystem):
    """gs:// in memory."""

    protocol = ("gcs", "gs")
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs://").removeprefix("gcs://"))


def test_remote_directories(checkpoints, monkeypatch):
    # epath reaches gs:// through tensorflow where that is installed, else through fsspec.
    monkeypatch.setattr("etils.epath.gpath._is_tf_installed", lambda: False)
    fsspec.register_implementation("gcs", MemoryBucket, clobber=True)
    model = load_model(checkpoints["olmo2_mha"])
    save_huggingface(model, "gs://bucket/out", max_shard_bytes=50_000)
    assert detect("gs://bucket/out") == "huggingface"
    tokens = np.arange(8, dtype=np.int32)[None]
    np.testing.assert_array_equal(load_model("gs://bucket/out")(tokens), model(tokens))
    with pytest.raises(UserError, match="exists already"):
        save_huggingface(model, "gs://bucket/out")
    with pytest.raises(UserError, match="gs://bucket/absent: no such directory"):
        load_model("gs://bucket/absent")
    assert [path.name for path in epath.Path("gs://bucket").iterdir()] == ["out"]
