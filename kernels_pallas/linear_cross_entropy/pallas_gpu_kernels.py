"""The two kernels of linear cross-entropy on Hopper: products whose tiles are used up on the spot.

`statistics` reduces a tile of logits to three numbers a row; `gradient` turns it into the gradient
of the logits, in 16 bits. Both walk through tiles of 128 tokens x 256 columns, in an order that
keeps what neighbours read in the L2 cache.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper

TILE = hopper.Tile(rows=128, columns=256)
ALIGN = 64
"""Width and columns of the operands are multiples of this, tokens of `TILE.rows`."""
LOG2_E = math.log2(math.e)
_NEVER = -1e30
"""Logit of a column that is not there. Finite, so that no row gives inf - inf."""
_ABREAST = 16
"""Tiles of tokens that are walked through before the next column of tiles."""


def statistics(
    x_TD: jax.Array,
    w_DV: jax.Array,
    columns_T: jax.Array,
    *,
    vocab: int,
    soft_cap: float | None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the softmax needs of every tile of the logits x @ w.

    Args:
      x_TD: [T, D], bfloat16 or float16; T a multiple of 128, D of 64.
      w_DV: [D, V], the same dtype; V a multiple of 64.
      columns_T: int32 [T], the target's column; one outside 0 .. vocab - 1 is in no tile.
      vocab: columns from there on count as absent.
      soft_cap: as in `kernels_pallas.linear_cross_entropy.linear_cross_entropy`.
      interpret: as in `kernels_pallas.hopper.kernel`.

    Returns:
      float32 [ceil(V / 256), T] each: the largest logit of a row of the tile, the sum of
      exp(logit - largest), and the target's logit, 0 where the target is in another tile.
    """
    tokens, tiles = x_TD.shape[0], pl.cdiv(w_DV.shape[1], TILE.columns)
    part = plgpu.Layout.WGMMA.reduce(1)
    # A target on another device may be counted like a column that pads the last tile here.
    columns_T = jnp.where(columns_T < vocab, columns_T, -1)

    def body(x, w, columns, top_out, sum_out, target_out, memory, stage):
        def finish(item, sums):
            row, column = item
            first = pl.multiple_of(
                row * TILE.rows + hopper.worker() * TILE.worker_rows, TILE.worker_rows
            )
            at = pl.ds(first, TILE.worker_rows)
            logits = _capped(sums, soft_cap)
            number = plgpu.broadcasted_iota(jnp.int32, sums.shape, 1, layout=plgpu.Layout.WGMMA)
            start = column * TILE.columns
            if vocab % TILE.columns:
                logits = jnp.where(number < vocab - start, logits, _NEVER)
            target = plgpu.load(columns.at[at], layout=part, optimized=False) - start
            top = jnp.max(logits, axis=1)
            total = jnp.sum(jnp.exp2((logits - _across(top, logits)) * LOG2_E), axis=1)
            own = jnp.sum(jnp.where(number == _across(target, number), logits, 0.0), axis=1)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            outputs = (top_out, sum_out, target_out)
            for place, values in enumerate((top, total, own)):
                stage[hopper.worker(), place] = values
            plgpu.commit_smem()
            for place, output in enumerate(outputs):
                plgpu.copy_smem_to_gmem(stage.at[hopper.worker(), place], output.at[column, at])

        _walk(x, w, memory, tokens, tiles, jnp.int32(0), finish)

    shape = jax.ShapeDtypeStruct((tiles, tokens), jnp.float32)
    run = hopper.kernel(
        body,
        name="linear_cross_entropy_statistics",
        items=tokens // TILE.rows * tiles,
        out_type=(shape,) * 3,
        scratch=(
            _ring(x_TD.dtype),
            plgpu.SMEM((hopper.WORKERS, 3, TILE.worker_rows), jnp.float32),
        ),
        cost=_cost(x_TD, w_DV, w_DV.shape[1], 12 * tiles * tokens),
        interpret=interpret,
    )
    return run(x_TD, w_DV, columns_T)


