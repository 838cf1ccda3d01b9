"""RMSNorm."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas.xla_cpu import apart, sum_columns, sum_rows
from olmax.models import parameters


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """`scale * x / sqrt(mean(x^2) + eps)` over the dimensions of `scale`, the last ones of x.

    Statistics and product in float32, result in x's dtype. OLMo-core and current Hugging Face round
    once at the end, as here (specs/olmo2.md section 1).
    """
    return _forward(x, scale, eps)[0]


def _forward(x, scale, eps):
    x32 = x.astype(jnp.float32)
    variance = sum_rows(jnp.square(x32), scale.ndim) / scale.size
    inverse_rms = apart(jax.lax.rsqrt(variance + eps))
    normed = x32 * _columns(inverse_rms, scale)
    return (scale.astype(jnp.float32) * normed).astype(x.dtype), (x, scale, inverse_rms)


def _backward(eps, residuals, dy):
    del eps
    x, scale, inverse_rms = residuals
    dy32 = dy.astype(jnp.float32)
    normed = x.astype(jnp.float32) * _columns(inverse_rms, scale)
    d_normed = dy32 * scale.astype(jnp.float32)
    along = apart(sum_rows(d_normed * normed, scale.ndim) / scale.size)
    dx = _columns(inverse_rms, scale) * (d_normed - normed * _columns(along, scale))
    d_scale = sum_columns(dy32 * normed, scale.ndim)
    return dx.astype(x.dtype), d_scale.astype(scale.dtype)


rms_norm.defvjp(_forward, _backward)


def _columns(rows: jax.Array, scale: jax.Array) -> jax.Array:
    """One value a row, with the dimensions of `scale` behind as ones."""
    return jnp.expand_dims(rows, tuple(range(-scale.ndim, 0)))


class RMSNorm(nnx.Module):
    """RMSNorm with a learned scale over the trailing dimensions given by `dims`.

    `stack` are leading (size, axis) pairs of stacked layers; they are gone when the layer scan
    calls the module.
    """

    def __init__(self, dims, *, eps: float, stack=(), param_dtype="float32", rngs: nnx.Rngs):
        self.eps = eps
        self.scale = parameters.param(rngs, parameters.ones, [*stack, *dims], param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.eps)
