"""Which keys a query may see, and which blocks of the score matrix follow from that.

A query of position p (its index plus `q_offset`) sees a key of position s when all of these allow
it; the ones that are not given allow everything:

- causal: s <= p.
- window w: s > p - w, and without `causal` also s < p + w.
- segments: both have the same id, and it is not 0 (padding).
- subsegments: the query's id is at most the key's. Annotations of one image that may not see each
  other carry ids 1, 2, ... and the image before them, which all of them see, one that is larger
  than any of these (the rule of Molmo's data format, with causal=True).
- mask: any bool array.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FIRST, LAST, PARTIAL, BEGIN, END = 1, 2, 4, 8, 16
"""Flags of a visit: first and last one of its row of blocks; some pairs in it are hidden; first and
last one of its sequence."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The part of a mask that is known at compile time. `q_offset` is None where it is an array."""

    causal: bool
    window: int | None
    q_len: int
    kv_len: int
    q_offset: int | None = 0


class Ids(NamedTuple):
    """The part of a mask that arrays give; None where it is not used.

    Segments and subsegments are pairs of int32 [B, L] and [B, S]; mask is bool [B or 1, L, S];
    q_offset is an int32 scalar.
    """

    segments: tuple[jax.Array, jax.Array] | None = None
    subsegments: tuple[jax.Array, jax.Array] | None = None
    mask: jax.Array | None = None
    q_offset: jax.Array | None = None


def dense(shape: Shape, ids: Ids, queries: slice, keys: slice) -> jax.Array | np.ndarray | None:
    """bool, broadcastable to [B, L, S], for a range of queries and keys. None when all is seen."""
    parts: list[Any] = []
    q_offset = shape.q_offset if ids.q_offset is None else ids.q_offset
    if shape.causal or shape.window is not None:
        q_position_L1 = np.arange(queries.start, queries.stop)[:, None] + q_offset
        kv_position_S = np.arange(keys.start, keys.stop)[None, :]
        if shape.causal:
            parts.append((kv_position_S <= q_position_L1)[None])
        if shape.window is not None:
            parts.append((kv_position_S > q_position_L1 - shape.window)[None])
            if not shape.causal:
                parts.append((kv_position_S < q_position_L1 + shape.window)[None])
    if ids.segments is not None:
        q_ids_BL1, kv_ids_B1S = ids.segments[0][:, queries, None], ids.segments[1][:, None, keys]
        parts.append((q_ids_BL1 == kv_ids_B1S) & (q_ids_BL1 != 0))
    if ids.subsegments is not None:
        parts.append(ids.subsegments[0][:, queries, None] <= ids.subsegments[1][:, None, keys])
    if ids.mask is not None:
        parts.append(ids.mask[:, queries, keys])
    seen = None
    for part in parts:
        if isinstance(part, np.ndarray) and part.all():
            continue
        seen = part if seen is None else seen & part
    return seen


def no_gradient(ids: Any) -> Any:
    """The cotangents of integers."""
    return jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), ids)


class Visits(NamedTuple):
    """The blocks of scores worth computing, in order of sequence, head of the group, block of
    queries and block of keys: int32 [entries] each, and how many of the entries are real.

    Two copies of the first entry stand before the list and two of the last one behind it.
    """

    batch: jax.Array | np.ndarray
    group: jax.Array | np.ndarray
    q_block: jax.Array | np.ndarray
    kv_block: jax.Array | np.ndarray
    flags: jax.Array | np.ndarray
    count: jax.Array | int


LEAD = 2


def visits(shape: Shape, ids: Ids, batch: int, groups: int, q_block: int, kv_block: int) -> Visits:
    """Lists the blocks in which any pair is seen.

    Arrays of ids are padded to whole blocks: segments with 0, a mask with False, subsegments with
    their last id. Every block of queries is in the list at least once, so that its output is
    written; where it sees nothing, that entry is PARTIAL and hides all of its pairs.
    """
    any_BIJ, all_BIJ = _blocks(shape, ids, q_block, kv_block)
    xp: Any = np if isinstance(any_BIJ, np.ndarray) else jnp
    blocks_IJ = any_BIJ.shape[1:]
    blind_BI1 = ~any_BIJ.any(axis=2, keepdims=True)
    visit_BIJ = any_BIJ | (blind_BI1 & (np.arange(blocks_IJ[1]) == 0))
    visit_BGIJ = xp.broadcast_to(visit_BIJ[:, None], (batch, groups, *blocks_IJ))
    partial_BIJ = xp.broadcast_to(~(all_BIJ & any_BIJ), (batch, *blocks_IJ))
    if xp is np:
        found = np.nonzero(visit_BGIJ)
        count: Any = len(found[0])
    else:
        # Ids can only take blocks away from those that positions leave.
        possible_IJ, _ = _positions(shape, q_block, kv_block)
        size = int(batch * groups * np.maximum(possible_IJ.sum(axis=1), 1).sum())
        count = visit_BGIJ.sum()
        (flat,) = jnp.nonzero(visit_BGIJ.reshape(-1), size=size)
        flat = jnp.where(jnp.arange(size) < count, flat, flat[count - 1])
        found = jnp.unravel_index(flat, visit_BGIJ.shape)
    lead, tail = (0, 0), (-1, -1)
    places = [
        xp.concatenate([place[np.array(lead)], place, place[np.array(tail)]]).astype(np.int32)
        for place in found
    ]
    b, g, i, j = places
    row = (b * groups + g) * blocks_IJ[0] + i
    n = xp.arange(len(b))
    start, end = n == LEAD, n == LEAD + count - 1
    flags = (
        FIRST * ((row != xp.roll(row, 1)) | start)
        + LAST * ((row != xp.roll(row, -1)) | end)
        + PARTIAL * partial_BIJ[b, i, j]
        + BEGIN * ((b != xp.roll(b, 1)) | start)
        + END * ((b != xp.roll(b, -1)) | end)
    ).astype(np.int32)
    return Visits(b, g, i, j, flags, count)


