"""Streaming checkpoints in: dtypes, shards, meshes, and everything that must be refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from olmax import sharding
from olmax.errors import UserError
from olmax.interop import load_model, tensor_files
from olmax.models.rope import inverse_frequencies
from tests.interop import golden_models


def params(model):
    return {
        ".".join(map(str, path)): leaf.get_value()
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def assert_same_params(got, expected, dtype=None):
    got, expected = params(got), params(expected)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(
            np.asarray(got[name]), np.asarray(value).astype(dtype or value.dtype), err_msg=name
        )


@pytest.fixture
def checkpoint(tmp_path, checkpoints):
    """A checkpoint that a test may change: (directory, tensors, write)."""
    directory = shutil.copytree(checkpoints["llama_scaled_tied"], tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")

    def write(changed):
        save_file(changed, directory / "model.safetensors", metadata={"format": "pt"})

    return directory, tensors, write


def set_config(directory, **changes):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_every_head_lands_where_it_belongs(checkpoints):
    # Against a direct reading of docs/architecture.md: query head h is (k, g) = divmod(h, G).
    config = golden_models.CASES["olmo2_gqa"]
    tensors = golden_models.weights("olmo2_gqa")
    got = params(load_model(checkpoints["olmo2_gqa"]))
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    for layer in range(config["num_hidden_layers"]):
        attn = f"model.layers.{layer}.self_attn."
        for head in range(6):
            k, g = divmod(head, 3)
            rows = slice(head * head_dim, (head + 1) * head_dim)
            np.testing.assert_array_equal(
                got["blocks.attention.qkv"][layer, :, k, g],
                tensors[attn + "q_proj.weight"][rows].T,
            )
            np.testing.assert_array_equal(
                got["blocks.attention.q_norm.scale"][layer, k, g],
                tensors[attn + "q_norm.weight"][rows],
            )
            np.testing.assert_array_equal(
                got["blocks.attention.out"][layer, k, g],
                tensors[attn + "o_proj.weight"][:, rows].T,
            )
        for k in range(2):
            rows = slice(k * head_dim, (k + 1) * head_dim)
            for c, name in ((3, "k_proj"), (4, "v_proj")):
                np.testing.assert_array_equal(
                    got["blocks.attention.qkv"][layer, :, k, c],
                    tensors[attn + f"{name}.weight"][rows].T,
                )
        for c, name in enumerate(("gate_proj", "up_proj")):
            np.testing.assert_array_equal(
                got["blocks.mlp.gate_up"][layer, :, c],
                tensors[f"model.layers.{layer}.mlp.{name}.weight"].T,
            )


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
@pytest.mark.parametrize("target", ["float32", "bfloat16"])
def test_dtypes(checkpoint, stored, target):
    directory, tensors, write = checkpoint
    expected = load_model(directory)
    stored_dtype = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[stored]
    write({name: tensor.astype(stored_dtype) for name, tensor in tensors.items()})
    model = load_model(directory, param_dtype=target, compute_dtype=target)
    assert model.execution.compute_dtype == target
    for name, value in params(model).items():
        assert value.dtype == jnp.dtype(target), name
        rounded = np.asarray(params(expected)[name]).astype(stored_dtype)
        np.testing.assert_array_equal(np.asarray(value), rounded.astype(value.dtype), err_msg=name)


@pytest.mark.parametrize("name", ["olmo2_gqa", "llama_scaled_tied"])
@pytest.mark.parametrize("mesh", ["fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2"])
def test_straight_into_a_mesh(checkpoints, monkeypatch, name, mesh):
    # Blocks of a few rows, so that their edges do not fall on those of the shards.
    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", 5000)
    mesh = sharding.make_mesh(mesh)
    model = load_model(checkpoints[name], mesh=mesh)
    assert_same_params(model, load_model(checkpoints[name]))
    graphdef, state = nnx.split(model)
    del graphdef
    wanted = nnx.to_flat_state(sharding.param_shardings(state, mesh))
    for path, leaf in wanted:
        array = params(model)[".".join(map(str, path))]
        assert array.sharding.is_equivalent_to(leaf.get_value(), array.ndim), path


def test_sharded_model_computes_the_same(checkpoints):
    tokens = np.arange(64, dtype=np.int32).reshape(2, 32)
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    sharded = load_model(checkpoints["olmo2_gqa"], mesh=mesh)
    with sharding.use_mesh(mesh):
        got = jax.jit(lambda model, tokens: model(tokens))(sharded, tokens)
    np.testing.assert_allclose(got, load_model(checkpoints["olmo2_gqa"])(tokens), atol=1e-4)


def test_mesh_that_does_not_divide(checkpoints):
    with pytest.raises(UserError, match="n_kv_heads=2"):
        load_model(checkpoints["olmo2_gqa"], mesh=sharding.make_mesh("tensor=8"))


def test_sharded_files(checkpoint):
    directory, tensors, _ = checkpoint
    expected = load_model(directory)
    names = sorted(tensors)
    parts = {
        "model-00001-of-00002.safetensors": names[:9],
        "model-00002-of-00002.safetensors": names[9:],
    }
    for file, members in parts.items():
        save_file({name: tensors[name] for name in members}, directory / file)
    weight_map = {name: file for file, members in parts.items() for name in members}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "model.safetensors").unlink()
    assert_same_params(load_model(directory), expected)

    index.write_text(
        json.dumps({"weight_map": weight_map | {names[0]: "model-00002-of-00002.safetensors"}})
    )
    with pytest.raises(UserError, match=r"says that .* is in model-00002"):
        load_model(directory)
    index.write_text(
        json.dumps({"weight_map": {k: v for k, v in weight_map.items() if k != names[0]}})
    )
    with pytest.raises(UserError, match=f"does not list {names[0]}"):
        load_model(directory)
    index.write_text("{")
    with pytest.raises(UserError, match="not a safetensors index"):
        load_model(directory)
    index.write_text(json.dumps({"weight_map": weight_map}))
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: missing"):
        load_model(directory)


def test_missing_surplus_and_misshapen_are_named_in_one_line(checkpoint):
    directory, tensors, write = checkpoint
    tensors["model.layers.0.mlp.extra.weight"] = np.zeros((2, 2), np.float32)
    tensors["model.norm.weight"] = np.ones(63, np.float32)
    del tensors["model.layers.2.self_attn.v_proj.weight"]
    write(tensors)
    with pytest.raises(UserError) as error:
        load_model(directory)
    message = str(error.value)
    assert "missing: model.layers.2.self_attn.v_proj.weight" in message
    assert "surplus: model.layers.0.mlp.extra.weight" in message
    assert "misshapen: model.norm.weight [63] instead of [64]" in message
    assert "\n" not in message


def test_bias_tensors_are_surplus(checkpoint):
    # A checkpoint whose configuration hides its biases.
    directory, tensors, write = checkpoint
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
    write(tensors)
    with pytest.raises(UserError, match=r"surplus: model\.layers\.0\.self_attn\.q_proj\.bias"):
        load_model(directory)


def test_integer_tensors_are_refused(checkpoint):
    directory, tensors, write = checkpoint
    tensors["model.norm.weight"] = np.ones(64, np.int8)
    write(tensors)
    with pytest.raises(UserError, match=r"tensor model\.norm\.weight is I8; only F64, F32"):
        load_model(directory)


@pytest.mark.parametrize("keep", [0.99, 0.5, 0.001, 0])
def test_file_cut_short(checkpoint, keep):
    directory, _, _ = checkpoint
    file = directory / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UserError, match=r"model\.safetensors: cut short or not a safetensors file"):
        load_model(directory)


def test_tied_head_that_repeats_the_embedding_is_accepted(checkpoint):
    directory, tensors, write = checkpoint
    expected = load_model(directory)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write(tensors)
    assert_same_params(load_model(directory), expected)


def test_tied_head_that_differs_is_refused(checkpoint):
    directory, tensors, write = checkpoint
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1e-3
    tensors["lm_head.weight"] = head
    write(tensors)
    with pytest.raises(
        UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"
    ):
        load_model(directory)


def test_untied_configuration_without_head(checkpoint):
    directory, _, _ = checkpoint
    set_config(directory, tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"missing: lm_head\.weight"):
        load_model(directory)


def test_saved_rotary_buffers(checkpoint):
    directory, tensors, write = checkpoint
    expected = load_model(directory)
    config = expected.config
    buffer = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    write(tensors | {name: buffer.astype(np.float16)})
    assert_same_params(load_model(directory), expected)
    write(tensors | {name: inverse_frequencies(config.head_dim, 5e5)})
    with pytest.raises(UserError, match=rf"{name} holds other frequencies than rope_theta=10000"):
        load_model(directory)


def test_vocabulary_of_the_configuration_wins(checkpoint):
    directory, _, _ = checkpoint
    set_config(directory, vocab_size=270)
    with pytest.raises(
        UserError, match=r"model\.embed_tokens\.weight \[288, 64\] instead of \[270, 64\]"
    ):
        load_model(directory)


def test_blocks_are_written_in_place(checkpoints, monkeypatch):
    # A copy of the parameter at every block would make loading quadratic and double its memory.
    from olmax.interop import assembly

    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", 4096)
    moved = []
    place = assembly._place

    def watched(shard, *args):
        before = shard.array.unsafe_buffer_pointer()
        place(shard, *args)
        moved.append(shard.array.unsafe_buffer_pointer() != before)

    monkeypatch.setattr(assembly, "_place", watched)
    load_model(checkpoints["olmo2_mha"])
    assert len(moved) > 100
    assert not any(moved)
