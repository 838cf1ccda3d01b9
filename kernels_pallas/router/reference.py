"""Definition of routing and of the way back."""

import jax
import jax.numpy as jnp

from kernels_pallas.router.routing import Routing, in_order


def route(logits_TE: jax.Array, k: int, valid_T: jax.Array | None) -> Routing:
    """See `kernels_pallas.router.route`."""
    tokens, experts = logits_TE.shape
    logits_TE = logits_TE.astype(jnp.float32)
    probabilities_TE = jax.nn.softmax(logits_TE, axis=-1)
    # By logits: probabilities of unlike experts can round to the same number.
    _, experts_Tk = jax.lax.top_k(in_order(jax.lax.stop_gradient(logits_TE)), k)
    weights_Tk = jnp.take_along_axis(probabilities_TE, experts_Tk, axis=1)
    lse_T = jax.nn.logsumexp(logits_TE, axis=-1)
    if valid_T is not None:
        weights_Tk = jnp.where(valid_T[:, None], weights_Tk, 0)
        experts_Tk = jnp.where(valid_T[:, None], experts_Tk, experts)
        probabilities_TE = jnp.where(valid_T[:, None], probabilities_TE, 0)
        lse_T = jnp.where(valid_T, lse_T, 0)
    chosen_SE = jax.nn.one_hot(experts_Tk.reshape(-1), experts + 1, dtype=jnp.int32)
    before_SE = jnp.cumsum(chosen_SE, axis=0) - chosen_SE
    return Routing(
        weights_Tk=weights_Tk,
        experts_Tk=experts_Tk,
        positions_Tk=jnp.sum(before_SE * chosen_SE, axis=1).reshape(tokens, k),
        counts_E=jnp.sum(chosen_SE, axis=0)[:experts],
        probability_sum_E=jnp.sum(probabilities_TE, axis=0),
        squared_logsumexp_sum=jnp.sum(lse_T**2),
    )


def combine(y_MD: jax.Array, destinations_Tk: jax.Array, weights_Tk: jax.Array) -> jax.Array:
    """See `kernels_pallas.router.combine`."""
    y_TkD = y_MD.at[destinations_Tk].get(mode="fill", fill_value=0).astype(jnp.float32)
    out_TD = jnp.sum(weights_Tk.astype(jnp.float32)[:, :, None] * y_TkD, axis=1)
    return out_TD.astype(y_MD.dtype)
