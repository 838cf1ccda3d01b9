"""The types that `route` and `dispatch` return. Letters: E experts, k experts of one token."""

from typing import NamedTuple

import jax


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
