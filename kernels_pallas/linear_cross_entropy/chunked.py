"""Logits of one chunk of tokens at a time; the backward pass recomputes them. Peak memory is chunk
x V, not T x V.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.linear_cross_entropy import reference

CHUNK = 1024


def linear_cross_entropy(x_TD, w_DV, targets_T, vocab_axes=()) -> tuple[jax.Array, jax.Array]:
    """See `kernels_pallas.linear_cross_entropy.linear_cross_entropy`."""
    tokens = x_TD.shape[0]
    if tokens <= CHUNK:
        return reference.linear_cross_entropy(x_TD, w_DV, targets_T, vocab_axes)
    padding = -tokens % CHUNK
    x = jnp.pad(x_TD, ((0, padding), (0, 0))).reshape(-1, CHUNK, x_TD.shape[1])
    targets = jnp.pad(targets_T, (0, padding)).reshape(-1, CHUNK)
    one = jax.checkpoint(functools.partial(_chunk, w_DV, vocab_axes), prevent_cse=False)
    loss, lse = jax.lax.map(one, (x, targets))
    return loss.reshape(-1)[:tokens], lse.reshape(-1)[:tokens]


def _chunk(w_DV, vocab_axes, x_and_targets):
    x_CD, targets_C = x_and_targets
    return reference.linear_cross_entropy(x_CD, w_DV, targets_C, vocab_axes)
