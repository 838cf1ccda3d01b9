"""The projections of attention as they are computed for TPUs, against the fused product."""

import jax
import numpy as np

from olmax.models import attention


def test_three_products_are_the_fused_one():
    # 2 key heads with 3 query heads each.
    x_BLD = jax.random.normal(jax.random.key(0), (2, 5, 8))
    kernel_DKCH = jax.random.normal(jax.random.key(1), (8, 2, 3 + 2, 4))
    apart, pull_apart = jax.vjp(attention._project_apart, x_BLD, kernel_DKCH)
    fused, pull_fused = jax.vjp(attention.project_heads, x_BLD, kernel_DKCH)
    assert [y.shape for y in apart] == [(2, 5, 2, 3, 4), (2, 5, 2, 4), (2, 5, 2, 4)]
    for got, expected in zip(apart, fused, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    for got, expected in zip(pull_apart(fused), pull_fused(fused), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
