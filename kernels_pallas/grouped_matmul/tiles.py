"""Which rows `tiled` multiplies with which matrices, step by step, and how rows get in and out.

Groups that have rows are taken `ABREAST` at a time, largest first, so that those abreast are about
equally long, and each is cut into tiles: as many of a whole size as its rows fill, then a smaller
one that holds what remains. A tile that crosses the end of its group computes rows of another one
too, and leaves what stands there as it is.

Letters: P groups abreast, R rows of a tile.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

TILES = (256, 128, 64, 32)
"""Rows of a whole tile: the first that the average group fills, or the last."""
ABREAST = 2
"""XLA's CPU libraries run small products of single matrices on one core, stacked ones on more."""


class Tiles:
    """The tiles of every group, of `rows` rows in all."""

    def __init__(self, group_sizes_G, rows: int, expected_rows: int | None):
        groups = group_sizes_G.shape[0]
        expected = expected_rows or rows
        fits = [size for size in TILES if expected >= size * groups]
        whole = min(fits[0] if fits else TILES[-1], rows)
        # Each size is a program of its own: four of them leave an eighth of a tile unused.
        parts = [whole * quarters // 4 for quarters in (3, 2, 1)]
        self.sizes = [whole, *(size for size in parts if size >= TILES[-1])]
        self.rows = rows
        # Groups that reach past the last row are cut there.
        stop_G = jnp.minimum(jnp.cumsum(jnp.maximum(group_sizes_G, 0)), rows)
        start_G = jnp.concatenate([jnp.zeros_like(stop_G[:1]), stop_G[:-1]])
        self.order_G = jnp.argsort(start_G - stop_G, stable=True)
        self.start_G, self.stop_G = start_G, stop_G
        self.steps = (jnp.sum(stop_G > start_G) + ABREAST - 1) // ABREAST

    def fold(self, step: Callable[["Step", Any], Any], init: Any) -> Any:
        """Folds `step(groups abreast, carry)` over all that have rows."""
        if not self.rows:
            return init
        return jax.lax.fori_loop(0, self.steps, lambda i, carry: step(Step(self, i), carry), init)


class Step:
    """Groups abreast. Where there are fewer left, the last one is repeated, without rows."""

    def __init__(self, tiles: Tiles, step: jax.Array):
        self.tiles = tiles
        index_P = step * ABREAST + jnp.arange(ABREAST)
        last = tiles.order_G.shape[0] - 1
        self.group_P = tiles.order_G[jnp.minimum(index_P, last)]
        self.start_P = tiles.start_G[self.group_P]
        self.stop_P = jnp.where(index_P <= last, tiles.stop_G[self.group_P], self.start_P)

    def matrices(self, rhs, dtype, arrange: Callable[[jax.Array], jax.Array] = lambda x: x):
        """The groups' matrices [P, ...], as `arrange` gives them, apart from what reads them."""
        # A gather: the arrangement happens on the way, in one pass over a matrix instead of three.
        matrices_P = rhs.at[self.group_P].get(mode="promise_in_bounds")
        return jax.lax.optimization_barrier(arrange(matrices_P).astype(dtype))

    def add(self, out, matrices) -> jax.Array:
        """`out` [G, ...] with matrices added to the groups', zeros where one is repeated."""
        for p in range(ABREAST):
            old = jax.lax.dynamic_index_in_dim(out, self.group_P[p], 0, keepdims=False)
            out = jax.lax.dynamic_update_index_in_dim(out, old + matrices[p], self.group_P[p], 0)
            # Or XLA joins the updates of several groups, no longer in place, and copies `out`.
            out = jax.lax.optimization_barrier(out)
        return out

    def fold(self, tile: Callable[["Tile", Any], Any], init: Any) -> Any:
        """Folds `tile(tile of every group, carry)` over the groups' tiles."""
        sizes = self.tiles.sizes
        most = jnp.max(self.stop_P - self.start_P)
        rest = most % sizes[0]
        carry, done = init, 0
        for size, smaller in zip(sizes, [*sizes[1:], 0], strict=True):
            # At most one round of the smaller sizes: a loop, unlike a conditional, leaves the
            # carry in place. Its body must depend on the round, or XLA runs it beforehand.
            rounds = ((rest <= size) & (rest > smaller)).astype(jnp.int32)
            if size == sizes[0]:
                rounds += most // size
            body = functools.partial(self._round, tile, size, done)
            carry = jax.lax.fori_loop(0, rounds, body, carry)
            done += rounds * size
        return carry

    def _round(self, tile, size: int, done, index, carry):
        return tile(Tile(self, self.start_P + done + index * size, size), carry)


class Tile:
    """Up to `size` rows of every group, from row `own_P` on."""

    def __init__(self, step: Step, own_P: jax.Array, size: int):
        self.start_P = jnp.minimum(own_P, step.tiles.rows - size)
        self.size = size
        row_PR = self.start_P[:, None] + jnp.arange(size)
        self.inside_PR1 = ((row_PR >= own_P[:, None]) & (row_PR < step.stop_P[:, None]))[..., None]

    def rows_of(self, x_MN) -> jax.Array:
        """The tile's rows of an array, [P, R, N]."""
        cut = lambda p: jax.lax.dynamic_slice_in_dim(x_MN, self.start_P[p], self.size)  # noqa: E731
        return jnp.stack([cut(p) for p in range(ABREAST)])

    def gathered(self, x_TN, rows_M) -> jax.Array:
        """The rows of an array which the tile's rows read, [P, R, N]."""
        if rows_M is None:
            return self.rows_of(x_TN)
        return x_TN.at[self.rows_of(rows_M)].get(mode="clip")

    def own(self, x_PRN) -> jax.Array:
        """Rows of the tile, zero where they are not its own."""
        return jax.lax.optimization_barrier(jnp.where(self.inside_PR1, x_PRN, 0))

    def put(self, out_MN, out_PRN) -> jax.Array:
        """`out_MN` with the tile's own rows replaced."""
        for p in range(ABREAST):
            kept_RN = jax.lax.dynamic_slice_in_dim(out_MN, self.start_P[p], self.size)
            out_RN = jnp.where(self.inside_PR1[p], out_PRN[p].astype(out_MN.dtype), kept_RN)
            out_MN = jax.lax.dynamic_update_slice_in_dim(out_MN, out_RN, self.start_P[p], axis=0)
        return out_MN

    def add(self, out_TN, out_PRN, rows_M) -> jax.Array:
        """`out_TN` with the tile's rows, zero where they are not its own, added to those it reads.
        One tile after the other and, on CPUs, one row after the other: the sum has one order.
        """
        if rows_M is None:
            return self.put(out_TN, out_PRN)
        rows = self.rows_of(rows_M).reshape(-1)
        return out_TN.at[rows].add(out_PRN.reshape(-1, out_PRN.shape[-1]), mode="drop")
