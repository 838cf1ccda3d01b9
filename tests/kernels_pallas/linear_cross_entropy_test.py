"""Every implementation of linear cross-entropy against the reference: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.linear_cross_entropy import IMPLEMENTATIONS, linear_cross_entropy

OTHERS = [name for name in IMPLEMENTATIONS if name != "reference"]
# tokens, width, vocabulary
SHAPES = [(7, 16, 33), (300, 32, 1024), (2500, 8, 130), (1, 8, 5)]


def inputs(shape, dtype=jnp.float32):
    tokens, width, vocab = shape
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (tokens, width), dtype)
    w = jax.random.normal(keys[1], (width, vocab), jnp.float32) * 0.3
    targets = jax.random.randint(keys[2], (tokens,), 0, vocab)
    d_loss, d_lse = jax.random.uniform(keys[3], (2, tokens)) - 0.3
    # Ignored tokens have no weight.
    return x, w, targets, d_loss * (jax.random.uniform(keys[4], (tokens,)) > 0.2), d_lse


def outcome(implementation, x, w, targets, d_loss, d_lse):
    """loss, lse and the gradients of x and w."""

    def run(x, w, d_loss, d_lse):
        (loss, lse), vjp = jax.vjp(
            lambda x, w: linear_cross_entropy(x, w, targets, implementation=implementation), x, w
        )
        return (loss, lse, *vjp((d_loss, d_lse)))

    return jax.jit(run)(x, w, d_loss, d_lse)


@pytest.mark.parametrize("implementation", OTHERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(implementation, shape):
    arguments = inputs(shape)
    expected = outcome("reference", *arguments)
    for name, a, b in zip(
        ("loss", "lse", "dx", "dw"), outcome(implementation, *arguments), expected, strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5, err_msg=name)


def test_reference_equals_numpy():
    x, w, targets, _, _ = inputs((7, 16, 33))
    logits = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    lse = np.log(np.exp(logits).sum(axis=-1))
    loss, got_lse = linear_cross_entropy(x, w, targets, implementation="reference")
    np.testing.assert_allclose(got_lse, lse, rtol=1e-5)
    np.testing.assert_allclose(loss, lse - logits[np.arange(7), targets], rtol=1e-4)


@pytest.mark.parametrize("implementation", OTHERS)
def test_bfloat16_errs_at_most_twice_as_much_as_the_reference(implementation):
    arguments = inputs((300, 32, 1024), jnp.bfloat16)
    exact = outcome("reference", arguments[0].astype(jnp.float32), *arguments[1:])
    plain, got = (outcome(name, *arguments) for name in ("reference", implementation))
    for name, a, b, c in zip(("loss", "lse", "dx", "dw"), got, plain, exact, strict=True):
        error, allowed = (np.linalg.norm(np.asarray(v, np.float32) - c) for v in (a, b))
        assert error <= 2 * allowed + 1e-6, name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_certain_prediction_has_a_small_exact_loss(implementation):
    x, w = jnp.eye(4) * 30, jnp.eye(4)
    targets = jnp.arange(4)
    loss, lse, dx, _ = outcome(implementation, x, w, targets, jnp.ones(4), jnp.zeros(4))
    np.testing.assert_allclose(loss, np.log1p(3 * np.exp(-30.0)), atol=1e-5)
    np.testing.assert_allclose(lse, 30, rtol=1e-6)
    np.testing.assert_allclose(dx, 0, atol=1e-5)


def test_shapes_that_do_not_fit_are_errors():
    x, w, targets, _, _ = inputs((7, 16, 33))
    with pytest.raises(ValueError, match="expected x"):
        linear_cross_entropy(x, w.T, targets)
    with pytest.raises(ValueError, match="unknown implementation 'fast'"):
        linear_cross_entropy(x, w, targets, implementation="fast")
