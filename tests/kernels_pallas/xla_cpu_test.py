"""Sums, maxima and layouts mean what their plain forms mean, and other backends get those."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.xla_cpu import row_major, row_max, sum_columns, sum_rows


@pytest.mark.parametrize("width", [1, 2, 7, 128, 129, 300])
def test_row_max(width):
    x = jax.random.normal(jax.random.key(0), (3, 5, width))
    np.testing.assert_array_equal(jax.jit(row_max)(x), jnp.max(x, axis=-1))


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (1, 1, 1, 1), (7, 40, 2, 3)])
def test_sums(shape, ndim):
    x = jax.random.normal(jax.random.key(0), shape)
    split = len(shape) - ndim
    rows = np.sum(np.asarray(x, np.float64), axis=tuple(range(split, len(shape))))
    columns = np.sum(np.asarray(x, np.float64), axis=tuple(range(split)))
    np.testing.assert_allclose(jax.jit(sum_rows, static_argnums=1)(x, ndim), rows, atol=1e-5)
    np.testing.assert_allclose(jax.jit(sum_columns, static_argnums=1)(x, ndim), columns, atol=1e-5)


def test_row_major_changes_no_value_and_is_differentiable():
    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(jax.jit(lambda x: row_major(x.T))(x), x.T)
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(row_major(x.T) ** 2))(x), 2 * x)


def test_a_program_for_another_backend_has_no_barriers():
    def program(platform):
        lowered = jax.jit(sum_rows).trace(jnp.ones((4, 8))).lower(lowering_platforms=(platform,))
        return lowered.as_text()

    assert "optimization_barrier" in program("cpu")
    assert "optimization_barrier" not in program("tpu")
