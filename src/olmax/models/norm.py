"""RMSNorm."""

import jax
import jax.numpy as jnp
from flax import nnx

from olmax.models import parameters


def rms_norm(
    x: jax.Array, scale: jax.Array, eps: float, axes: tuple[int, ...] = (-1,)
) -> jax.Array:
    """`scale * x / sqrt(mean(x^2) + eps)` over `axes`, statistics and product in float32, result in
    x's dtype.

    OLMo-core and current Hugging Face round once at the end, as here (specs/olmo2.md section 1).
    """
    x32 = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(x32), axis=axes, keepdims=True)
    return (scale.astype(jnp.float32) * (x32 * jax.lax.rsqrt(variance + eps))).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMSNorm with a learned scale over the trailing dimensions given by `dims`.

    `stack` are leading (size, axis) pairs of stacked layers; they are gone when the layer scan
    calls the module.
    """

    def __init__(self, dims, *, eps: float, stack=(), param_dtype="float32", rngs: nnx.Rngs):
        self.eps = eps
        self.axes = tuple(range(-len(dims), 0))
        self.scale = parameters.param(rngs, parameters.ones, [*stack, *dims], param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.eps, self.axes)
