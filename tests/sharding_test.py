"""Unsharded equals sharded on eight faked devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kernels_pallas.attention
import olmax.models.attention
from olmax import sharding
from olmax.errors import UserError
from olmax.models import Decoder, Execution, get_preset
from olmax.sharding import MeshConfig

CONFIG = dataclasses.replace(get_preset("olmo2-tiny-gqa"), n_layers=2, vocab_size=512)
TOKENS = jax.random.randint(jax.random.key(0), (8, 32), 0, CONFIG.vocab_size)

MESHES = [
    "data=8",
    "fsdp=8",
    "tensor=2,data=4",
    "fsdp=4,tensor=2",
    "context=8",
    "fsdp=2,tensor=2,context=2",
    "slices=2,data=2,fsdp=2",
    "expert=4,fsdp=2",
]


def loss_fn(model: Decoder, tokens_BL: jax.Array) -> jax.Array:
    log_p_BLV = jax.nn.log_softmax(model(tokens_BL))
    return -jnp.take_along_axis(log_p_BLV[:, :-1], tokens_BL[:, 1:, None], axis=-1).mean()


def loss_and_grads(model, tokens_BL):
    return jax.jit(lambda m, t: nnx.value_and_grad(loss_fn)(m, t))(model, tokens_BL)


@pytest.fixture(scope="module")
def unsharded():
    return loss_and_grads(sharding.init_decoder(CONFIG), TOKENS)


@pytest.mark.parametrize("spec", MESHES)
def test_loss_and_gradients_equal_the_unsharded_ones(spec, unsharded):
    mesh = sharding.make_mesh(MeshConfig.parse(spec if "fsdp" in spec else spec + ",fsdp=1"))
    model = sharding.init_decoder(CONFIG, mesh=mesh)
    tokens_BL = jax.device_put(TOKENS, sharding.batch_sharding(mesh))
    with sharding.use_mesh(mesh):
        loss, grads = loss_and_grads(model, tokens_BL)
    np.testing.assert_allclose(loss, unsharded[0], atol=1e-5)
    for got, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(unsharded[1]), strict=True):
        np.testing.assert_allclose(np.asarray(got), np.asarray(expected), atol=1e-5)


@pytest.mark.parametrize("spec", ["context=8,fsdp=1", "fsdp=2,tensor=2,context=2"])
def test_a_ring_over_the_context_axis_changes_nothing(spec, unsharded, monkeypatch):
    # Chosen as on a TPU, computed by what runs here.
    ring = functools.partial(kernels_pallas.attention.ring_attention, implementation="reference")
    monkeypatch.setattr(olmax.models.attention, "ring_attention", ring)
    mesh = sharding.make_mesh(spec)
    model = sharding.init_decoder(CONFIG, Execution(attention="pallas_tpu"), mesh=mesh)
    tokens_BL = jax.device_put(TOKENS, sharding.batch_sharding(mesh))
    with sharding.use_mesh(mesh):
        program = jax.jit(nnx.value_and_grad(loss_fn)).lower(model, tokens_BL).compile()
        loss, grads = program(model, tokens_BL)
    assert "collective-permute" in program.as_text()
    np.testing.assert_allclose(loss, unsharded[0], atol=1e-5)
    for got, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(unsharded[1]), strict=True):
        np.testing.assert_allclose(np.asarray(got), np.asarray(expected), atol=1e-5)


def test_parameters_are_really_cut():
    mesh = sharding.make_mesh("fsdp=4,tensor=2")
    model = sharding.init_decoder(CONFIG, mesh=mesh)
    shards = {
        "gate_up": model.blocks.mlp.gate_up[...].addressable_shards[0].data.shape,
        "qkv": model.blocks.attention.qkv[...].addressable_shards[0].data.shape,
        "embedding": model.embedder.embedding[...].addressable_shards[0].data.shape,
        "q_norm": model.blocks.attention.q_norm.scale[...].addressable_shards[0].data.shape,
    }
    assert shards == {
        "gate_up": (2, 32, 2, 256),
        "qkv": (2, 32, 1, 4, 32),
        "embedding": (256, 32),
        "q_norm": (2, 1, 2, 32),
    }


def test_initial_values_do_not_depend_on_the_mesh():
    plain = nnx.state(sharding.init_decoder(CONFIG, seed=3))
    cut = nnx.state(
        sharding.init_decoder(CONFIG, seed=3, mesh=sharding.make_mesh("fsdp=4,tensor=2"))
    )
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(cut), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_tensor_parallel_collectives_are_compiled_in():
    mesh = sharding.make_mesh("tensor=2,data=4,fsdp=1")
    model = sharding.init_decoder(CONFIG, mesh=mesh)
    tokens_BL = jax.device_put(TOKENS, sharding.batch_sharding(mesh))
    with sharding.use_mesh(mesh):
        program = jax.jit(lambda m, t: m(t)).lower(model, tokens_BL).compile().as_text()
    assert "all-reduce" in program


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tensr=2", "unknown axis 'tensr'"),
        ("tensor=two", "must be an integer"),
        ("tensor=3", "multiple of 3"),
        ("fsdp=4,tensor=4", "needs 16 devices, there are 8"),
        ("fsdp=-1,tensor=-1", "at most one axis -1"),
        ("tensor=0", "at least 1"),
    ],
)
def test_bad_mesh_is_one_clear_line(spec, message):
    with pytest.raises(UserError, match=message) as error:
        sharding.make_mesh(spec)
    assert "\n" not in str(error.value)


def test_a_mesh_that_does_not_divide_the_model_names_the_dimension():
    with pytest.raises(UserError, match=r"tensor=4 does not divide n_kv_heads=2"):
        sharding.init_decoder(CONFIG, mesh=sharding.make_mesh("tensor=4,fsdp=2"))


def test_rules_refuse_one_mesh_axis_for_two_dimensions():
    rules = dataclasses.replace(sharding.DEFAULT_RULES, embed="tensor")
    with pytest.raises(ValueError, match="twice"):
        rules.spec(("embed", "mlp"))
