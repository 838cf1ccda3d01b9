"""A model alone, as a checkpoint of ours and back."""

import numpy as np
import pytest
from flax import nnx

from olmax import sharding
from olmax.errors import UserError
from olmax.models import Decoder, Execution, get_preset
from olmax.training.checkpoints import restore_model
from olmax.training.model_checkpoint import save_model
from olmax.training.names import named_leaves


def leaves(model):
    return named_leaves(nnx.state(model, nnx.Param))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back(tmp_path, dtype):
    execution = Execution(param_dtype=dtype)
    model = Decoder(get_preset("olmo2-tiny-gqa"), execution, rngs=nnx.Rngs(1))
    save_model(model, tmp_path / "model")
    mesh = sharding.make_mesh("fsdp=4,tensor=2")
    for back in (
        restore_model(str(tmp_path / "model"), execution=execution),
        restore_model(str(tmp_path / "model"), execution=execution, mesh=mesh),
    ):
        assert back.config == model.config
        for name, value in leaves(model).items():
            np.testing.assert_array_equal(leaves(back)[name], value, err_msg=name)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_an_existing_directory_is_not_touched(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").touch()
    model = Decoder(get_preset("olmo2-tiny"), rngs=nnx.Rngs(1))
    with pytest.raises(UserError, match="exists already"):
        save_model(model, tmp_path / "model")
