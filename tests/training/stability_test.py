"""Spike score and growth exponents on cases with known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from olmax.models import Decoder
from olmax.training.stability import growth_exponents, running_spike_score, spike_score, spikes
from tests.training.tiny_training import MODEL


def series(n=10_000):
    return np.random.default_rng(0).normal(size=n)


def test_one_spike_in_ten_thousand():
    x = series()
    assert spike_score(x) == 0.0
    x[5000] = 8.5
    assert spike_score(x) == pytest.approx(0.01)
    assert np.flatnonzero(spikes(x)).tolist() == [5000]


def test_both_directions_and_both_definitions():
    x = series(3000)
    x[2000] = -6.6
    assert spike_score(x, window=1000, sigma=7) == 0
    assert 2000 in np.flatnonzero(spikes(x, window=128, sigma=6))


def test_a_constant_series_has_no_spikes_and_its_first_change_is_one():
    x = np.full(100, 2.0)
    assert spike_score(x) == 0
    x[50] = 2.5
    assert np.flatnonzero(spikes(x)).tolist() == [50]
    assert spike_score([]) == 0


def test_running_score_looks_back_only_so_far():
    x = series(1000)
    x[500] = 30
    running = running_spike_score(x, over=100)
    assert running[499] == 0
    assert running[500] == running[599] == 1.0
    assert running[600] == 0
    assert running_spike_score(x)[-1] == pytest.approx(100 / 1000)


def test_growth_of_known_layers():
    # Output norms with scale zero make every layer the identity: nothing grows.
    model = Decoder(MODEL, rngs=nnx.Rngs(0))
    model.blocks.attention_norm.scale[...] = 0 * model.blocks.attention_norm.scale[...]
    model.blocks.mlp_norm.scale[...] = 0 * model.blocks.mlp_norm.scale[...]
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16)
    exponents = growth_exponents(model, tokens)
    assert exponents.activations == pytest.approx(0, abs=1e-6)
    assert exponents.gradients == pytest.approx(0, abs=1e-6)


def test_growth_equals_a_direct_computation():
    model = Decoder(MODEL, rngs=nnx.Rngs(0))
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16)
    outputs = np.asarray(model.layer_outputs(model.embedder(tokens)))
    np.testing.assert_allclose(
        np.asarray(model.final_norm(outputs[-1])), np.asarray(model.hidden(tokens)), atol=1e-6
    )
    norms = np.linalg.norm(outputs, axis=-1).mean((1, 2))
    expected = np.log(norms[-1] / norms[0]) / MODEL.n_layers
    assert growth_exponents(model, tokens).activations == pytest.approx(expected, rel=1e-4)
    vectors = np.linalg.norm(outputs.mean((1, 2)), axis=-1)
    expected = np.log(vectors[-1] / vectors[0]) / MODEL.n_layers
    got = growth_exponents(model, tokens, average="vectors")
    assert got.activations == pytest.approx(expected, rel=1e-4)


def test_gradients_equal_finite_differences():
    model = Decoder(MODEL, rngs=nnx.Rngs(0))
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16)

    @jax.jit
    def loss(offsets):
        outputs = model.layer_outputs(model.embedder(tokens), offsets)
        log_p = jax.nn.log_softmax(model.logits(model.final_norm(outputs[-1])))
        return -jnp.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], -1).mean()

    offsets = np.zeros((MODEL.n_layers, 2, 16, MODEL.d_model), np.float32)
    gradient = np.asarray(jax.jit(jax.grad(loss))(offsets))
    norms = np.linalg.norm(gradient, axis=-1).mean((1, 2))
    expected = np.log(norms[-1] / norms[0]) / MODEL.n_layers
    assert growth_exponents(model, tokens).gradients == pytest.approx(expected, rel=1e-3)
    # The gradient itself, at the first layer, by finite differences along its own direction.
    length = np.linalg.norm(gradient[0])
    offsets[0] = 1e-2 * gradient[0] / length
    slope = (loss(offsets) - loss(-offsets)) / 2e-2
    assert slope == pytest.approx(length, rel=1e-2)
