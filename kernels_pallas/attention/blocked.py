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

from kernels_pallas.attention import masks
from kernels_pallas.xla_cpu import row_major, row_max

BLOCK = 128
MAX_BLOCKS = 16
MASKED = -1e30
"""Added to the scores of masked pairs. Finite, so that no row gives inf - inf."""


def attention(
    q_BLQH, k_BSKH, v_BSKH, *, shape: masks.Shape, ids: masks.Ids, scale: float
) -> tuple[jax.Array, jax.Array]:
    """See `kernels_pallas.attention.attention`; `q_offset` must be a Python int. Returns the output
    and the log-sum-exp [B, Q, L].
    """
    batch, q_len, q_heads, head_dim = q_BLQH.shape
    kv_heads = k_BSKH.shape[2]
    q_BLKGH = q_BLQH.reshape(batch, q_len, kv_heads, q_heads // kv_heads, head_dim)
    out_BKGLH, lse_BKGL = _attention(
        row_major(jnp.transpose(q_BLKGH, (0, 2, 3, 1, 4))),
        row_major(jnp.swapaxes(k_BSKH, 1, 2)),
        row_major(jnp.swapaxes(v_BSKH, 1, 2)),
        ids,
        shape,
        float(scale),
    )
    out_BLQH = jnp.transpose(out_BKGLH, (0, 3, 1, 2, 4)).reshape(q_BLQH.shape)
    return out_BLQH, lse_BKGL.reshape(batch, q_heads, q_len)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q_BKGLH, k_BKSH, v_BKSH, ids, shape, scale):
    return _forward(q_BKGLH, k_BKSH, v_BKSH, ids, shape, scale)[0]


def _forward(q_BKGLH, k_BKSH, v_BKSH, ids, shape, scale):
    q_len = q_BKGLH.shape[3]
    outputs, lses = [], []
    for start, stop in _blocks(q_len):
        queries = slice(start, stop)
        keys = _keys(queries, shape)
        bias = _bias(queries, keys, shape, ids)
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
        lses.append(jnp.where(sees_BKGL, top_BKGL + jnp.log(total_BKGL), -jnp.inf))
    out_BKGLH, lse_BKGL = _join(outputs, axis=3), _join(lses, axis=3)
    return (out_BKGLH, lse_BKGL), (q_BKGLH, k_BKSH, v_BKSH, ids, out_BKGLH, lse_BKGL)


def _backward(shape, scale, residuals, cotangents):
    q_BKGLH, k_BKSH, v_BKSH, ids, out_BKGLH, lse_BKGL = residuals
    d_out_BKGLH, d_lse_BKGL = cotangents
    kv_len, dtype = k_BKSH.shape[2], q_BKGLH.dtype
    lead = q_BKGLH.shape[:2]
    d_out_BKGLH = row_major(d_out_BKGLH)
    delta_BKGL = jnp.sum(d_out_BKGLH.astype(jnp.float32) * out_BKGLH.astype(jnp.float32), axis=-1)
    delta_BKGL = delta_BKGL - d_lse_BKGL
    # Hidden scores are far below any finite value, so their weights are 0.
    lse_BKGL = jnp.where(jnp.isneginf(lse_BKGL), 0.0, lse_BKGL)
    lse_BKGL, delta_BKGL = jax.lax.optimization_barrier((lse_BKGL, delta_BKGL))
    k_BKHS = row_major(jnp.swapaxes(k_BKSH, 2, 3))
    dq_BKHGL = jnp.zeros((*lead, k_BKSH.shape[3], *q_BKGLH.shape[2:4]), jnp.float32)
    dks, dvs = [], []
    for start, stop in _blocks(kv_len):
        keys = slice(start, stop)
        queries = _queries(keys, shape)
        if queries.start >= queries.stop:
            dks.append(jnp.zeros_like(k_BKSH[:, :, keys]))
            dvs.append(dks[-1])
            continue
        shape_BKSGL = (*lead, stop - start, q_BKGLH.shape[2], queries.stop - queries.start)
        q_BKRH, d_out_BKRH = _rows(q_BKGLH[..., queries, :]), _rows(d_out_BKGLH[..., queries, :])
        bias = _bias(queries, keys, shape, ids)
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
    return dq_BKGLH, _join(dks, axis=2), _join(dvs, axis=2), masks.no_gradient(ids)


_attention.defvjp(_forward, _backward)


def _blocks(length: int) -> list[tuple[int, int]]:
    """(start, stop) of every block. Long sequences get longer blocks: each is compiled apart."""
    size = max(BLOCK, math.ceil(length / MAX_BLOCKS / BLOCK) * BLOCK)
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _keys(queries: slice, shape: masks.Shape) -> slice:
    """The range of keys that any of these queries may see by their positions; at least one key."""
    first, last = queries.start + shape.q_offset, queries.stop - 1 + shape.q_offset
    start, stop = 0, shape.kv_len
    if shape.causal:
        stop = min(stop, last + 1)
    if shape.window is not None:
        start = max(start, first - shape.window + 1)
        if not shape.causal:
            stop = min(stop, last + shape.window)
    start = min(start, shape.kv_len - 1)
    return slice(start, max(stop, start + 1))


def _queries(keys: slice, shape: masks.Shape) -> slice:
    """The range of queries that may see any of these keys by their positions; may be empty."""
    first, last = keys.start - shape.q_offset, keys.stop - 1 - shape.q_offset
    start, stop = 0, shape.q_len
    if shape.causal:
        start = max(start, first)
    if shape.window is not None:
        stop = min(stop, last + shape.window)
        if not shape.causal:
            start = max(start, first - shape.window + 1)
    return slice(start, stop)


def _bias(queries: slice, keys: slice, shape: masks.Shape, ids: masks.Ids):
    """float32 [B or 1, 1, 1, L, S], 0 where a query sees a key and MASKED elsewhere. None when it
    sees all.
    """
    seen = masks.dense(shape, ids, queries, keys)
    if seen is None:
        return None
    where = np.where if isinstance(seen, np.ndarray) else jnp.where
    return where(seen, np.float32(0), np.float32(MASKED))[:, None, None]


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
