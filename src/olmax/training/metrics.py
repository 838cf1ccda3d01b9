"""What objectives return: sums with their weights."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """A weighted sum and its weight, both float32 scalars.

    Micro-batches, hosts and evaluation batches are combined by adding, and divided once at the end,
    so a batch with few targets does not count as much as one with many.
    """

    total: jax.Array
    weight: jax.Array

    @classmethod
    def of(cls, values: jax.Array, weights: jax.Array) -> "Mean":
        """Sum of `values * weights` over all elements, in float32."""
        weights = weights.astype(jnp.float32)
        return cls(jnp.sum(values.astype(jnp.float32) * weights), jnp.sum(weights))

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> jax.Array:
        """total / weight, and 0 where nothing was weighed."""
        some = self.weight > 0
        return jnp.where(some, self.total / jnp.where(some, self.weight, 1), 0)
