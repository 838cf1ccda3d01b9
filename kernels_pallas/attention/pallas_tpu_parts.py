"""What the forward and the backward kernel share: padding, mask inputs, products, hidden pairs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from kernels_pallas.attention import masks
from kernels_pallas.attention.masks import Ids

MASKED = -1e30
"""Score of a hidden pair. Finite, so that no row gives inf - inf; a row's maximum stays at least
half of it, so that exp2 of a hidden score is 0 even in a row that sees nothing."""
NOTHING_SEEN = 1e30
"""Inside the kernels, the log-sum-exp of a row that sees nothing: its exponentials become 0."""
LOG2_E = 1.4426950408889634


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b in float32; float32 operands are not rounded."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def padded(x: jax.Array, axis: int, block: int, **how: Any) -> jax.Array:
    """Filled to a whole number of blocks, with zeros unless `how` says otherwise."""
    missing = -x.shape[axis] % block
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths, **how)


def padded_ids(ids: Ids, q_block: int, kv_block: int) -> Ids:
    """As `masks.visits` wants them."""
    segments, subsegments, mask, q_offset = ids
    if segments is not None:
        segments = padded(segments[0], 1, q_block), padded(segments[1], 1, kv_block)
    if subsegments is not None:
        q_ids, kv_ids = subsegments
        subsegments = (
            padded(q_ids, 1, q_block, mode="edge"),
            padded(kv_ids, 1, kv_block, mode="edge"),
        )
    if mask is not None:
        mask = padded(padded(mask, 1, q_block), 2, kv_block)
    return Ids(segments, subsegments, mask, q_offset)


class MaskInput(NamedTuple):
    """An array that decides which pairs are hidden, and how a kernel gets its part of it."""

    name: str
    array: jax.Array
    spec: pl.BlockSpec


def mask_inputs(padded_ids: Ids, q_block: int, kv_block: int, place) -> list[MaskInput]:
    """The arrays of ids as inputs of a kernel.

    `place(*grid indices and prefetched scalars)` gives (batch, q block, kv block).
    """

    def row_spec(size: int, which: int) -> pl.BlockSpec:
        def index(*args):
            found = place(*args)
            return found[0], 0, found[which]

        return pl.BlockSpec((1, 1, size), index)

    inputs = []
    for name, pair in (("segments", padded_ids.segments), ("subsegments", padded_ids.subsegments)):
        if pair is not None:
            inputs.append(MaskInput("q_" + name, pair[0][:, None], row_spec(q_block, 1)))
            inputs.append(MaskInput("kv_" + name, pair[1][:, None], row_spec(kv_block, 2)))
    if padded_ids.mask is not None:
        mask_BSL = jnp.swapaxes(padded_ids.mask, 1, 2).astype(jnp.int8)
        one = mask_BSL.shape[0] == 1

        def index(*args):
            b, i, j = place(*args)
            return (0 if one else b), j, i

        inputs.append(MaskInput("mask", mask_BSL, pl.BlockSpec((1, kv_block, q_block), index)))
    return inputs


def hide(
    scores_SL: jax.Array,
    shape: masks.Shape,
    refs: dict[str, Any],
    q_offset,
    q_start,
    kv_start,
    columns: slice,
) -> jax.Array:
    """MASKED where a query does not see a key.

    Args:
      scores_SL: a block of keys against `columns` of a block of queries.
      refs: the kernel's parts of `mask_inputs` by name.
      q_offset: the position of query 0.
      q_start, kv_start: index of the first query of the block and of its first key.
      columns: which of the block's queries these are.
    """
    keys, queries = scores_SL.shape
    q_start = q_start + columns.start
    parts = []
    kv_S1 = jax.lax.broadcasted_iota(jnp.int32, (keys, 1), 0) + kv_start
    if shape.causal or shape.window is not None:
        q_1L = jax.lax.broadcasted_iota(jnp.int32, (1, queries), 1) + (q_start + q_offset)
        # Keys behind the end count as later than any query.
        late_S1 = jnp.where(kv_S1 < shape.kv_len, kv_S1, np.int32(2**30))
        if shape.causal:
            parts.append(late_S1 <= q_1L)
        if shape.window is not None:
            parts.append(kv_S1 > q_1L - shape.window)
            if not shape.causal:
                parts.append(late_S1 < q_1L + shape.window)
    elif shape.kv_len % keys and "q_segments" not in refs:
        parts.append(jnp.broadcast_to(kv_S1 < shape.kv_len, scores_SL.shape))
    if "q_segments" in refs:
        q_ids_1L = refs["q_segments"][0, :, columns]
        # No key has segment -1.
        parts.append(jnp.where(q_ids_1L == 0, -1, q_ids_1L) == _column(refs["kv_segments"]))
    if "q_subsegments" in refs:
        parts.append(refs["q_subsegments"][0, :, columns] <= _column(refs["kv_subsegments"]))
    if "mask" in refs:
        parts.append(refs["mask"][0, :, columns].astype(jnp.int32) != 0)
    seen = parts[0] if parts else None
    for part in parts[1:]:
        seen = seen & part
    return scores_SL if seen is None else jnp.where(seen, scores_SL, MASKED)


def _column(ref) -> jax.Array:
    """[S, 1] of a row of ids [1, 1, S]."""
    row_1S = ref[0]
    return jnp.broadcast_to(row_1S, (8, row_1S.shape[1])).T[:, :1]


def strips(block: int, width: int) -> list[slice]:
    """The queries of a block in pieces: what a kernel states together, and the compiler schedules
    without running out of registers.
    """
    return [slice(start, min(start + width, block)) for start in range(0, block, width)]


def last_two_swapped(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)
