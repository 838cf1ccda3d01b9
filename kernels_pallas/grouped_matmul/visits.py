"""Which tile of rows a kernel's step works on, and for which group.

Rows are cut into tiles of equal size, groups are not: a tile that holds rows of several groups is
visited once for each of them. Letter V: visits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Visits(NamedTuple):
    """All int32. The first `count` visits are real; the arrays are as long as there can be any."""

    group_V: jax.Array
    tile_V: jax.Array
    start_G: jax.Array
    """First row of every group, and `stop_G` the row behind its last."""
    stop_G: jax.Array
    count: jax.Array


def by_tile(group_sizes_G: jax.Array, rows: int, tile_rows: int) -> Visits:
    """Visits that cover every tile, in order. One more group, G, holds the rows past the last."""
    start_G, stop_G = _bounds(group_sizes_G, rows)
    start_G = jnp.append(start_G, stop_G[-1]).astype(jnp.int32)
    stop_G = jnp.append(stop_G, rows).astype(jnp.int32)
    return _visits(start_G, stop_G, rows, tile_rows, least=0)


def by_group(group_sizes_G: jax.Array, rows: int, tile_rows: int) -> Visits:
    """Visits that cover every group, in order; an empty group gets one, to be told that it is."""
    return _visits(*_bounds(group_sizes_G, rows), rows, tile_rows, least=1)


def _bounds(group_sizes_G, rows: int) -> tuple[jax.Array, jax.Array]:
    stop_G = jnp.minimum(jnp.cumsum(jnp.maximum(group_sizes_G, 0)), rows).astype(jnp.int32)
    return jnp.concatenate([jnp.zeros_like(stop_G[:1]), stop_G[:-1]]), stop_G


def _visits(start_G, stop_G, rows: int, tile_rows: int, least: int) -> Visits:
    tiles = -(-rows // tile_rows)
    first_G = jnp.minimum(start_G // tile_rows, tiles - 1)
    visits_G = (stop_G + tile_rows - 1) // tile_rows - first_G
    visits_G = jnp.where(stop_G > start_G, visits_G, least)
    behind_G = jnp.cumsum(visits_G)
    # A tile is visited once, and once more for every group that starts inside it.
    visit_V = jnp.arange(tiles + start_G.shape[0], dtype=jnp.int32)
    # By comparisons with all groups: TPUs do a binary search and a gather one number at a time.
    group_V = jnp.sum(behind_G <= visit_V[:, None], axis=1, dtype=jnp.int32)
    group_V = jnp.minimum(group_V, start_G.shape[0] - 1)
    is_group_VG = group_V[:, None] == jnp.arange(start_G.shape[0])
    offset_G = first_G - (behind_G - visits_G)
    tile_V = visit_V + jnp.sum(jnp.where(is_group_VG, offset_G, 0), axis=1, dtype=jnp.int32)
    return Visits(
        group_V, jnp.clip(tile_V, 0, tiles - 1), start_G, stop_G, behind_G[-1].astype(jnp.int32)
    )
