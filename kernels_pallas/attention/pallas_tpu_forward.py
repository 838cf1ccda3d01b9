"""The forward kernel: see pallas_tpu.py for what it computes and README.md for why so.

Grid step n works on three entries of the list of visits:

- entry n: scores of its keys and queries, and the running maximum with them;
- entry n - 1: exponentials of its scores (the running maximum has seen them, nothing more);
- entry n - 2: their product with the values, added to the accumulator.
"""

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention import masks
from kernels_pallas.attention.masks import FIRST, LAST, LEAD, PARTIAL
from kernels_pallas.attention.pallas_tpu_parts import (
    LOG2_E,
    MASKED,
    hide,
    last_two_swapped,
    mask_inputs,
    padded,
    padded_ids,
    product,
    strips,
)

if TYPE_CHECKING:
    from kernels_pallas.attention.pallas_tpu import Settings

STRIP = 512
SUM_ROWS = 16
"""Rows of ones under the values: the product then has the sum of the weights in its last rows."""


def forward(q_BLQH, k_BSKH, v_BSKH, ids: masks.Ids, settings: "Settings"):
    """Output [B, L, Q, H] and log-sum-exp float32 [B, Q, L]; -inf where nothing is seen."""
    batch, q_len, q_heads, head_dim = q_BLQH.shape
    group = q_heads // k_BSKH.shape[2]
    blocks = settings.forward_blocks
    ids = padded_ids(ids, blocks.q, blocks.kv)
    visits = masks.visits(settings.shape, ids, batch, 1, blocks.q, blocks.kv)

    q_BQLH = padded(jnp.swapaxes(q_BLQH, 1, 2), 2, blocks.q)
    k_BKSH = padded(jnp.swapaxes(k_BSKH, 1, 2), 2, blocks.kv)
    v_BKHS = padded(jnp.transpose(v_BSKH, (0, 2, 3, 1)), 3, blocks.kv)
    q_offset = settings.shape.q_offset if ids.q_offset is None else ids.q_offset
    scalars = (
        jnp.asarray(q_offset, jnp.int32).reshape(1),
        visits.batch,
        visits.q_block,
        visits.kv_block,
        visits.flags,
    )

    def new(h, n, q_offset, batch, q_block, kv_block, flags):
        return batch[n + LEAD], q_block[n + LEAD], kv_block[n + LEAD]

    def old(h, n, q_offset, batch, q_block, kv_block, flags):
        return batch[n], q_block[n], kv_block[n]

    def spec(block_shape, place, index):
        """Blocks whose index is a function of (head, batch, q block, kv block)."""
        return pl.BlockSpec(block_shape, lambda h, n, *scalars: index(h, *place(h, n, *scalars)))

    of_mask = mask_inputs(ids, blocks.q, blocks.kv, new)
    padded_len = q_BQLH.shape[2]
    kernel = functools.partial(
        _kernel,
        settings=settings,
        head_dim=head_dim,
        mask_names=[one.name for one in of_mask],
    )
    rows = jax.ShapeDtypeStruct((batch, q_heads, 1, padded_len), jnp.float32)
    out_BQHL, lse_BQ1L = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(q_heads, visits.count + LEAD),
            in_specs=[
                spec((1, 1, blocks.q, head_dim), new, lambda h, b, i, j: (b, h, i, 0)),
                spec(
                    (1, 1, blocks.kv, head_dim),
                    new,
                    lambda h, b, i, j: (b, jax.lax.div(h, group), j, 0),
                ),
                spec(
                    (1, 1, head_dim, blocks.kv),
                    old,
                    lambda h, b, i, j: (b, jax.lax.div(h, group), 0, j),
                ),
                *[one.spec for one in of_mask],
            ],
            out_specs=[
                spec((1, 1, head_dim, blocks.q), old, lambda h, b, i, j: (b, h, 0, i)),
                spec((1, 1, 1, blocks.q), old, lambda h, b, i, j: (b, h, 0, i)),
            ],
            scratch_shapes=[
                pltpu.VMEM((head_dim, blocks.q), q_BLQH.dtype),
                pltpu.VMEM((head_dim + SUM_ROWS, blocks.q), jnp.float32),
                pltpu.VMEM((blocks.kv, blocks.q), jnp.float32),
                pltpu.VMEM((blocks.kv, blocks.q), v_BSKH.dtype),
                *[pltpu.VMEM((1, blocks.q), jnp.float32)] * 5,
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, q_heads, head_dim, padded_len), q_BLQH.dtype),
            rows,
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=32 * 2**20
        ),
        cost_estimate=_cost(q_BQLH, k_BKSH, visits, blocks),
        interpret=settings.interpret,
        name="attention_forward",
    )(*scalars, q_BQLH, k_BKSH, v_BKHS, *[one.array for one in of_mask])
    out_BLQH = jnp.transpose(out_BQHL[..., :q_len], (0, 3, 1, 2))
    return out_BLQH, lse_BQ1L[:, :, 0, :q_len]


