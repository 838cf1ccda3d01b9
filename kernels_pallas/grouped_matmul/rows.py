"""A row gather whose gradient is added up in one fixed order on every backend."""

import jax
import jax.numpy as jnp
import numpy as np


@jax.custom_vjp
def take_rows(x_TK: jax.Array, rows_M: jax.Array) -> jax.Array:
    """x[rows] [M, K]; its gradient adds the rows of one token in ascending order, in float32."""
    return x_TK[rows_M]


def _forward(x_TK, rows_M):
    return x_TK[rows_M], (rows_M, jnp.zeros((x_TK.shape[0], 0), x_TK.dtype))


def _backward(residuals, d_MK):
    rows_M, like_T0 = residuals
    d_TK = add_rows(d_MK, rows_M, like_T0.shape[0])
    return d_TK.astype(like_T0.dtype), np.zeros(rows_M.shape, jax.dtypes.float0)


take_rows.defvjp(_forward, _backward)


def add_rows(d_MK: jax.Array, rows_M: jax.Array, tokens: int) -> jax.Array:
    """float32 [T, K]: the sum of the rows m with rows[m] = t.

    GPUs scatter with atomic additions in no fixed order. Here pass j gathers the j-th row of every
    token, for as many passes as the most frequent token has rows.
    """
    if not rows_M.shape[0]:
        return jnp.zeros((tokens, d_MK.shape[1]), jnp.float32)
    order_M = jnp.argsort(rows_M, stable=True)
    first_T, stop_T = (
        jnp.searchsorted(rows_M[order_M], jnp.arange(tokens), side=side)
        for side in ("left", "right")
    )

    def one_more(j, d_TK):
        place_T = first_T + j
        row_TK = d_MK[order_M[jnp.minimum(place_T, rows_M.shape[0] - 1)]].astype(jnp.float32)
        return d_TK + jnp.where((place_T < stop_T)[:, None], row_TK, 0)

    zeros_TK = jnp.zeros((tokens, d_MK.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, jnp.max(stop_T - first_T), one_more, zeros_TK)
