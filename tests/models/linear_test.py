"""Products with weights, as matrices and, as in programs for TPUs, with every dimension apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmax.models import linear

SHAPES = {
    "matrix": ((2, 3, 8), (8, 6), 1, "blx,xy->bly"),
    "heads out": ((2, 3, 8), (8, 4, 6), 1, "blx,xhy->blhy"),
    "heads in": ((2, 3, 4, 2, 5), (4, 2, 5, 6), 3, "blkgx,kgxy->bly"),
    "rows": ((7, 4, 5), (4, 5, 3, 2), 2, "tkx,kxhy->thy"),
}


@pytest.fixture(params=["as matrices", "for TPUs"])
def _program(request, monkeypatch):
    if request.param == "for TPUs":
        monkeypatch.setattr(linear, "on_tpu", lambda tpu, default, *args: tpu(*args))


@pytest.mark.usefixtures("_program")
@pytest.mark.parametrize("name", SHAPES)
def test_value_and_gradients_are_those_of_the_sum(name):
    x_shape, kernel_shape, contract, formula = SHAPES[name]
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], x_shape), jax.random.normal(keys[1], kernel_shape)
    y, pull_back = jax.vjp(lambda x, kernel: linear.project(x, kernel, contract), x, kernel)
    expected, pull_expected = jax.vjp(lambda x, kernel: jnp.einsum(formula, x, kernel), x, kernel)
    dy = jax.random.normal(keys[2], y.shape)
    for got, wanted in zip((y, *pull_back(dy)), (expected, *pull_expected(dy)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_program")
def test_the_gradient_of_the_kernel_is_never_rounded_to_the_activations_dtype():
    # 257 is no bfloat16; the next ones are 256 and 258.
    x, dy = jnp.ones((257, 2, 2), jnp.bfloat16), jnp.ones((257, 3), jnp.bfloat16)
    got = linear.kernel_gradient(x, dy, jnp.float32, contract=2)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, np.full((2, 2, 3), 257, np.float32))
