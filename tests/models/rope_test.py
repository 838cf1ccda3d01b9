"""The rotation as it is computed for TPUs, against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmax.models import rope


@pytest.fixture
def angles():
    positions_BL = jnp.arange(12).reshape(2, 6)
    return rope.rotation(positions_BL, rope.inverse_frequencies(16, 10_000.0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_with_a_permutation_exchanges_the_halves(angles, dtype):
    x_BLQH = jax.random.normal(jax.random.key(0), (2, 6, 3, 16), dtype)
    got = rope._rotate_on_tpu(x_BLQH, *angles)
    np.testing.assert_array_equal(got, rope._rotate(x_BLQH, *angles))


def test_the_gradient_is_that_of_the_plain_rotation(angles):
    x_BLQH, dy_BLQH = jax.random.normal(jax.random.key(1), (2, 2, 6, 3, 16))
    got = jax.vjp(lambda x: rope.apply_rope(x, *angles), x_BLQH)[1](dy_BLQH)
    expected = jax.vjp(lambda x: rope._rotate(x, *angles), x_BLQH)[1](dy_BLQH)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6, atol=1e-6)
