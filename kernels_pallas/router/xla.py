"""Routing and the way back in plain XLA without a sort; the default where no kernel of ours runs.

A token chooses an expert at most once, so a slot's position is the number of earlier tokens that
chose its expert: a prefix count over tokens, by products with a triangular matrix in blocks.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.router import gradients
from kernels_pallas.router.routing import Routing, in_order, place_padding

BLOCK = 128


def route(logits_TE: jax.Array, k: int, valid_T: jax.Array | None) -> Routing:
    """See `kernels_pallas.router.route`."""
    return gradients.route(_route, logits_TE, k, valid_T)


def combine(y_MD: jax.Array, destinations_Tk: jax.Array, weights_Tk: jax.Array) -> jax.Array:
    """See `kernels_pallas.router.combine`."""
    return gradients.combine(_combine, y_MD, destinations_Tk, weights_Tk)


def _route(logits_TE, k, valid_T) -> Routing:
    experts = logits_TE.shape[1]
    logits_TE = logits_TE.astype(jnp.float32)
    lse_T = jax.nn.logsumexp(logits_TE, axis=-1)
    probabilities_TE = jnp.exp(logits_TE - lse_T[:, None])
    top_Tk, experts_Tk = jax.lax.top_k(in_order(logits_TE), k)
    weights_Tk = jnp.exp(top_Tk - lse_T[:, None])
    if valid_T is not None:
        experts_Tk = jnp.where(valid_T[:, None], experts_Tk, experts)
        probabilities_TE = jnp.where(valid_T[:, None], probabilities_TE, 0)
        lse_T = jnp.where(valid_T, lse_T, 0)
    # Expert E is not among these: padding tokens choose none.
    chosen_kTE = [experts_Tk[:, slot, None] == jnp.arange(experts) for slot in range(k)]
    chosen_TE = functools.reduce(jnp.logical_or, chosen_kTE).astype(jnp.float32)
    before_TE, counts_E = _prefix_counts(chosen_TE)
    positions_kT = [jnp.sum(jnp.where(chosen_TE, before_TE, 0), axis=1) for chosen_TE in chosen_kTE]
    positions_Tk = jnp.stack(positions_kT, axis=1).astype(jnp.int32)
    weights_Tk, experts_Tk, positions_Tk = place_padding(
        weights_Tk, experts_Tk, positions_Tk, valid_T, experts
    )
    return Routing(
        weights_Tk=weights_Tk,
        experts_Tk=experts_Tk,
        positions_Tk=positions_Tk,
        counts_E=counts_E.astype(jnp.int32),
        probability_sum_E=jnp.sum(probabilities_TE, axis=0),
        squared_logsumexp_sum=jnp.sum(lse_T**2),
    )


def _prefix_counts(chosen_TE: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Earlier tokens of each expert [T, E] and all [E], whole numbers in float32: exact to 2^24."""
    tokens, experts = chosen_TE.shape
    blocks = -(-tokens // BLOCK)
    padded_TE = jnp.pad(chosen_TE, ((0, blocks * BLOCK - tokens), (0, 0)))
    chosen_nBE = padded_TE.reshape(blocks, BLOCK, experts)
    earlier_BB = jnp.tril(jnp.ones((BLOCK, BLOCK), jnp.float32), -1)
    within_nBE = jnp.einsum("bc,nce->nbe", earlier_BB, chosen_nBE, precision="highest")
    count_nE = jnp.sum(chosen_nBE, axis=1)
    upto_nE = jnp.cumsum(count_nE, axis=0)
    before_TE = (within_nBE + (upto_nE - count_nE)[:, None]).reshape(-1, experts)[:tokens]
    return before_TE, upto_nE[-1] if blocks else jnp.zeros(experts, jnp.float32)


def _combine(y_MD, destinations_Tk, weights_Tk) -> jax.Array:
    out_TD = jnp.zeros((destinations_Tk.shape[0], y_MD.shape[1]), jnp.float32)
    for slot in range(destinations_Tk.shape[1]):
        y_TD = y_MD.at[destinations_Tk[:, slot]].get(mode="fill", fill_value=0)
        out_TD += weights_Tk[:, slot, None].astype(jnp.float32) * y_TD.astype(jnp.float32)
    return out_TD.astype(y_MD.dtype)
