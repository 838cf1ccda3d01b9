"""Logits of one chunk of tokens at a time; the backward pass recomputes them. Peak memory is chunk
x V, not T x V. The default on GPUs, and on CPUs for what is too large for `saved`.

The gradient of w is summed over the chunks in float32, whatever w's dtype.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.linear_cross_entropy.parts import capped, columns_here, joined
from kernels_pallas.xla_cpu import row_major

CHUNK = 1024


def linear_cross_entropy(
    x_TD, w_DV, targets_T, vocab_axes=(), soft_cap=None
) -> tuple[jax.Array, jax.Array]:
    """See `kernels_pallas.linear_cross_entropy.linear_cross_entropy`."""
    columns_T = columns_here(targets_T, w_DV.shape[1], vocab_axes)
    lse_T, target_T = _part(soft_cap, x_TD, w_DV, columns_T)
    return joined(lse_T, target_T, vocab_axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _part(soft_cap, x_TD, w_DV, columns_T):
    """(lse, target's logit), float32 [T], over these columns."""
    return _forward(soft_cap, x_TD, w_DV, columns_T)[0]


def _chunks(x: jax.Array) -> jax.Array:
    """[T, ...] as [chunks, CHUNK, ...], zeros at the end."""
    ends = [(0, -x.shape[0] % CHUNK)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, ends).reshape(-1, CHUNK, *x.shape[1:])


def _rows(chunks: jax.Array, tokens: int) -> jax.Array:
    return chunks.reshape(-1, *chunks.shape[2:])[:tokens]


def _logits(x_CD, w_DV, soft_cap):
    return capped(jnp.matmul(x_CD, w_DV, preferred_element_type=jnp.float32), soft_cap)


def _forward(soft_cap, x_TD, w_DV, columns_T):
    w = w_DV.astype(x_TD.dtype)

    def one(chunk):
        x_CD, columns_C = chunk
        logits_CV = _logits(x_CD, w, soft_cap)
        here_C = (columns_C >= 0) & (columns_C < w.shape[1])
        at_C1 = jnp.clip(columns_C, 0, w.shape[1] - 1)[:, None]
        target_C = jnp.take_along_axis(logits_CV, at_C1, axis=-1)[:, 0]
        return jax.nn.logsumexp(logits_CV, axis=-1), jnp.where(here_C, target_C, 0.0)

    tokens = x_TD.shape[0]
    if tokens <= CHUNK:
        lse_T, target_T = one((x_TD, columns_T))
    else:
        results = jax.lax.map(one, (_chunks(x_TD), _chunks(columns_T)))
        lse_T, target_T = (_rows(result, tokens) for result in results)
    return (lse_T, target_T), (x_TD, w_DV, columns_T, lse_T)


def _backward(soft_cap, residuals, cotangents):
    x_TD, w_DV, columns_T, lse_T = residuals
    w = w_DV.astype(x_TD.dtype)
    column_V = np.arange(w.shape[1], dtype=np.int32)

    def one(dw_DV, chunk):
        x_CD, columns_C, lse_C, d_lse_C, d_target_C = chunk
        logits_CV = _logits(x_CD, w, soft_cap)
        d_CV = jnp.exp(logits_CV - lse_C[:, None]) * d_lse_C[:, None]
        d_CV += jnp.where(column_V == columns_C[:, None], d_target_C[:, None], 0.0)
        if soft_cap is not None:
            d_CV *= 1.0 - jnp.square(logits_CV / soft_cap)
        d_CV = d_CV.astype(x_CD.dtype)
        dx_CD = jax.lax.dot_general(d_CV, w, (((1,), (1,)), ((), ())))
        part_DV = jnp.matmul(row_major(x_CD.T), d_CV, preferred_element_type=jnp.float32)
        return part_DV if dw_DV is None else dw_DV + part_DV, dx_CD

    tokens = x_TD.shape[0]
    arrays = (x_TD, columns_T, lse_T, *cotangents)
    if tokens <= CHUNK:
        dw_DV, dx_TD = one(None, arrays)
    else:
        zeros = jnp.zeros(w.shape, jnp.float32)
        dw_DV, dx = jax.lax.scan(one, zeros, jax.tree.map(_chunks, arrays))
        dx_TD = _rows(dx, tokens)
    return dx_TD, dw_DV.astype(w_DV.dtype), np.zeros(columns_T.shape, jax.dtypes.float0)


_part.defvjp(_forward, _backward)
