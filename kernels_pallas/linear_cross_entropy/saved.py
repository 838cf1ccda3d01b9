"""Keeps the exponentials of the logits for the backward pass instead of computing them again.

Three products instead of the four of `chunked`, for T x V values of x's dtype in memory: the
default on CPUs while that is little. Works on chunks of tokens all the same, to keep the float32
logits of one chunk near the caches.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.xla_cpu import row_major, row_max

CHUNK_VALUES = 2**22
"""Logits in one chunk, about."""
MAX_VALUES = 2**27
"""Logits from which on keeping them is too much (256 MiB in bfloat16)."""


def linear_cross_entropy(
    x_TD, w_DV, targets_T, vocab_axes=(), soft_cap=None
) -> tuple[jax.Array, jax.Array]:
    """See `kernels_pallas.linear_cross_entropy.linear_cross_entropy`."""
    if vocab_axes:
        raise ValueError("linear_cross_entropy: implementation 'saved' needs the whole vocabulary")
    if soft_cap is not None:
        # The cap's derivative needs the logit, which the exponential in x's dtype no longer has.
        raise ValueError("linear_cross_entropy: implementation 'saved' takes no soft_cap")
    return _loss(x_TD, w_DV.astype(x_TD.dtype), targets_T)


@jax.custom_vjp
def _loss(x_TD, w_DV, targets_T):
    return _forward(x_TD, w_DV, targets_T)[0]


def _forward(x_TD, w_DV, targets_T):
    losses, lses, saved = [], [], []
    for rows in _chunks(x_TD.shape[0], w_DV.shape[1]):
        logits_CV = jnp.matmul(x_TD[rows], w_DV, preferred_element_type=jnp.float32)
        logits_CV = jax.lax.optimization_barrier(logits_CV)
        top_C = jax.lax.optimization_barrier(row_max(logits_CV))
        weights_CV = jnp.exp(logits_CV - top_C[:, None])
        total_C = jnp.sum(weights_CV, axis=-1)
        target_C = jnp.take_along_axis(logits_CV, targets_T[rows, None], axis=-1)[:, 0]
        lse_C = jnp.log(total_C) + top_C
        losses.append(lse_C - target_C)
        lses.append(lse_C)
        saved.append((weights_CV.astype(x_TD.dtype), total_C))
    loss_T, lse_T = jnp.concatenate(losses), jnp.concatenate(lses)
    return (loss_T, lse_T), (x_TD, w_DV, targets_T, loss_T, saved)


def _backward(residuals, cotangents):
    x_TD, w_DV, targets_T, loss_T, saved = residuals
    d_loss_T, d_lse_T = cotangents
    d_each_T = d_loss_T + d_lse_T
    # From the loss, not from the rounded exponential: where p is near 1, p - 1 would be all error.
    d_target_T = jnp.exp(-loss_T) * d_each_T - d_loss_T
    columns_V = np.arange(w_DV.shape[1], dtype=np.int32)
    dx, dw_DV = [], jnp.zeros(w_DV.shape, jnp.float32)
    chunks = _chunks(x_TD.shape[0], w_DV.shape[1])
    for rows, (weights_CV, total_C) in zip(chunks, saved, strict=True):
        d_logits_CV = weights_CV.astype(jnp.float32) * (d_each_T[rows] / total_C)[:, None]
        is_target_CV = columns_V[None, :] == targets_T[rows, None]
        d_logits_CV = jnp.where(is_target_CV, d_target_T[rows, None], d_logits_CV)
        d_logits_CV = jax.lax.optimization_barrier(d_logits_CV.astype(x_TD.dtype))
        dx.append(jax.lax.dot_general(d_logits_CV, w_DV, (((1,), (1,)), ((), ()))))
        dw_DV += jnp.matmul(
            row_major(x_TD[rows].T), d_logits_CV, preferred_element_type=jnp.float32
        )
    d_targets_T = np.zeros(targets_T.shape, jax.dtypes.float0)
    return jnp.concatenate(dx), dw_DV.astype(w_DV.dtype), d_targets_T


_loss.defvjp(_forward, _backward)


def _chunks(tokens: int, vocab: int) -> list[slice]:
    size = max(128, CHUNK_VALUES // vocab // 128 * 128)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
