"""Sums of outer products by group on Hopper: the gradient of the experts' matrices.

The contracted axis is the rows': a tile [256, 128] of a group's matrix takes its rows, 64 at a
time, as they lie; the tensor cores read the first operand transposed, so that nothing is transposed
in memory. A group begins and ends anywhere, while copies begin at multiples of 8 rows: the rows of
other groups in its first and last 64 are overwritten with zeros in shared memory, in both operands,
for they may hold anything. What lies in the middle of a group costs no masks.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper

TILE = hopper.Tile(rows=256, columns=128)


def outer(
    lhs_MK: jax.Array,
    d_MN: jax.Array,
    group_sizes_G: jax.Array,
    *,
    out_dtype: Any,
    interpret: Any = False,
) -> jax.Array:
    """out[g] = sum of outer(lhs[m], d[m]) over the rows m of group g, accumulated in float32.

    Args:
      lhs_MK: [M, K], bfloat16 or float16; K a multiple of 64.
      d_MN: [M, N], the same dtype; N a multiple of 64.
      group_sizes_G: int32 [G]; negative ones count as 0, groups that reach past M are cut there.
      out_dtype: of the result, at least 16 bits wide.
      interpret: as in `kernels_pallas.hopper.kernel`.

    Returns:
      [G, K, N]; zeros for empty groups.
    """
    rows, width = lhs_MK.shape
    columns = d_MN.shape[1]
    dtype, out_dtype = lhs_MK.dtype, jnp.dtype(out_dtype)
    ends_G = jnp.minimum(jnp.cumsum(jnp.maximum(group_sizes_G, 0)), rows).astype(jnp.int32)
    starts_G = jnp.concatenate([jnp.zeros(1, jnp.int32), ends_G[:-1]])
    # TMA knows arrays of whole granules only; router outputs are.
    pad = ((0, -rows % hopper.GRANULE), (0, 0))
    if pad[0][1]:
        lhs_MK, d_MN = jnp.pad(lhs_MK, pad), jnp.pad(d_MN, pad)
    items = (group_sizes_G.shape[0], pl.cdiv(width, TILE.rows), pl.cdiv(columns, TILE.columns))

    def body(starts, ends, lhs, d, out, memory, stage, masked):
        def begin(index):
            group, row, column = index
            start, end = starts[group], ends[group]
            # Copies begin here, `start - first` rows too early.
            first = lax.div(start, jnp.int32(hopper.GRANULE)) * hopper.GRANULE
            steps = lax.div(end - first + (hopper.DEPTH - 1), jnp.int32(hopper.DEPTH))
            steps = jnp.where(end > start, steps, 0)
            return (group, row, column, start, end, first), steps

        def copy(item, step):
            _, row, column, _, _, first = item
            at = pl.ds(pl.multiple_of(first + step * hopper.DEPTH, hopper.GRANULE), hopper.DEPTH)
            return (
                lhs.at[at, pl.ds(row * TILE.rows, TILE.rows)],
                d.at[at, pl.ds(column * TILE.columns, TILE.columns)],
            )

        def prepare(item, step, lhs_piece, d_piece):
            _, _, _, start, end, first = item
            low = start - first - step * hopper.DEPTH
            high = end - first - step * hopper.DEPTH

            @pl.when((low > 0) | (high < hopper.DEPTH))
            def _():
                for piece, size in ((lhs_piece, TILE.rows), (d_piece, TILE.columns)):
                    part = piece.at[:, hopper.worker_slice(size)]
                    row = plgpu.broadcasted_iota(
                        jnp.int32, part.shape, 0, layout=plgpu.Layout.WGMMA
                    )
                    values = plgpu.layout_cast(part[...], plgpu.Layout.WGMMA)
                    inside = (row >= low) & (row < high)
                    part[...] = jnp.where(inside, values, jnp.zeros_like(values))
                # Each worker reads all of d, half of which the other one has masked.
                plgpu.commit_smem()
                plgpu.barrier_arrive(masked)
                plgpu.barrier_wait(masked)

        def factors(lhs_piece, d_piece):
            return lhs_piece.at[:, hopper.worker_slice(TILE.rows)].transpose((1, 0)), d_piece

        def finish(item, sums):
            group, row, column, *_ = item
            top = row * TILE.rows + hopper.worker() * TILE.worker_rows
            left = column * TILE.columns

            def send(piece, row, column):
                height, width = piece.shape
                place = out.at[group, pl.ds(top + row, height), pl.ds(left + column, width)]
                hopper.copy(piece, place)

            hopper.store(sums.astype(out_dtype), stage, send)

        hopper.products(
            memory,
            TILE,
            items,
            begin=begin,
            copy=copy,
            prepare=prepare,
            factors=factors,
            finish=finish,
        )

    run = hopper.kernel(
        body,
        name="grouped_outer",
        items=math.prod(items),
        out_type=jax.ShapeDtypeStruct((items[0], width, columns), out_dtype),
        scratch=(
            hopper.ring(TILE, (hopper.DEPTH, TILE.rows), (hopper.DEPTH, TILE.columns), dtype),
            hopper.staging(out_dtype),
            plgpu.Barrier(num_arrivals=hopper.WORKERS),
        ),
        cost=pl.CostEstimate(
            flops=2 * rows * width * columns,
            bytes_accessed=lhs_MK.nbytes
            + d_MN.nbytes
            + items[0] * width * columns * out_dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
    )
    return run(starts_G, ends_G, lhs_MK, d_MN)
