"""Derivatives of `route` and `combine`, which every fast implementation shares: elementwise over
[T, E], and gathers of rows, which XLA does well.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.router.routing import Routing

RouteFunction = Callable[[jax.Array, int, jax.Array | None], Routing]
CombineFunction = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2))
def route(forward: RouteFunction, logits_TE, k: int, valid_T) -> Routing:
    """`forward(logits, k, valid)` with a gradient for the logits."""
    return forward(logits_TE, k, valid_T)


def _route_forward(forward, logits_TE, k, valid_T):
    routing = forward(logits_TE, k, valid_T)
    return routing, (logits_TE, valid_T, routing.experts_Tk)


def _route_backward(forward, k, residuals, cotangent: Routing):
    logits_TE, valid_T, experts_Tk = residuals
    logits32_TE = logits_TE.astype(jnp.float32)
    probabilities_TE = jax.nn.softmax(logits32_TE, axis=-1)
    d_probabilities_TE = jnp.broadcast_to(cotangent.probability_sum_E, logits_TE.shape)
    for slot in range(k):
        is_chosen_TE = experts_Tk[:, slot, None] == jnp.arange(logits_TE.shape[1])
        d_slot_T1 = cotangent.weights_Tk[:, slot, None]
        d_probabilities_TE = d_probabilities_TE + jnp.where(is_chosen_TE, d_slot_T1, 0)
    mean_T1 = jnp.sum(probabilities_TE * d_probabilities_TE, axis=1, keepdims=True)
    lse_T1 = jax.nn.logsumexp(logits32_TE, axis=-1, keepdims=True)
    d_lse_T1 = 2 * lse_T1 * cotangent.squared_logsumexp_sum
    d_logits_TE = probabilities_TE * (d_probabilities_TE - mean_T1 + d_lse_T1)
    if valid_T is not None:
        d_logits_TE = jnp.where(valid_T[:, None], d_logits_TE, 0)
    return d_logits_TE.astype(logits_TE.dtype), _no_gradient(valid_T)


route.defvjp(_route_forward, _route_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def combine(forward: CombineFunction, y_MD, destinations_Tk, weights_Tk) -> jax.Array:
    """`forward(y, destinations, weights)` with gradients for y and the weights."""
    return forward(y_MD, destinations_Tk, weights_Tk)


def _combine_forward(forward, y_MD, destinations_Tk, weights_Tk):
    return forward(y_MD, destinations_Tk, weights_Tk), (y_MD, destinations_Tk, weights_Tk)


def _combine_backward(forward, residuals, d_out_TD):
    y_MD, destinations_Tk, weights_Tk = residuals
    rows, (tokens, k) = y_MD.shape[0], destinations_Tk.shape
    slots = tokens * k
    # The slot of each row; a row that no slot reads gets the one behind all, of weight 0.
    slot_M = jnp.full(rows, slots, jnp.int32)
    slot_M = slot_M.at[destinations_Tk.reshape(-1)].set(
        jnp.arange(slots, dtype=jnp.int32), mode="drop", unique_indices=True
    )
    weight_M = weights_Tk.astype(jnp.float32).reshape(-1).at[slot_M].get(mode="fill", fill_value=0)
    d_out_MD = d_out_TD.at[slot_M // k].get(mode="clip").astype(jnp.float32)
    d_y_MD = (weight_M[:, None] * d_out_MD).astype(y_MD.dtype)
    d_weights = []
    for slot in range(k):
        y_TD = y_MD.at[destinations_Tk[:, slot]].get(mode="fill", fill_value=0)
        d_weights.append(jnp.sum(y_TD.astype(jnp.float32) * d_out_TD.astype(jnp.float32), axis=1))
    d_weights_Tk = jnp.stack(d_weights, axis=1).astype(weights_Tk.dtype)
    return d_y_MD, _no_gradient(destinations_Tk), d_weights_Tk


combine.defvjp(_combine_forward, _combine_backward)


def _no_gradient(integers):
    return None if integers is None else np.zeros(integers.shape, jax.dtypes.float0)
