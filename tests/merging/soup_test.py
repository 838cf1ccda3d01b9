"""Soups: the mean of checkpoints, whatever they are stored in."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from olmax import merging
from olmax.errors import UserError
from olmax.interop import load_model, tensor_files
from olmax.merging import merge, soup, weighted_mean
from tests.interop import golden_models

NAME = "olmo2_gqa"


def tensors(seed):
    """Tensors of one ingredient: the golden ones with noise."""
    random = np.random.RandomState(seed)
    return {
        name: (value + 0.1 * random.standard_normal(value.shape)).astype(np.float32)
        for name, value in golden_models.weights(NAME).items()
    }


def ingredient(directory, values, dtype=np.float32, **config):
    directory.mkdir()
    config = golden_models.CASES[NAME] | config
    (directory / "config.json").write_text(json.dumps(config))
    save_file({k: v.astype(dtype) for k, v in values.items()}, directory / "model.safetensors")
    return directory


@pytest.fixture
def three(tmp_path):
    return [ingredient(tmp_path / f"seed{seed}", tensors(seed)) for seed in range(3)]


def test_equals_the_mean(tmp_path, three, monkeypatch):
    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", 3000)  # many blocks a tensor
    soup(three, tmp_path / "soup")
    got = load_file(tmp_path / "soup" / "model.safetensors")
    all_values = [tensors(seed) for seed in range(3)]
    assert got.keys() == all_values[0].keys()
    for name, value in got.items():
        expected = np.mean([each[name].astype(np.float64) for each in all_values], axis=0)
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6, err_msg=name)
    assert load_model(tmp_path / "soup").config == load_model(three[0]).config


def test_weights_are_normalised(tmp_path, three):
    soup(three, tmp_path / "soup", weights=[1, 0, 3])
    got = load_file(tmp_path / "soup" / "model.safetensors")
    first, _, third = (tensors(seed) for seed in range(3))
    for name, value in got.items():
        expected = 0.25 * first[name] + 0.75 * third[name]
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_a_soup_of_identical_models_is_that_model(tmp_path, dtype, count):
    # (x + x + x) / 3 need not be x in float32; the weights of seven models are not even exact.
    path = ingredient(tmp_path / "one", tensors(0), dtype)
    soup([path] * count, tmp_path / "soup")
    got, expected = (load_file(each / "model.safetensors") for each in (tmp_path / "soup", path))
    for name, value in expected.items():
        assert got[name].dtype == dtype
        assert got[name].tobytes() == value.tobytes(), name


def test_accumulates_in_float32(tmp_path):
    # In bfloat16 1 + 2^-8 would be 1 before the division.
    values = [{k: np.full_like(v, x) for k, v in tensors(0).items()} for x in (1.0, 1.0078125, 1.0)]
    paths = [ingredient(tmp_path / str(i), v, ml_dtypes.bfloat16) for i, v in enumerate(values)]
    soup(paths, tmp_path / "soup", dtype="float32")
    for value in load_file(tmp_path / "soup" / "model.safetensors").values():
        np.testing.assert_allclose(value, 1 + 0.0078125 / 3, rtol=1e-7)


def test_dtype_of_the_output(tmp_path):
    f32 = ingredient(tmp_path / "f32", tensors(0))
    bf16 = ingredient(tmp_path / "bf16", tensors(1), ml_dtypes.bfloat16)
    for paths, dtype, expected in (
        ([bf16, bf16], None, ml_dtypes.bfloat16),
        ([f32, bf16], None, np.float32),
        ([f32, f32], "float16", np.float16),
    ):
        soup(paths, tmp_path / "soup", dtype=dtype)
        values = load_file(tmp_path / "soup" / "model.safetensors").values()
        assert {value.dtype for value in values} == {np.dtype(expected)}
        shutil.rmtree(tmp_path / "soup")


def test_mixed_kinds(tmp_path, three):
    """A Hugging Face directory, an Orbax checkpoint and one of the old trainer."""
    from olmax.training.model_checkpoint import save_model

    save_model(load_model(three[1]), tmp_path / "orbax")
    from tests.interop.olmo_formats_test import TRAINER_MODEL

    values = tensors(2)
    model = TRAINER_MODEL | dict(
        d_model=48, n_heads=6, n_kv_heads=2, n_layers=2, mlp_hidden_size=160, embedding_size=256
    )
    old = {
        "transformer.wte.weight": values["model.embed_tokens.weight"],
        "transformer.ln_f.weight": values["model.norm.weight"],
        "transformer.ff_out.weight": values["lm_head.weight"],
    }
    for n in range(2):
        new, prefix = f"model.layers.{n}.", f"transformer.blocks.{n}."
        qkv = [values[f"{new}self_attn.{x}_proj.weight"] for x in "qkv"]
        up_gate = [values[f"{new}mlp.{x}_proj.weight"] for x in ("up", "gate")]
        old |= {
            prefix + "att_proj.weight": np.concatenate(qkv),
            prefix + "ff_proj.weight": np.concatenate(up_gate),
            prefix + "attn_out.weight": values[new + "self_attn.o_proj.weight"],
            prefix + "ff_out.weight": values[new + "mlp.down_proj.weight"],
            prefix + "q_norm.weight": values[new + "self_attn.q_norm.weight"],
            prefix + "k_norm.weight": values[new + "self_attn.k_norm.weight"],
            prefix + "attn_norm.weight": values[new + "post_attention_layernorm.weight"],
            prefix + "ff_norm.weight": values[new + "post_feedforward_layernorm.weight"],
        }
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    save_file(old, tmp_path / "old" / "model.safetensors")

    soup([three[0], tmp_path / "orbax", tmp_path / "old"], tmp_path / "mixed")
    soup(three, tmp_path / "plain")
    got, expected = (
        load_file(tmp_path / each / "model.safetensors") for each in ("mixed", "plain")
    )
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    # No temporary export is left.
    left = {"seed0", "seed1", "seed2", "orbax", "old", "mixed", "plain"}
    assert {file.name for file in tmp_path.iterdir()} == left


def test_different_architectures(tmp_path, three):
    other = ingredient(tmp_path / "other", tensors(3), rope_theta=10000, rms_norm_eps=1e-5)
    with pytest.raises(UserError) as error:
        soup([three[0], other], tmp_path / "soup")
    message = str(error.value)
    assert "norm_eps is 1e-05 instead of 1e-06" in message
    assert "rope_theta is 10000.0 instead of 500000.0" in message
    assert str(other) in message
    assert not (tmp_path / "soup").exists()


def test_different_tokenizers(tmp_path, three):
    for path, vocab in zip(three[:2], ({"a": 0, "b": 1}, {"a": 1, "b": 0}), strict=True):
        text = json.dumps({"model": {"vocab": vocab}, "added_tokens": []})
        (path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="another vocabulary"):
        soup(three[:2], tmp_path / "soup")
    # The same written differently is the same.
    text = json.dumps({"added_tokens": [], "model": {"vocab": {"b": 1, "a": 0}}}, indent=1)
    (three[1] / "tokenizer.json").write_text(text)
    soup(three[:2], tmp_path / "soup")
    expected = (three[0] / "tokenizer.json").read_text()
    assert (tmp_path / "soup" / "tokenizer.json").read_text() == expected


def test_bad_requests(tmp_path, three):
    for paths, kwargs, message in (
        (three[:1], {}, "at least two"),
        (three, dict(weights=[1, 2]), "2 weights for 3 models"),
        (three, dict(weights=[1, -1, 1]), "non-negative"),
        (three, dict(weights=[0, 0, 0]), "not all zero"),
        (three, dict(dtype="int8"), "dtype 'int8'"),
        ([three[0], tmp_path / "absent"], {}, "no such directory"),
    ):
        with pytest.raises(UserError, match=message):
            soup(paths, tmp_path / "soup", **kwargs)
    assert not (tmp_path / "soup").exists()


def test_a_damaged_ingredient(tmp_path, three):
    file = three[2] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut short"):
        soup(three, tmp_path / "soup")


def test_another_method(tmp_path, three):
    """Task arithmetic with the first model as the base, as a user would add it."""

    def add_tasks(name, values):
        assert name.startswith(("model.", "lm_head."))
        base, *tuned = values
        return base + 0.5 * sum(value - base for value in tuned)

    merge(three, tmp_path / "merged", add_tasks)
    got = load_file(tmp_path / "merged" / "model.safetensors")
    base, a, b = (tensors(seed) for seed in range(3))
    for name, value in got.items():
        expected = base[name] + 0.5 * (a[name] + b[name] - 2 * base[name])
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_weighted_mean_on_values():
    values = [np.float32([1, 2]), np.float32([3, 6])]
    np.testing.assert_allclose(weighted_mean([3, 1])("any", values), [1.5, 3.0])
    assert merging.soup is soup
