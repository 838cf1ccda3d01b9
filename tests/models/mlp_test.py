"""The feed-forward block's backward pass against jax's own."""

import jax
import jax.numpy as jnp
import numpy as np

from olmax.models import mlp


def plain(gate, up, kernel_FD):
    return (jax.nn.silu(gate) * up) @ kernel_FD


def test_gradients_are_those_of_the_definition():
    keys = jax.random.split(jax.random.key(0), 4)
    gate, up = (jax.random.normal(key, (2, 5, 12)) for key in keys[:2])
    kernel_FD, dy = jax.random.normal(keys[2], (12, 6)), jax.random.normal(keys[3], (2, 5, 6))
    got, pull_got = jax.vjp(mlp.down, gate, up, kernel_FD)
    expected, pull_expected = jax.vjp(plain, gate, up, kernel_FD)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(pull_got(dy), pull_expected(dy), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_values_computed_again_are_those_kept():
    gate, up, d_hidden = jax.random.normal(jax.random.key(1), (3, 2, 5, 12), jnp.bfloat16)
    kept = mlp._gradients(gate, up, mlp.swiglu(gate, up), d_hidden)
    for one, other in zip(mlp._at_once(gate, up, kept[0], d_hidden), kept, strict=True):
        np.testing.assert_array_equal(one, other)
