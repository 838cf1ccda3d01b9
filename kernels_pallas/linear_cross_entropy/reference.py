"""Definition: the logits are materialised."""

import jax
import jax.numpy as jnp


def linear_cross_entropy(
    x_TD, w_DV, targets_T, vocab_axes=(), soft_cap=None
) -> tuple[jax.Array, jax.Array]:
    """See `kernels_pallas.linear_cross_entropy.linear_cross_entropy`."""
    logits_TV = jnp.matmul(x_TD, w_DV.astype(x_TD.dtype), preferred_element_type=jnp.float32)
    if soft_cap is not None:
        logits_TV = soft_cap * jnp.tanh(logits_TV / soft_cap)
    if not vocab_axes:
        lse_T = jax.nn.logsumexp(logits_TV, axis=-1)
        target_T = jnp.take_along_axis(logits_TV, targets_T[:, None], axis=-1)[:, 0]
        return lse_T - target_T, lse_T
    top_T = jax.lax.pmax(jax.lax.stop_gradient(jnp.max(logits_TV, axis=-1)), vocab_axes)
    total_T = jnp.sum(jnp.exp(logits_TV - top_T[:, None]), axis=-1)
    lse_T = jnp.log(jax.lax.psum(total_T, vocab_axes)) + top_T
    # The target's logit lies on one device; the others add zero.
    columns = logits_TV.shape[1]
    local_T = targets_T - jax.lax.axis_index(vocab_axes) * columns
    found_T = jnp.take_along_axis(logits_TV, jnp.clip(local_T, 0, columns - 1)[:, None], axis=-1)[
        :, 0
    ]
    here_T = (local_T >= 0) & (local_T < columns)
    target_T = jax.lax.psum(jnp.where(here_T, found_T, 0.0), vocab_axes)
    return lse_T - target_T, lse_T
