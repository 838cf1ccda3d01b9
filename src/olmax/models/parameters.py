"""Creating parameters: shape, logical axes and initialiser in one place."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


def truncated_normal(std: float | jax.Array) -> Initializer:
    """Normal(0, std) cut at +-3 std, not rescaled: the realised standard deviation is 0.9866 std,
    as in OLMo 2.

    `std` may be an array that broadcasts against the parameter (one value a layer).
    """

    def init(key, shape, dtype):
        return (jax.random.truncated_normal(key, -3.0, 3.0, shape, jnp.float32) * std).astype(dtype)

    return init


def ones(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """All ones (norm scales)."""
    del key
    return jnp.ones(shape, dtype)


def param(
    rngs: nnx.Rngs,
    init: Initializer,
    dims: Sequence[tuple[int, str | None]],
    dtype: str | jnp.dtype,
) -> nnx.Param:
    """A parameter with one (size, logical axis name) pair a dimension. The names stay in its
    metadata.
    """
    shape = tuple(size for size, _ in dims)
    axes = tuple(axis for _, axis in dims)
    return nnx.Param(init(rngs.params(), shape, jnp.dtype(dtype)), logical_axes=axes)


def depth_scaled_std(fan_in: int, n_layers: int, ndim: int) -> jax.Array:
    """OLMo-0424's output-projection std, 1/sqrt(2 * fan_in * layer) with layers counted from 1,
    shaped [N, 1, ...].
    """
    layer = jnp.arange(1, n_layers + 1, dtype=jnp.float32)
    return (1 / jnp.sqrt(2 * fan_in * layer)).reshape((n_layers,) + (1,) * (ndim - 1))


def fan_in_std(fan_in: int) -> float:
    """OLMo-0424's input-projection std, 1/sqrt(fan_in)."""
    return 1 / math.sqrt(fan_in)
