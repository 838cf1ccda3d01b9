"""The verbs that write models."""

import json

import numpy as np
import pytest
import tyro
from safetensors.numpy import load_file

from olmax.cli.convert import Convert
from olmax.cli.merge import Merge
from olmax.errors import UserError
from tests.interop import golden_models


@pytest.fixture
def model(tmp_path):
    return golden_models.write_checkpoint("olmo2_mha", tmp_path / "model")


def test_merge(tmp_path, model, capsys):
    arguments = ["--models", str(model), str(model), "--output", str(tmp_path / "soup")]
    tyro.cli(Merge, args=[*arguments, "--weights", "1", "3", "--dtype", "bfloat16"]).run()
    assert "soup of 2 models" in capsys.readouterr().out
    got = load_file(tmp_path / "soup" / "model.safetensors")
    for name, value in golden_models.weights("olmo2_mha").items():
        np.testing.assert_array_equal(got[name], value.astype(got[name].dtype), err_msg=name)


def test_convert_to_hugging_face(tmp_path, model):
    arguments = ["--input", str(model), "--output", str(tmp_path / "out"), "--dtype", "float16"]
    tyro.cli(Convert, args=arguments).run()
    got = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in golden_models.weights("olmo2_mha").items():
        np.testing.assert_array_equal(got[name], value.astype(np.float16), err_msg=name)
    # Without a dtype the stored one stays.
    Convert(input=str(tmp_path / "out"), output=str(tmp_path / "again")).run()
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert {value.dtype for value in again.values()} == {np.dtype(np.float16)}


def test_convert_to_orbax_and_back(tmp_path, model):
    tokenizer = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": []}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    Convert(input=str(model), output=str(tmp_path / "orbax"), format="orbax").run()
    Convert(input=str(tmp_path / "orbax"), output=str(tmp_path / "out")).run()
    got = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in golden_models.weights("olmo2_mha").items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_bad_input_leaves_nothing(tmp_path, model):
    with pytest.raises(UserError, match="at least two"):
        Merge(models=(str(model),), output=str(tmp_path / "soup")).run()
    with pytest.raises(UserError, match="no such directory"):
        Convert(input=str(tmp_path / "absent"), output=str(tmp_path / "out")).run()
    assert {file.name for file in tmp_path.iterdir()} == {"model"}
