"""The backward kernel: dq, dk and dv in one pass over the blocks of scores.

Grid step n works on three entries of the list of visits:

- entry n: scores of its keys and queries, and the products of values and output gradients;
- entry n - 1: from these, the weights and the gradients of the scores;
- entry n - 2: the products of those with queries, keys and output gradients, added to dq of a
  block of queries and to dk and dv of the whole sequence of keys, which stay in VMEM. Longer
  sequences of keys are done in parts.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention import masks
from kernels_pallas.attention.masks import BEGIN, END, FIRST, LAST, LEAD, PARTIAL, Ids
from kernels_pallas.attention.pallas_tpu_parts import (
    LOG2_E,
    NOTHING_SEEN,
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

STRIP = 256
RESIDENT_BYTES = 8 * 2**20
"""VMEM for dk and dv of one head in float32."""


def backward(q_BLQH, k_BSKH, v_BSKH, ids, out_BLQH, lse_BQL, d_out_BLQH, d_lse_BQL, settings):
    """dq, dk, dv in the shapes and dtypes of q, k, v."""
    lse_BQL = jnp.where(jnp.isneginf(lse_BQL), NOTHING_SEEN, lse_BQL * LOG2_E)
    of_queries = (out_BLQH, lse_BQL, d_out_BLQH, d_lse_BQL)
    head_dim, kv_len = k_BSKH.shape[3], k_BSKH.shape[1]
    block = settings.backward_blocks.kv
    part = max(block, RESIDENT_BYTES // (8 * _lanes(head_dim)) // block * block)
    if kv_len <= part:
        keys = (k_BSKH, v_BSKH, ids)
        return _part(q_BLQH, *keys, *of_queries, settings, q_BLQH.dtype)

    def of_keys(start, length: int, q_offset: int | None):
        """Gradients from the keys start .. start + length. Without a static q_offset, start may be
        traced.
        """
        shape = dataclasses.replace(settings.shape, kv_len=length, q_offset=q_offset)

        def cut(x, axis=1):
            return jax.lax.dynamic_slice_in_dim(x, start, length, axis)

        segments, subsegments = (
            None if pair is None else (pair[0], cut(pair[1]))
            for pair in (ids.segments, ids.subsegments)
        )
        offset = settings.shape.q_offset if ids.q_offset is None else ids.q_offset
        part_ids = Ids(
            segments,
            subsegments,
            None if ids.mask is None else cut(ids.mask, 2),
            jnp.int32(offset - start) if q_offset is None else None,
        )
        keys = (cut(k_BSKH), cut(v_BSKH), part_ids)
        of_part = dataclasses.replace(settings, shape=shape)
        return _part(q_BLQH, *keys, *of_queries, of_part, jnp.float32)

    def add(dq_BLQH, start):
        more_BLQH, *of_part = of_keys(start, part, None)
        return dq_BLQH + more_BLQH, of_part

    # One program for all whole parts, another one for the rest.
    whole, rest = divmod(kv_len, part)
    dq_BLQH, parts = jax.lax.scan(
        add, jnp.zeros(q_BLQH.shape, jnp.float32), jnp.arange(whole) * part
    )
    dk_BSKH, dv_BSKH = (jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]) for x in parts)
    if rest:
        static = settings.shape.q_offset
        start = whole * part
        more_BLQH, dk, dv = of_keys(start, rest, None if static is None else static - start)
        dq_BLQH = dq_BLQH + more_BLQH
        dk_BSKH, dv_BSKH = jnp.concatenate((dk_BSKH, dk), 1), jnp.concatenate((dv_BSKH, dv), 1)
    return dq_BLQH.astype(q_BLQH.dtype), dk_BSKH, dv_BSKH


def _lanes(width: int) -> int:
    return -(-width // 128) * 128


def _part(
    q_BLQH,
    k_BSKH,
    v_BSKH,
    ids,
    out_BLQH,
    lse_BQL,
    d_out_BLQH,
    d_lse_BQL,
    settings: "Settings",
    dq_dtype,
):
    """Gradients from the keys given: dq [B, L, Q, H] in dq_dtype, dk, dv [B, S, K, H]."""
    batch, q_len, q_heads, head_dim = q_BLQH.shape
    kv_len, kv_heads = k_BSKH.shape[1:3]
    group = q_heads // kv_heads
    blocks = settings.backward_blocks
    ids = padded_ids(ids, blocks.q, blocks.kv)
    visits = masks.visits(settings.shape, ids, batch, group, blocks.q, blocks.kv)

    q_BQLH, d_out_BQLH = (padded(jnp.swapaxes(x, 1, 2), 2, blocks.q) for x in (q_BLQH, d_out_BLQH))
    k_BKSH, v_BKSH = (padded(jnp.swapaxes(x, 1, 2), 2, blocks.kv) for x in (k_BSKH, v_BSKH))
    k_BKHS = last_two_swapped(k_BKSH)
    # As the forward kernel wrote it.
    out_BQHL = padded(jnp.transpose(out_BLQH, (0, 2, 3, 1)), 3, blocks.q)
    lse_BQ1L, d_lse_BQ1L = (padded(x, 2, blocks.q)[:, :, None] for x in (lse_BQL, d_lse_BQL))
    q_offset = settings.shape.q_offset if ids.q_offset is None else ids.q_offset
    scalars = (jnp.asarray(q_offset, jnp.int32).reshape(1), *visits[:5])

    def spec(block_shape, age: int, index):
        """Blocks whose index is a function of (batch, query head, key head, q block, kv block) of
        the entry that many steps ago.
        """

        def full(k, n, q_offset, batch, group_of, q_block, kv_block, flags):
            e = n + LEAD - age
            return index(batch[e], k * group + group_of[e], k, q_block[e], kv_block[e])

        return pl.BlockSpec(block_shape, full)

    def newest(k, n, q_offset, batch, group_of, q_block, kv_block, flags):
        return batch[n + LEAD], q_block[n + LEAD], kv_block[n + LEAD]

    of_mask = mask_inputs(ids, blocks.q, blocks.kv, newest)
    q_spec = functools.partial(
        spec, (1, 1, blocks.q, head_dim), index=lambda b, h, k, i, j: (b, h, i, 0)
    )
    kv_spec = functools.partial(
        spec, (1, 1, blocks.kv, head_dim), index=lambda b, h, k, i, j: (b, k, j, 0)
    )
    row_spec = functools.partial(
        spec, (1, 1, 1, blocks.q), index=lambda b, h, k, i, j: (b, h, 0, i)
    )
    padded_kv = k_BKSH.shape[2]
    of_keys = spec((1, 1, padded_kv, head_dim), 2, lambda b, h, k, i, j: (b, k, 0, 0))
    pairs = (len(visits.flags) - 2 * LEAD) * kv_heads * blocks.q * blocks.kv
    dq_BQLH, dk_BKSH, dv_BKSH = pl.pallas_call(
        functools.partial(_kernel, settings=settings, mask_names=[one.name for one in of_mask]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(kv_heads, visits.count + LEAD),
            in_specs=[
                q_spec(age=0),
                q_spec(age=0),
                kv_spec(age=0),
                kv_spec(age=0),
                spec((1, 1, head_dim, blocks.q), 0, lambda b, h, k, i, j: (b, h, 0, i)),
                row_spec(age=0),
                row_spec(age=1),
                q_spec(age=2),
                q_spec(age=2),
                spec((1, 1, head_dim, blocks.kv), 2, lambda b, h, k, i, j: (b, k, 0, j)),
                *[one.spec for one in of_mask],
            ],
            out_specs=[
                q_spec(age=2),
                of_keys,
                of_keys,
            ],
            scratch_shapes=[
                *[pltpu.VMEM((head_dim, blocks.q), q_BLQH.dtype)] * 2,
                *[pltpu.VMEM((blocks.kv, blocks.q), jnp.float32)] * 2,
                *[pltpu.VMEM((blocks.kv, blocks.q), q_BLQH.dtype)] * 2,
                pltpu.VMEM((1, blocks.q), jnp.float32),
                pltpu.VMEM((head_dim, blocks.q), jnp.float32),
                *[pltpu.VMEM((padded_kv, head_dim), jnp.float32)] * 2,
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q_BQLH.shape, dq_dtype),
            jax.ShapeDtypeStruct(k_BKSH.shape, k_BSKH.dtype),
            jax.ShapeDtypeStruct(v_BKSH.shape, v_BSKH.dtype),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=48 * 2**20
        ),
        cost_estimate=pl.CostEstimate(
            flops=10 * pairs * head_dim,
            transcendentals=pairs,
            bytes_accessed=6 * q_BQLH.nbytes + 5 * k_BKSH.nbytes,
        ),
        interpret=settings.interpret,
        name="attention_backward",
    )(
        *scalars,
        q_BQLH,
        d_out_BQLH,
        k_BKSH,
        v_BKSH,
        out_BQHL,
        d_lse_BQ1L,
        lse_BQ1L,
        q_BQLH,
        d_out_BQLH,
        k_BKHS,
        *[one.array for one in of_mask],
    )
    return (
        jnp.swapaxes(dq_BQLH[:, :, :q_len], 1, 2),
        jnp.swapaxes(dk_BKSH[:, :, :kv_len], 1, 2),
        jnp.swapaxes(dv_BKSH[:, :, :kv_len], 1, 2),
    )


def _kernel(
    q_offset_ref,
    batch_ref,
    group_ref,
    q_block_ref,
    kv_block_ref,
    flags_ref,
    q_ref,
    d_out_ref,
    k_ref,
    v_ref,
    out_HL_ref,
    d_lse_ref,
    lse_ref,
    old_q_ref,
    old_d_out_ref,
    old_k_HS_ref,
    *refs,
    settings: "Settings",
    mask_names: list[str],
):
    mask_refs = dict(zip(mask_names, refs, strict=False))
    (
        dq_ref,
        dk_ref,
        dv_ref,
        q_HL,  # transposed once per block of queries
        d_out_HL,
        scores_SL,
        d_weights_SL,
        weights_SL,
        d_scores_SL,
        delta_1L,  # of the entry before
        dq_HL,  # accumulators
        dk_SH,
        dv_SH,
    ) = refs[len(mask_names) :]
    n = pl.program_id(1)
    blocks = settings.backward_blocks
    flags, old_flags = flags_ref[n + LEAD], flags_ref[n]

    @pl.when(flags & FIRST != 0)
    def _():
        q_HL[...] = last_two_swapped(q_ref[0, 0])
        d_out_HL[...] = last_two_swapped(d_out_ref[0, 0])

    @pl.when(old_flags & FIRST != 0)
    def _():
        dq_HL[...] = jnp.zeros_like(dq_HL)

    @pl.when(old_flags & BEGIN != 0)
    def _():
        dk_SH[...] = jnp.zeros_like(dk_SH)
        dv_SH[...] = jnp.zeros_like(dv_SH)

    def step(partial: bool):
        keys = pl.ds(kv_block_ref[n] * blocks.kv, blocks.kv)
        for columns in strips(blocks.q, STRIP):
            weights, d_scores = weights_SL[:, columns], d_scores_SL[:, columns]
            dv_SH[keys] += product(weights, old_d_out_ref[0, 0, columns])
            dk_SH[keys] += product(d_scores, old_q_ref[0, 0, columns])
            dq_HL[:, columns] += product(old_k_HS_ref[0, 0], d_scores)

            weights = jnp.exp2(scores_SL[:, columns] - lse_ref[0, 0, :, columns])
            d_scores = weights * (d_weights_SL[:, columns] - delta_1L[:, columns])
            weights_SL[:, columns] = weights.astype(weights_SL.dtype)
            d_scores_SL[:, columns] = d_scores.astype(d_scores_SL.dtype)

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
            d_weights_SL[:, columns] = product(v_ref[0, 0], d_out_HL[:, columns])

    @pl.when(flags & PARTIAL == 0)
    def _():
        step(partial=False)

    @pl.when(flags & PARTIAL != 0)
    def _():
        step(partial=True)

    @pl.when(flags & FIRST != 0)
    def _():
        products_HL = out_HL_ref[0, 0].astype(jnp.float32) * d_out_HL[...].astype(jnp.float32)
        delta_1L[...] = jnp.sum(products_HL, axis=0, keepdims=True) - d_lse_ref[0, 0]

    @pl.when(old_flags & LAST != 0)
    def _():
        dq_ref[0, 0] = last_two_swapped((dq_HL[...] * settings.scale).astype(dq_ref.dtype))

    @pl.when(old_flags & END != 0)
    def _():
        dk_ref[0, 0] = (dk_SH[...] * settings.scale).astype(dk_ref.dtype)
        dv_ref[0, 0] = dv_SH[...].astype(dv_ref.dtype)
