"""Sparse upcycling: exact relations between the dense model and what is made of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from olmax.errors import UserError
from olmax.models import Decoder, MoEConfig, get_preset
from olmax.models.upcycling import upcycle

CONFIG = dataclasses.replace(
    get_preset("olmoe-tiny-dense"), d_model=16, d_ff=12, n_layers=2, n_heads=2, n_kv_heads=2,
    head_dim=8, vocab_size=40, init_std=0.3,
)  # fmt: skip
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 7)), jnp.int32)


@pytest.fixture(scope="module")
def dense():
    return nnx.jit(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)))()


def test_with_normalised_weights_it_computes_what_the_dense_model_does(dense):
    sparse = upcycle(dense, MoEConfig(4, 2, normalize_weights=True))
    logits = jax.jit(lambda model: model(TOKENS))
    np.testing.assert_allclose(logits(sparse), logits(dense), atol=2e-5)


def test_without_them_each_block_is_scaled_by_the_chosen_probabilities(dense):
    sparse = upcycle(dense, MoEConfig(4, 2))
    x_BLD = jax.random.normal(jax.random.key(0), (2, 3, 16))
    block = jax.tree.map(lambda x: x[0], nnx.state(sparse.blocks.moe))
    moe = nnx.merge(nnx.graphdef(sparse.blocks.moe), block)
    mlp = nnx.merge(
        nnx.graphdef(dense.blocks.mlp),
        jax.tree.map(lambda x: x[0], nnx.state(dense.blocks.mlp)),
    )
    weights_BLk, _ = jax.lax.top_k(jax.nn.softmax(x_BLD @ moe.router[...]), 2)
    expected = mlp(x_BLD) * weights_BLk.sum(-1, keepdims=True)
    np.testing.assert_allclose(jax.jit(lambda x: moe(x)[0])(x_BLD), expected, atol=2e-5)


def test_a_shared_expert_is_another_copy(dense):
    sparse = upcycle(dense, MoEConfig(4, 2, shared_d_ff=12))
    np.testing.assert_array_equal(sparse.blocks.moe.shared.down[...], dense.blocks.mlp.down[...])
    with pytest.raises(UserError, match="shared_d_ff=5"):
        upcycle(dense, MoEConfig(4, 2, shared_d_ff=5))


def test_noise_replaces_that_share_of_the_entries(dense):
    sparse = upcycle(dense, MoEConfig(4, 2), noise=0.5, seed=3)
    for name in ("gate_up", "down"):
        block = np.asarray(getattr(dense.blocks.mlp, name)[...])
        copies = (np.swapaxes(block, 1, 2) if name == "gate_up" else block)[:, None]
        experts = np.asarray(getattr(sparse.blocks.moe, name)[...])
        replaced = experts != copies
        assert 0.4 < replaced.mean() < 0.6
        assert 0.015 < experts[replaced].std() < 0.025
        # Every expert has noise of its own.
        assert not np.array_equal(experts[:, 0], experts[:, 1])


def test_the_router_is_an_untruncated_normal(dense):
    wide = dataclasses.replace(CONFIG, d_model=256, n_heads=2, n_kv_heads=2, head_dim=128)
    model = nnx.jit(lambda: Decoder(wide, rngs=nnx.Rngs(0)))()
    sparse = upcycle(model, MoEConfig(64, 2))
    router = np.asarray(sparse.blocks.moe.router[...])
    assert router.std() == pytest.approx(0.02, rel=0.02) and np.abs(router).max() > 0.06


def test_only_a_dense_model_can_be_upcycled(dense):
    with pytest.raises(UserError, match="has experts already"):
        upcycle(upcycle(dense, MoEConfig(4, 2)), MoEConfig(4, 2))
