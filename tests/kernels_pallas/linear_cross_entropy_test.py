"""Every implementation of linear cross-entropy against the definition: values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.linear_cross_entropy import (
    IMPLEMENTATIONS,
    chunked,
    linear_cross_entropy,
    saved,
)
from kernels_pallas.linear_cross_entropy.api import choose

OTHERS = sorted(set(IMPLEMENTATIONS) - {"reference"})

# tokens, width, vocabulary, scale of the logits
CASES = {
    "one chunk": (48, 16, 100, 1.0),
    "length 1": (1, 8, 7, 1.0),
    "chunks and a bit": (300, 16, 257, 1.0),
    "sure of itself": (200, 32, 64, 30.0),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 128)
    monkeypatch.setattr(saved, "CHUNK_VALUES", 128 * 128)


def value_and_gradients(implementation, case, dtype):
    """(loss, lse, dx, dw) as float32 for a weighted loss with z-loss."""
    tokens, width, vocab, scale = CASES[case]
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (tokens, width), dtype)
    w = (scale / width**0.5) * jax.random.normal(keys[1], (width, vocab))
    # Half of the targets are the likeliest token, so that some probabilities are near 1.
    targets = jnp.where(
        jnp.arange(tokens) % 2 == 0,
        jnp.argmax(x.astype(jnp.float32) @ w, axis=-1),
        jax.random.randint(keys[2], (tokens,), 0, vocab),
    ).astype(jnp.int32)
    weights = jnp.arange(tokens) % 3 / tokens

    def run(x, w):
        def total(x, w):
            loss, lse = linear_cross_entropy(x, w, targets, implementation=implementation)
            return jnp.sum(weights * (loss + 1e-2 * lse**2)), (loss, lse)

        (_, outputs), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(x, w)
        return *outputs, *gradients

    return [np.asarray(y, np.float32) for y in jax.jit(run)(x, w)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", OTHERS)
def test_equals_the_reference_in_float32(implementation, case):
    expected = value_and_gradients("reference", case, "float32")
    got = value_and_gradients(implementation, case, "float32")
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["chunks and a bit", "sure of itself"])
@pytest.mark.parametrize("implementation", OTHERS)
def test_bfloat16_error_is_at_most_twice_that_of_the_reference(implementation, case):
    exact = value_and_gradients("reference", case, "float32")
    plain = value_and_gradients("reference", case, "bfloat16")
    got = value_and_gradients(implementation, case, "bfloat16")
    for a, b, c in zip(got, plain, exact, strict=True):
        assert np.linalg.norm(a - c) <= 2 * np.linalg.norm(b - c) + 1e-6 * np.linalg.norm(c)


def test_reference_equals_numpy():
    x = jax.random.normal(jax.random.key(0), (7, 16))
    w = jax.random.normal(jax.random.key(1), (16, 33))
    targets = np.arange(7)
    logits = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    expected = np.log(np.exp(logits).sum(axis=-1))
    loss, lse = linear_cross_entropy(x, w, jnp.asarray(targets), implementation="reference")
    np.testing.assert_allclose(lse, expected, rtol=1e-5)
    np.testing.assert_allclose(loss, expected - logits[targets, targets], rtol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_certain_prediction_has_a_small_exact_loss_and_no_gradient(implementation):
    x, w = 30.0 * jnp.eye(4), jnp.eye(4)
    fn = functools.partial(linear_cross_entropy, w=w, implementation=implementation)
    (loss, lse), pull = jax.vjp(lambda x: fn(x, targets=jnp.arange(4)), x)
    np.testing.assert_allclose(loss, np.log1p(3 * np.exp(-30.0)), atol=1e-5)
    np.testing.assert_allclose(lse, 30, rtol=1e-6)
    np.testing.assert_allclose(pull((jnp.ones(4), jnp.zeros(4)))[0], 0, atol=1e-5)


def test_what_does_not_fit_is_an_error():
    x, w, targets = jnp.ones((7, 16)), jnp.ones((16, 33)), jnp.zeros(7, jnp.int32)
    with pytest.raises(ValueError, match="expected x"):
        linear_cross_entropy(x, w.T, targets)
    with pytest.raises(ValueError, match="unknown implementation 'fast'"):
        linear_cross_entropy(x, w, targets, implementation="fast")


@pytest.mark.parametrize("implementation", ["reference", *OTHERS])
def test_logits_too_large_for_exp_stay_finite(implementation):
    x = 100.0 * jnp.eye(4)
    targets = jnp.zeros(4, jnp.int32)
    fn = functools.partial(linear_cross_entropy, implementation=implementation)
    loss, lse = jax.jit(fn)(x, x, targets)
    np.testing.assert_allclose(loss, [0, 1e4, 1e4, 1e4], rtol=1e-5)
    np.testing.assert_allclose(lse, np.full(4, 1e4), rtol=1e-5)


def test_the_choice_bounds_the_memory_and_the_saved_form_needs_all_columns():
    assert choose(2048, 1024) == "saved"
    assert choose(2**20, 100352) == "chunked"
    assert choose(2048, 1024, vocab_axes=("tensor",)) == "chunked"
    with pytest.raises(ValueError, match="whole vocabulary"):
        saved.linear_cross_entropy(jnp.ones((2, 4)), jnp.ones((4, 8)), jnp.zeros(2, int), ("t",))
