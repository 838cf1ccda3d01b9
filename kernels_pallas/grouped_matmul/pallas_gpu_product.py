"""Rows times the matrix of their group on Hopper.

A visit is up to 128 consecutive rows of one group, and of a matrix 256 columns are taken at a time.
Copies to and from memory begin at multiples of 8 rows, a granule. A granule that several groups
share is stored by the one that has its first row; what the others have in it goes to an array of
its own, [G + 1, 8, N], and is put into its place afterwards. Rows behind all groups are visits that
multiply nothing.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import hopper
from kernels_pallas.hopper import GRANULE

TILE = hopper.Tile(rows=128, columns=256)


def product(
    lhs_MK: jax.Array,
    rhs: jax.Array,
    group_sizes_G: jax.Array,
    *,
    transpose_rhs: bool,
    out_dtype: Any,
    interpret: Any = False,
) -> jax.Array:
    """out[m] = lhs[m] @ rhs[g(m)], accumulated in float32.

    Args:
      lhs_MK: [M, K], bfloat16 or float16; K a multiple of 64.
      rhs: [G, K, N], or [G, N, K] with `transpose_rhs`, the same dtype; N a multiple of 64.
      group_sizes_G: int32 [G]; negative ones count as 0, groups that reach past M are cut there.
      out_dtype: of the result; float32 or 16 bits wide.
      interpret: as in `kernels_pallas.hopper.kernel`.

    Returns:
      [M, N]; zeros for rows of no group.
    """
    rows, width = lhs_MK.shape
    groups, columns = rhs.shape[0], rhs.shape[1 if transpose_rhs else 2]
    dtype, out_dtype = lhs_MK.dtype, jnp.dtype(out_dtype)
    padded = pl.cdiv(rows, GRANULE) * GRANULE
    lhs_MK = jnp.pad(lhs_MK, ((0, padded - rows), (0, 0)))
    starts_H, ends_H = _bounds(group_sizes_G, padded)
    visits, count = _visits(starts_H, ends_H, padded)
    tiles = pl.cdiv(columns, TILE.columns)

    def body(group_V, first_V, start_V, stop_V, count, lhs, rhs, out, shared, memory, stage):
        def begin(index):
            visit, column = index
            group = group_V[visit]
            steps = jnp.where(group < groups, pl.cdiv(width, hopper.DEPTH), 0)
            first = pl.multiple_of(first_V[visit], GRANULE)
            return (group, first, start_V[visit], stop_V[visit], column * TILE.columns), steps

        def copy(item, step):
            group, first, _, _, column = item
            depth = pl.ds(step * hopper.DEPTH, hopper.DEPTH)
            across = pl.ds(column, TILE.columns)
            matrix = rhs.at[(group, across, depth) if transpose_rhs else (group, depth, across)]
            return lhs.at[pl.ds(first, TILE.rows), depth], matrix

        def factors(lhs_piece, rhs_piece):
            own = lhs_piece.at[hopper.worker_slice(TILE.rows)]
            return own, rhs_piece.transpose((1, 0)) if transpose_rhs else rhs_piece

        def finish(item, sums):
            group, first, start, stop, left = item
            top = pl.multiple_of(first + hopper.worker() * TILE.worker_rows, GRANULE)
            low = _granules(jnp.maximum(start - top, 0))
            high = _granules(jnp.clip(stop - top, 0, TILE.worker_rows))

            begins_before = (first < start) & (hopper.worker() == 0)

            def send(piece, row, column):
                assert row == 0
                across = pl.ds(left + column, piece.shape[1])

                @pl.loop(low, high)
                def _(number):
                    here = pl.multiple_of(number * GRANULE, GRANULE)
                    there = pl.multiple_of(top + here, GRANULE)
                    hopper.copy(
                        piece.at[pl.ds(here, GRANULE)], out.at[pl.ds(there, GRANULE), across]
                    )

                @pl.when(begins_before)
                def _():
                    hopper.copy(piece.at[pl.ds(0, GRANULE)], shared.at[group, :, across])

            @pl.when((low < high) | begins_before)
            def _():
                hopper.store(sums.astype(out_dtype), stage, send)

        hopper.products(
            memory,
            TILE,
            (count[0], tiles),
            begin=begin,
            copy=copy,
            factors=factors,
            finish=finish,
        )

    piece = (TILE.columns, hopper.DEPTH) if transpose_rhs else (hopper.DEPTH, TILE.columns)
    run = hopper.kernel(
        body,
        name="grouped_product",
        items=visits[0].shape[0] * tiles,
        out_type=(
            jax.ShapeDtypeStruct((padded, columns), out_dtype),
            jax.ShapeDtypeStruct((groups + 1, GRANULE, columns), out_dtype),
        ),
        scratch=(
            hopper.ring(TILE, (TILE.rows, hopper.DEPTH), piece, dtype),
            hopper.staging(out_dtype),
        ),
        cost=pl.CostEstimate(
            flops=2 * rows * width * columns,
            bytes_accessed=lhs_MK.nbytes + rhs.nbytes + rows * columns * out_dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
    )
    out_MN, shared = run(*visits, count, lhs_MK, rhs)
    # Rows of a group in the granule that it does not begin.
    row_H8 = (starts_H // GRANULE * GRANULE)[:, None] + jnp.arange(GRANULE)
    begins_H1 = (starts_H % GRANULE == 0)[:, None]
    inside_H8 = (row_H8 >= starts_H[:, None]) & (row_H8 < ends_H[:, None]) & ~begins_H1
    row_H8 = jnp.where(inside_H8, row_H8, padded)
    return out_MN.at[row_H8].set(shared, mode="drop")[:rows]


def _granules(rows: jax.Array) -> jax.Array:
    """How many granules hold so many rows."""
    return lax.div(rows + (GRANULE - 1), jnp.int32(GRANULE))


def _bounds(group_sizes_G: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """First row and last (exclusive) of every group, and of the rows behind all, int32 [G + 1]."""
    ends_G = jnp.minimum(jnp.cumsum(jnp.maximum(group_sizes_G, 0)), rows)
    ends_H = jnp.append(ends_G, rows).astype(jnp.int32)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), ends_H[:-1]]), ends_H


def _visits(
    starts_H: jax.Array, ends_H: jax.Array, rows: int
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Group, first row to compute, and first row and last (exclusive) to store of each visit, int32
    [V], and the number of visits, int32 [1]. V is the most there can be.
    """
    last = starts_H.shape[0] - 1
    first_H = starts_H // GRANULE * GRANULE
    visits_H = jnp.where(ends_H > starts_H, pl.cdiv(ends_H - first_H, TILE.rows), 0)
    stop_H = jnp.cumsum(visits_H)
    visit_V = jnp.arange(math.ceil(rows / TILE.rows) + 2 * (last + 1), dtype=jnp.int32)
    group_V = jnp.sum(visit_V[:, None] >= stop_H[None, :], axis=1).astype(jnp.int32)
    group_V = jnp.minimum(group_V, last)
    first_V = first_H[group_V] + (visit_V - (stop_H - visits_H)[group_V]) * TILE.rows
    return (group_V, first_V, starts_H[group_V], ends_H[group_V]), stop_H[-1:].astype(jnp.int32)
