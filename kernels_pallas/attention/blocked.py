"""Attention in blocks for XLA, with its own backward pass; the default on CPUs.

Forward: a block of queries multiplies only the keys before its end. Backward: a block of keys
multiplies only the queries behind its start, and probabilities are recomputed from the saved
log-sum-exp (the scheme of FlashAttention 2, arXiv 2307.08691). Causal attention costs about half of
the materialised version, and only the scores of one block are alive at a time.

What is written unusually here is so because of XLA's CPU backend, and harmless elsewhere:

- Matrix libraries take row-major products only, and bfloat16 only from them. The backward pass
  therefore works on transposed scores [S, L], where every large operand is used as it lies.
- A row sum as a product with ones runs at memory speed, a row maximum by halves nearly so.
- Barriers stand where fusion would compute a row's statistics again for each of its elements.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.xla_cpu import row_major, row_max

BLOCK = 128
MAX_BLOCKS = 16
MASKED = -1e30
"""Added to the scores of masked pairs. Finite, so that no row gives inf - inf."""


def attention(
    q_BLQH, k_BSKH, v_BSKH, *, causal, scale, q_offset, q_segment_ids, kv_segment_ids
) -> jax.Array:
    """See `kernels_pallas.attention.attention`. `q_offset` must be a Python int."""
    batch, q_len, q_heads, head_dim = q_BLQH.shape
    kv_heads = k_BSKH.shape[2]
    q_BLKGH = q_BLQH.reshape(batch, q_len, kv_heads, q_heads // kv_heads, head_dim)
    segments = None if q_segment_ids is None else (q_segment_ids, kv_segment_ids)
    out_BKGLH = _attention(
        row_major(jnp.transpose(q_BLKGH, (0, 2, 3, 1, 4))),
        row_major(jnp.swapaxes(k_BSKH, 1, 2)),
        row_major(jnp.swapaxes(v_BSKH, 1, 2)),
        segments,
        causal,
        float(scale),
        q_offset,
    )
    return jnp.transpose(out_BKGLH, (0, 3, 1, 2, 4)).reshape(q_BLQH.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attention(q_BKGLH, k_BKSH, v_BKSH, segments, causal, scale, q_offset):
    return _forward(q_BKGLH, k_BKSH, v_BKSH, segments, causal, scale, q_offset)[0]


def _forward(q_BKGLH, k_BKSH, v_BKSH, segments, causal, scale, q_offset):
    q_len, kv_len = q_BKGLH.shape[3], k_BKSH.shape[2]
    outputs, lses = [], []
    for start, stop in _blocks(q_len):
        queries = slice(start, stop)
        keys = slice(0, min(kv_len, stop + q_offset) if causal else kv_len)
        bias = _bias(queries, keys, segments, causal, q_offset)
        v_BKSH_seen = v_BKSH[:, :, keys]
        scores_BKRS = _product(_rows(q_BKGLH[..., queries, :]), k_BKSH[:, :, keys], 3, 3)
        logits_BKGLS = scores_BKRS.reshape(*q_BKGLH.shape[:3], stop - start, -1) * scale
        if bias is not None:
            logits_BKGLS = logits_BKGLS + bias
        # A row that sees nothing keeps weights of exp(MASKED - MASKED / 2) = 0.
        top_BKGL = jax.lax.optimization_barrier(jnp.maximum(row_max(logits_BKGLS), MASKED / 2))
        weights_BKGLS = jnp.exp(logits_BKGLS - top_BKGL[..., None]).astype(v_BKSH.dtype)
        weights_BKGLS = jax.lax.optimization_barrier(weights_BKGLS)
        total_BKGL = jnp.matmul(
            weights_BKGLS,
            jnp.ones(weights_BKGLS.shape[-1], weights_BKGLS.dtype),
            preferred_element_type=jnp.float32,
        )
        sees_BKGL = total_BKGL > 0
        total_BKGL = jnp.where(sees_BKGL, total_BKGL, 1.0)
        sums_BKRH = _product(_rows(weights_BKGLS), v_BKSH_seen, 3, 2)
        out_BKGLH = sums_BKRH.reshape(*q_BKGLH.shape[:3], stop - start, -1)
        outputs.append((out_BKGLH / total_BKGL[..., None]).astype(q_BKGLH.dtype))
        lses.append(jnp.where(sees_BKGL, top_BKGL + jnp.log(total_BKGL), 0.0))
    out_BKGLH = _join(outputs, axis=3)
    return out_BKGLH, (q_BKGLH, k_BKSH, v_BKSH, segments, out_BKGLH, _join(lses, axis=3))


def _backward(causal, scale, q_offset, residuals, d_out_BKGLH):
    q_BKGLH, k_BKSH, v_BKSH, segments, out_BKGLH, lse_BKGL = residuals
    q_len, kv_len, dtype = q_BKGLH.shape[3], k_BKSH.shape[2], q_BKGLH.dtype
    lead = q_BKGLH.shape[:2]
    d_out_BKGLH = row_major(d_out_BKGLH)
    delta_BKGL = jnp.sum(d_out_BKGLH.astype(jnp.float32) * out_BKGLH.astype(jnp.float32), axis=-1)
    lse_BKGL, delta_BKGL = jax.lax.optimization_barrier((lse_BKGL, delta_BKGL))
    k_BKHS = row_major(jnp.swapaxes(k_BKSH, 2, 3))
    dq_BKHGL = jnp.zeros((*lead, k_BKSH.shape[3], *q_BKGLH.shape[2:4]), jnp.float32)
    dks, dvs = [], []
    for start, stop in _blocks(kv_len):
        keys = slice(start, stop)
        queries = slice(min(q_len, max(0, start - q_offset)) if causal else 0, q_len)
        if queries.start == q_len:
            dks.append(jnp.zeros_like(k_BKSH[:, :, keys]))
            dvs.append(dks[-1])
            continue
        shape_BKSGL = (*lead, stop - start, q_BKGLH.shape[2], q_len - queries.start)
        q_BKRH, d_out_BKRH = _rows(q_BKGLH[..., queries, :]), _rows(d_out_BKGLH[..., queries, :])
        bias = _bias(queries, keys, segments, causal, q_offset)
        scores_BKSR = _product(k_BKSH[:, :, keys], q_BKRH, 3, 3)
        logits_BKSGL = scores_BKSR.reshape(shape_BKSGL) * scale
        if bias is not None:
            logits_BKSGL = logits_BKSGL + jnp.moveaxis(bias, -1, -3)
        weights_BKSGL = jnp.exp(logits_BKSGL - lse_BKGL[:, :, None, :, queries]).astype(dtype)
        weights_BKSGL = jax.lax.optimization_barrier(weights_BKSGL)
        d_weights_BKSR = _product(v_BKSH[:, :, keys], d_out_BKRH, 3, 3)
        d_scores_BKSGL = weights_BKSGL.astype(jnp.float32) * (
            d_weights_BKSR.reshape(shape_BKSGL) - delta_BKGL[:, :, None, :, queries]
        )
        weights_BKSR = weights_BKSGL.reshape(scores_BKSR.shape)
        d_scores_BKSR = (d_scores_BKSGL * scale).astype(dtype).reshape(scores_BKSR.shape)
        d_scores_BKSR = jax.lax.optimization_barrier(d_scores_BKSR)
        dvs.append(_product(weights_BKSR, d_out_BKRH, 3, 2).astype(dtype))
        dks.append(_product(d_scores_BKSR, q_BKRH, 3, 2).astype(dtype))
        part_BKHR = _product(k_BKHS[..., keys], d_scores_BKSR, 3, 2)
        part_BKHGL = part_BKHR.reshape(*lead, -1, *shape_BKSGL[3:])
        dq_BKHGL = dq_BKHGL.at[..., queries].add(part_BKHGL)
    dq_BKGLH = jnp.transpose(dq_BKHGL, (0, 1, 3, 4, 2)).astype(dtype)
    d_segments = jax.tree.map(lambda ids: np.zeros(ids.shape, jax.dtypes.float0), segments)
    return dq_BKGLH, _join(dks, axis=2), _join(dvs, axis=2), d_segments


_attention.defvjp(_forward, _backward)


def _blocks(length: int) -> list[tuple[int, int]]:
    """(start, stop) of every block. Long sequences get longer blocks: each is compiled apart."""
    size = max(BLOCK, math.ceil(length / MAX_BLOCKS / BLOCK) * BLOCK)
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _bias(queries: slice, keys: slice, segments, causal: bool, q_offset: int):
    """float32, 0 where a query sees a key and MASKED elsewhere: [1, L, S], or [B, 1, 1, L, S]
    with segments. None when it sees all.
    """
    bias = None
    if causal and keys.stop - 1 > queries.start + q_offset:
        q_position = np.arange(queries.start, queries.stop)[:, None] + q_offset
        hidden = np.arange(keys.start, keys.stop)[None, :] > q_position
        bias = np.where(hidden, np.float32(MASKED), np.float32(0))[None]
    if segments is not None:
        q_ids_BL1 = segments[0][:, queries, None]
        same = (q_ids_BL1 == segments[1][:, None, keys]) & (q_ids_BL1 != 0)
        apart = jnp.where(same, 0.0, MASKED)[:, None, None]
        bias = apart if bias is None else jnp.minimum(apart, bias)
    return bias


def _rows(x: jax.Array) -> jax.Array:
    """[B, K, G, L, n] as [B, K, G * L, n]: the rows of one product."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _product(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """Contracts an axis of a with one of b for every (B, K), accumulated and returned in float32
    and kept apart from what follows.
    """
    dims = (((a_axis,), (b_axis,)), ((0, 1), (0, 1)))
    return jax.lax.optimization_barrier(
        jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
    )


def _join(blocks: list[jax.Array], axis: int) -> jax.Array:
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=axis)
