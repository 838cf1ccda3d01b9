"""What XLA's CPU backend turns into fast code.

`on_cpu`, `apart`, `sum_rows` and `sum_columns` are plain on other backends, decided when a program
is lowered: a host with CPUs alone may compile for TPUs. `row_major` and `row_max` are themselves
everywhere.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

PIECE = 128


def on_cpu(cpu: Callable[..., Any], default: Callable[..., Any], *args: Any) -> Any:
    """`cpu(*args)` in programs for CPUs, `default(*args)` in others."""
    return jax.lax.platform_dependent(*args, cpu=cpu, default=default)


def apart(x: Any) -> Any:
    """`x`, an array or a tree of arrays, computed before what uses it instead of inside it.

    XLA's CPU backend also fuses where that computes a value again for each of its uses.
    """
    return on_cpu(jax.lax.optimization_barrier, lambda x: x, x)


def sum_rows(x: jax.Array, ndim: int = 1) -> jax.Array:
    """Sum over the last `ndim` axes of a float32 array, as a product with ones."""

    def cpu(x):
        ones = jnp.ones(x.shape[x.ndim - ndim :], x.dtype)
        return jnp.tensordot(jax.lax.optimization_barrier(x), ones, axes=ndim)

    return on_cpu(cpu, lambda x: jnp.sum(x, axis=tuple(range(-ndim, 0))), x)


def sum_columns(x: jax.Array, ndim: int = 1) -> jax.Array:
    """Sum over all but the last `ndim` axes, in two stages: a single one is cut into small windows
    that are summed one by one.
    """
    lead = x.ndim - ndim

    def cpu(x):
        first = jax.lax.optimization_barrier(jnp.sum(x, axis=0))
        return jnp.sum(first, axis=tuple(range(lead - 1)))

    return on_cpu(cpu, lambda x: jnp.sum(x, axis=tuple(range(lead))), x)


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
