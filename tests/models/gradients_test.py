"""Hand-written derivatives of the layers against those that JAX derives from the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmax.models.attention import split_heads
from olmax.models.linear import project
from olmax.models.mlp import swiglu
from olmax.models.norm import rms_norm


def plain_rms_norm(x, scale):
    x32, axes = x.astype(jnp.float32), tuple(range(-scale.ndim, 0))
    variance = jnp.mean(jnp.square(x32), axis=axes, keepdims=True)
    return (scale * x32 / jnp.sqrt(variance + 1e-6)).astype(x.dtype)


def plain_split_heads(qkv):
    return qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]


FUNCTIONS = {
    "project, wide": (project, lambda x, w: x @ w.astype(x.dtype), [(3, 5, 8), (8, 24)]),
    "project, narrow": (project, lambda x, w: x @ w.astype(x.dtype), [(3, 5, 24), (24, 8)]),
    "project, one row": (project, lambda x, w: x @ w.astype(x.dtype), [(1, 1, 4), (4, 6)]),
    "rms_norm": (lambda x, s: rms_norm(x, s, 1e-6), plain_rms_norm, [(3, 5, 16), (16,)]),
    "rms_norm over heads": (
        lambda x, s: rms_norm(x, s, 1e-6),
        plain_rms_norm,
        [(2, 7, 3, 2, 8), (3, 2, 8)],
    ),
    "swiglu": (swiglu, lambda g, u: jax.nn.silu(g) * u, [(3, 5, 16), (3, 5, 16)]),
    "split_heads": (split_heads, plain_split_heads, [(2, 3, 2, 5, 4)]),
}


def value_and_gradients(fn, shapes, dtype):
    keys = jax.random.split(jax.random.key(0), len(shapes) + 1)
    first, *parameters = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=False))

    def run(first, *parameters):
        out, pull = jax.vjp(fn, first, *parameters)
        leaves, treedef = jax.tree.flatten(out)
        noise = [jax.random.normal(keys[-1], y.shape, y.dtype) for y in leaves]
        return *leaves, *pull(jax.tree.unflatten(treedef, noise))

    if fn is swiglu or fn is FUNCTIONS["swiglu"][1]:
        parameters = [p.astype(dtype) for p in parameters]
    return [np.asarray(y, np.float32) for y in jax.jit(run)(first.astype(dtype), *parameters)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float32(name):
    fn, plain, shapes = FUNCTIONS[name]
    got = value_and_gradients(fn, shapes, "float32")
    for a, b in zip(got, value_and_gradients(plain, shapes, "float32"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bfloat16_error_is_at_most_twice_that_of_the_plain_form(name):
    fn, plain, shapes = FUNCTIONS[name]
    got, rough = (value_and_gradients(f, shapes, "bfloat16") for f in (fn, plain))
    exact = value_and_gradients(plain, shapes, "float32")
    for a, b, c in zip(got, rough, exact, strict=True):
        assert np.linalg.norm(a - c) <= 2 * np.linalg.norm(b - c) + 1e-6 * np.linalg.norm(c)
