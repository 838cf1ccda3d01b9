"""What XLA's CPU backend turns into fast code; harmless on other backends."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

PIECE = 128


def row_major(x: jax.Array) -> jax.Array:
    """`x`, with its elements in memory in the order of its indices.

    XLA likes to fold a transposition into the product that reads it. Its CPU libraries take
    row-major operands only, and what they cannot take falls back to slower loops; this makes the
    compiler transpose in memory instead.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def row_max(x: jax.Array) -> jax.Array:
    """Maximum over the last axis.

    By halves, which are vector operations; as a reduction it would be a chain of scalar ones.
    """
    width = x.shape[-1]
    if width > PIECE:
        # The last piece may overlap the one before.
        starts = [*range(0, width - PIECE, PIECE), width - PIECE]
        x = functools.reduce(jnp.maximum, [x[..., start : start + PIECE] for start in starts])
        x = jax.lax.optimization_barrier(x)
        width = PIECE
    while width > 1:
        half = (width + 1) // 2
        x = jnp.maximum(x[..., :half], x[..., width - half :])
        width = half
    return x[..., 0]