def gradient(
    x_TD: jax.Array,
    w_DV: jax.Array,
    start: jax.Array,
    columns_T: jax.Array,
    lse_T: jax.Array,
    d_lse_T: jax.Array,
    d_target_T: jax.Array,
    *,
    width: int,
    soft_cap: float | None,
    interpret: Any = False,
) -> jax.Array:
    """The gradient of some columns of the logits x @ w, which are computed again.

    Args:
      x_TD, w_DV, soft_cap, interpret: as in `statistics`.
      start: int32 []; the first of these columns, a multiple of 64.
      columns_T: int32 [T], the target's column, counted over all of w.
      lse_T: float32 [T], the log-sum-exp of the (capped) logits.
      d_lse_T, d_target_T: float32 [T], gradients of the log-sum-exp and of the target's logit.
      width: how many columns, a multiple of 64.

    Returns:
      [T, width] in x's dtype; what stands in columns past w's end is not defined.
    """
    tokens, tiles = x_TD.shape[0], pl.cdiv(width, TILE.columns)
    dtype = x_TD.dtype
    part = plgpu.Layout.WGMMA.reduce(1)

    def body(x, w, start, columns, lse, d_lse, d_target, out, memory, stage):
        begin = start[0]

        def finish(item, sums):
            row, column = item
            first = pl.multiple_of(
                row * TILE.rows + hopper.worker() * TILE.worker_rows, TILE.worker_rows
            )

            def of_rows(ref):
                values = plgpu.load(
                    ref.at[pl.ds(first, TILE.worker_rows)], layout=part, optimized=False
                )
                return _across(values, sums)

            logits = _capped(sums, soft_cap)
            d_logits = jnp.exp2((logits - of_rows(lse)) * LOG2_E) * of_rows(d_lse)
            number = plgpu.broadcasted_iota(jnp.int32, sums.shape, 1, layout=plgpu.Layout.WGMMA)
            here = number == of_rows(columns) - (begin + column * TILE.columns)
            d_logits += jnp.where(here, of_rows(d_target), 0.0)
            if soft_cap is not None:
                share = logits / soft_cap
                d_logits *= 1.0 - share * share

            def send(piece, row, left):
                height, width = piece.shape
                columns = pl.ds(column * TILE.columns + left, width)
                hopper.copy(piece, out.at[pl.ds(first + row, height), columns])

            hopper.store(d_logits.astype(dtype), stage, send)

        _walk(x, w, memory, tokens, tiles, begin, finish)

    run = hopper.kernel(
        body,
        name="linear_cross_entropy_gradient",
        items=tokens // TILE.rows * tiles,
        out_type=jax.ShapeDtypeStruct((tokens, width), dtype),
        scratch=(_ring(dtype), hopper.staging(dtype)),
        cost=_cost(x_TD, w_DV, width, tokens * width * dtype.itemsize),
        interpret=interpret,
    )
    return run(x_TD, w_DV, start[None], columns_T, lse_T, d_lse_T, d_target_T)


def _ring(dtype) -> hopper.Ring:
    return hopper.ring(TILE, (TILE.rows, hopper.DEPTH), (hopper.DEPTH, TILE.columns), dtype)


def _cost(x, w, columns: int, output_bytes: int) -> pl.CostEstimate:
    return pl.CostEstimate(
        flops=2 * x.size * columns,
        bytes_accessed=x.nbytes + w.shape[0] * columns * w.dtype.itemsize + output_bytes,
        transcendentals=x.shape[0] * columns,
    )


def _walk(x, w, memory, tokens, tiles, start, finish) -> None:
    """Every tile of x @ w[:, start:], `tiles` of them in a row; `finish` gets row and column."""
    rows = tokens // TILE.rows
    steps = jnp.int32(pl.cdiv(x.shape[1], hopper.DEPTH))

    def begin(index):
        return plgpu.planar_snake(index[0], (rows, tiles), 0, min(_ABREAST, rows)), steps

    def copy(item, step):
        row, column = item
        depth = pl.ds(step * hopper.DEPTH, hopper.DEPTH)
        columns = pl.ds(pl.multiple_of(start + column * TILE.columns, ALIGN), TILE.columns)
        return x.at[pl.ds(row * TILE.rows, TILE.rows), depth], w.at[depth, columns]

    def factors(x_piece, w_piece):
        return x_piece.at[hopper.worker_slice(TILE.rows)], w_piece

    hopper.products(
        memory, TILE, (rows * tiles,), begin=begin, copy=copy, factors=factors, finish=finish
    )


def _across(values, like):
    """One value a row for all columns."""
    return lax.broadcast_in_dim(values, like.shape, (0,))


def _capped(logits, soft_cap: float | None):
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits * (1.0 / soft_cap))
