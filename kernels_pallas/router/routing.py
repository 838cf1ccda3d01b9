"""The types that `route` and `dispatch` return. Letters: E experts, k experts of one token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Routing(NamedTuple):
    """Padding tokens (`valid_T` false) have weights 0, and their slots go to expert E, which does
    not exist: behind all others.
    """

    weights_Tk: jax.Array
    """float32 [T, k]: the k largest of the softmax over all experts, largest first, as they are."""
    experts_Tk: jax.Array
    """int32 [T, k]: whose weights they are; of equal ones the lower index is first."""
    positions_Tk: jax.Array
    """int32 [T, k]: how many slots before this one, in order of tokens, have the same expert."""
    counts_E: jax.Array
    """int32 [E]: slots of each expert."""
    probability_sum_E: jax.Array
    """float32 [E]: the sum of the softmax over valid tokens."""
    squared_logsumexp_sum: jax.Array
    """float32 []: the sum over valid tokens of logsumexp(logits)^2."""


class Dispatch(NamedTuple):
    """Rows sorted by expert, M = T k of them. The rows of padding tokens come last."""

    destinations_Tk: jax.Array
    """int32 [T, k]: the row of each (token, slot)."""
    rows_M: jax.Array
    """int32 [M]: the token of each row."""


def place_padding(
    weights_Tk: jax.Array,
    experts_Tk: jax.Array,
    positions_Tk: jax.Array,
    valid_T: jax.Array | None,
    experts: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The three with padding tokens behind all experts, one after the other."""
    if valid_T is None:
        return weights_Tk, experts_Tk, positions_Tk
    valid_T1, slots = valid_T[:, None], jnp.arange(experts_Tk.shape[1], dtype=jnp.int32)
    padding_T = jnp.logical_not(valid_T).astype(jnp.int32)
    behind_T1 = ((jnp.cumsum(padding_T) - padding_T) * len(slots))[:, None]
    return (
        jnp.where(valid_T1, weights_Tk, 0),
        jnp.where(valid_T1, experts_Tk, experts),
        jnp.where(valid_T1, positions_Tk, behind_T1 + slots),
    )


def in_order(logits_TE: jax.Array) -> jax.Array:
    """The logits as `jax.lax.top_k` must get them: it puts 0 before -0, which are equal."""
    return jnp.where(logits_TE == 0, jnp.zeros_like(logits_TE), logits_TE)