def _positions(shape: Shape, q_block: int, kv_block: int, q_offset=None):
    """(any, all) pairs seen by causal, window and the end of the keys: bool [I, J] each."""
    if q_offset is None:
        q_offset = shape.q_offset
    q_blocks, kv_blocks = -(-shape.q_len // q_block), -(-shape.kv_len // kv_block)
    q_low = np.arange(q_blocks)[:, None] * q_block
    q_high = np.minimum(q_low + q_block, shape.q_len) - 1
    kv_low = np.arange(kv_blocks)[None, :] * kv_block
    kv_high = np.minimum(kv_low + kv_block, shape.kv_len) - 1
    some = np.ones((q_blocks, kv_blocks), bool)
    every = np.broadcast_to(kv_low + kv_block <= shape.kv_len, some.shape)
    if q_offset is None:
        return some, every
    q_low, q_high = q_low + q_offset, q_high + q_offset
    if shape.causal:
        some = some & (kv_low <= q_high)
        every = every & (kv_high <= q_low)
    if shape.window is not None:
        some = some & (kv_high > q_low - shape.window)
        every = every & (kv_low > q_high - shape.window)
        if not shape.causal:
            some = some & (kv_low < q_high + shape.window)
            every = every & (kv_high < q_low + shape.window)
    return some, every


def _blocks(shape: Shape, ids: Ids, q_block: int, kv_block: int):
    """(any, all): bool [B or 1, I, J], of which any may say True where no pair is seen."""
    some, every = _positions(shape, q_block, kv_block, ids.q_offset)
    some, every = some[None], every[None]
    if ids.segments is not None:
        (q_low, q_high), (kv_low, kv_high) = (
            (_reduce(x, size, jnp.min), _reduce(x, size, jnp.max))
            for x, size in zip(ids.segments, (q_block, kv_block), strict=True)
        )
        q_first, kv_first = (
            _reduce(jnp.where(x == 0, np.iinfo(np.int32).max, x), size, jnp.min)
            for x, size in zip(ids.segments, (q_block, kv_block), strict=True)
        )
        some = (
            some
            & _pairs(kv_first, q_high, jnp.less_equal)
            & _pairs(kv_high, q_first, jnp.greater_equal)
        )
        one = _pairs(kv_low == kv_high, (q_low == q_high) & (q_low != 0), jnp.logical_and)
        every = every & one & _pairs(kv_low, q_low, jnp.equal)
    if ids.subsegments is not None:
        q_ids, kv_ids = ids.subsegments
        some = some & _pairs(
            _reduce(kv_ids, kv_block, jnp.max), _reduce(q_ids, q_block, jnp.min), jnp.greater_equal
        )
        every = every & _pairs(
            _reduce(kv_ids, kv_block, jnp.min), _reduce(q_ids, q_block, jnp.max), jnp.greater_equal
        )
    if ids.mask is not None:
        rows, q_len, kv_len = ids.mask.shape
        tiles = ids.mask.reshape(rows, q_len // q_block, q_block, kv_len // kv_block, kv_block)
        some = some & tiles.any(axis=(2, 4))
        every = every & tiles.all(axis=(2, 4))
    return some, every


def _reduce(ids_BL: jax.Array, block: int, function) -> jax.Array:
    return function(ids_BL.reshape(ids_BL.shape[0], -1, block), axis=2)


def _pairs(kv_BJ: jax.Array, q_BI: jax.Array, function) -> jax.Array:
    """[B, I, J] of function(key block, query block)."""
    return function(kv_BJ[:, None, :], q_BI[:, :, None])