def _kernel(
    q_offset_ref,
    batch_ref,
    q_block_ref,
    kv_block_ref,
    flags_ref,
    q_ref,
    k_ref,
    v_ref,
    *refs,
    settings: "Settings",
    head_dim: int,
    mask_names: list[str],
):
    mask_refs = dict(zip(mask_names, refs, strict=False))
    (
        out_ref,
        lse_ref,
        q_HL,  # the queries, transposed once per block of them
        sums_HL,  # accumulator of weights @ values, and of the weights alone
        scores_SL,
        weights_SL,
        top,  # running maximum with the newest scores,
        mid_top,  # the same one entry earlier,
        old_top,  # and two entries earlier
        decay,  # what the newest scores did to the scale of the accumulator
        old_decay,  # and those before them
    ) = refs[len(mask_names) :]
    n = pl.program_id(1)
    blocks = settings.forward_blocks
    flags, old_flags = flags_ref[n + LEAD], flags_ref[n]

    @pl.when(flags & FIRST != 0)
    def _():
        q_HL[...] = last_two_swapped(q_ref[0, 0])

    @pl.when(old_flags & FIRST != 0)
    def _():
        sums_HL[...] = jnp.zeros_like(sums_HL)

    def step(partial: bool):
        values_HS = v_ref[0, 0]
        ones = jnp.ones((SUM_ROWS, blocks.kv), values_HS.dtype)
        values_HS = jnp.concatenate([values_HS, ones])
        for columns in strips(blocks.q, STRIP):
            sums_HL[:, columns] = sums_HL[:, columns] * old_decay[:, columns] + product(
                values_HS, weights_SL[:, columns]
            )
            weights = jnp.exp2(scores_SL[:, columns] - top[:, columns])
            weights_SL[:, columns] = weights.astype(weights_SL.dtype)
            scores = product(k_ref[0, 0], q_HL[:, columns]) * (settings.scale * LOG2_E)
            if partial:
                scores = hide(
                    scores,
                    settings.shape,
                    mask_refs,
                    q_offset_ref[0],
                    q_block_ref[n + LEAD] * blocks.q,
                    kv_block_ref[n + LEAD] * blocks.kv,
                    columns,
                )
            scores_SL[:, columns] = scores
            before = jnp.where(flags & FIRST != 0, MASKED / 2, top[:, columns])
            now = jnp.maximum(before, jnp.max(scores, axis=0, keepdims=True))
            old_decay[:, columns] = decay[:, columns]
            decay[:, columns] = jnp.exp2(before - now)
            mid_top[:, columns] = top[:, columns]
            top[:, columns] = now

    @pl.when(flags & PARTIAL == 0)
    def _():
        step(partial=False)

    @pl.when(flags & PARTIAL != 0)
    def _():
        step(partial=True)

    @pl.when(old_flags & LAST != 0)
    def _():
        total_1L = sums_HL[head_dim : head_dim + 1]
        seen = total_1L > 0
        total_1L = jnp.where(seen, total_1L, 1.0)
        out_ref[0, 0] = (sums_HL[:head_dim] / total_1L).astype(out_ref.dtype)
        lse = (old_top[...] + jnp.log2(total_1L)) / LOG2_E
        lse_ref[0, 0] = jnp.where(seen, lse, -jnp.inf)

    old_top[...] = mid_top[...]


def _cost(q_BQLH, k_BKSH, visits: masks.Visits, blocks) -> pl.CostEstimate:
    """Of all visits that the list has room for."""
    heads, head_dim = q_BQLH.shape[1], q_BQLH.shape[3]
    pairs = (len(visits.flags) - 2 * LEAD) * heads * blocks.q * blocks.kv
    moved = 2 * q_BQLH.size * q_BQLH.dtype.itemsize
    moved += 2 * pairs // blocks.q * head_dim * k_BKSH.dtype.itemsize
    return pl.CostEstimate(flops=4 * pairs * head_dim, transcendentals=pairs, bytes_accessed=moved)
