"""What implementations share that compute log-sum-exp and target's logit of a part of the
vocabulary.
"""

import jax
import jax.numpy as jnp


def columns_here(targets_T: jax.Array, vocab: int, vocab_axes: tuple[str, ...]) -> jax.Array:
    """Targets counted from this device's first column; outside 0 .. vocab - 1 for a target that is
    on another device.
    """
    columns_T = targets_T.astype(jnp.int32)
    if vocab_axes:
        columns_T = columns_T - jax.lax.axis_index(vocab_axes) * vocab
    return columns_T


def joined(
    lse_T: jax.Array, target_T: jax.Array, vocab_axes: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    """(loss, lse) of the whole vocabulary. A part without the target has 0 for its logit."""
    if vocab_axes:
        top_T = jax.lax.pmax(jax.lax.stop_gradient(lse_T), vocab_axes)
        lse_T = jnp.log(jax.lax.psum(jnp.exp(lse_T - top_T), vocab_axes)) + top_T
        target_T = jax.lax.psum(target_T, vocab_axes)
    return lse_T - target_T, lse_T


def capped(logits: jax.Array, soft_cap: float | None) -> jax.Array:
    """The logits under the soft cap."""
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
