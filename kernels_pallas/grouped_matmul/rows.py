"""A row gather whose gradient is added up in one fixed order on every backend."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def take_rows(
    x_TK: jax.Array, rows_M: jax.Array, count: jax.Array, max_readers: int | None
) -> jax.Array:
    """x[rows] [M, K]; the gradient is that of `add_rows`, whose arguments these are."""
    return x_TK[rows_M]


def _forward(x_TK, rows_M, count, max_readers):
    return x_TK[rows_M], (rows_M, count, jnp.zeros((x_TK.shape[0], 0), x_TK.dtype))


def _backward(max_readers, residuals, d_MK):
    rows_M, count, like_T0 = residuals
    d_TK = add_rows(d_MK, rows_M, like_T0.shape[0], count, max_readers)
    no_gradient = (np.zeros(x.shape, jax.dtypes.float0) for x in (rows_M, count))
    return d_TK.astype(like_T0.dtype), *no_gradient


take_rows.defvjp(_forward, _backward)


def add_rows(
    d_MK: jax.Array,
    rows_M: jax.Array,
    tokens: int,
    count: jax.Array,
    max_readers: int | None = None,
) -> jax.Array:
    """float32 [T, K]: the sum of the rows m < count with rows[m] = t, in ascending order.

    GPUs scatter with atomic additions in no fixed order. Here pass j gathers the j-th row of every
    token, for `max_readers` passes, or for as many as the most frequent token has rows.
    """
    zeros_TK = jnp.zeros((tokens, d_MK.shape[1]), jnp.float32)
    if not rows_M.shape[0]:
        return zeros_TK
    # What lies behind all groups may name any token, and one of them many thousand times.
    rows_M = jnp.where(jnp.arange(rows_M.shape[0]) < count, rows_M, tokens)
    order_M = jnp.argsort(rows_M, stable=True)
    first_T, stop_T = (
        jnp.searchsorted(rows_M[order_M], jnp.arange(tokens), side=side)
        for side in ("left", "right")
    )

    def one_more(j, d_TK):
        place_T = first_T + j
        row_TK = d_MK[order_M[jnp.minimum(place_T, rows_M.shape[0] - 1)]].astype(jnp.float32)
        return d_TK + jnp.where((place_T < stop_T)[:, None], row_TK, 0)

    passes = jnp.max(stop_T - first_T) if max_readers is None else max_readers
    return jax.lax.fori_loop(0, passes, one_more, zeros_TK)
