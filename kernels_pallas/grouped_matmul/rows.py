"""A row gather whose gradient is added up in one fixed order on every backend."""

import jax
import jax.numpy as jnp
import numpy as np


@jax.custom_vjp
def take_rows(
    x_TK: jax.Array, rows_M: jax.Array, count: jax.Array, readers_Tr: jax.Array | None
) -> jax.Array:
    """x[rows] [M, K]; the gradient is `add_rows` of the rows' gradients, in x's dtype.

    Args:
      x_TK: [T, K].
      rows_M: int32 [M], each in 0 .. T - 1.
      count: int32 []; rows from there on give no gradient, whatever stands in theirs (NaN too).
      readers_Tr: int32 [T, r] or None, as in `kernels_pallas.grouped_matmul.grouped_matmul`.
    """
    return x_TK[rows_M]


def _forward(x_TK, rows_M, count, readers_Tr):
    like_T0 = jnp.zeros((x_TK.shape[0], 0), x_TK.dtype)
    return x_TK[rows_M], (rows_M, count, readers_Tr, like_T0)


def _backward(residuals, d_MK):
    *integers, like_T0 = residuals
    rows_M, count, readers_Tr = integers
    d_TK = add_rows(d_MK, rows_M, like_T0.shape[0], count, readers_Tr)
    no_gradient = (x if x is None else np.zeros(x.shape, jax.dtypes.float0) for x in integers)
    return d_TK.astype(like_T0.dtype), *no_gradient


take_rows.defvjp(_forward, _backward)


def add_rows(
    d_MK: jax.Array,
    rows_M: jax.Array,
    tokens: int,
    count: jax.Array,
    readers_Tr: jax.Array | None = None,
) -> jax.Array:
    """float32 [T, K]: the sum of the rows m < count with rows[m] = t.

    GPUs scatter with atomic additions in no fixed order. Here pass j gathers the j-th row of every
    token: `readers_Tr[:, j]` where these are known, else the rows are sorted by token, and there
    are as many passes as the most frequent token has rows.
    """
    rows = rows_M.shape[0]
    zeros_TK = jnp.zeros((tokens, d_MK.shape[1]), jnp.float32)
    if not rows:
        return zeros_TK

    def add(d_TK, row_T, reads_T):
        row_TK = d_MK[jnp.clip(row_T, 0, rows - 1)].astype(jnp.float32)
        return d_TK + jnp.where(reads_T[:, None], row_TK, 0)

    if readers_Tr is not None:
        d_TK = zeros_TK
        for row_T in readers_Tr.T:
            d_TK = add(d_TK, row_T, (row_T >= 0) & (row_T < jnp.minimum(count, rows)))
        return d_TK
    # What lies behind all groups may name any token, and one of them many thousand times.
    rows_M = jnp.where(jnp.arange(rows) < count, rows_M, tokens)
    order_M = jnp.argsort(rows_M, stable=True)
    first_T, stop_T = (
        jnp.searchsorted(rows_M[order_M], jnp.arange(tokens), side=side)
        for side in ("left", "right")
    )

    def one_more(j, d_TK):
        place_T = first_T + j
        return add(d_TK, order_M[jnp.minimum(place_T, rows - 1)], place_T < stop_T)

    return jax.lax.fori_loop(0, jnp.max(stop_T - first_T), one_more, zeros_TK)
