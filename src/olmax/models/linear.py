"""The one place where activations meet weight matrices."""

import math

import jax
import jax.numpy as jnp


def project(x: jax.Array, kernel: jax.Array, contract: int = 1) -> jax.Array:
    """Contracts the last `contract` dimensions of x with the first `contract` of the kernel, in x's
    dtype.

    The kernel (the float32 master during training) is cast to x's dtype. Both are flattened to
    matrices first: XLA's CPU backend has a fast path for plain matrix products only.
    """
    lead, tail = x.shape[: x.ndim - contract], kernel.shape[contract:]
    inner = math.prod(kernel.shape[:contract])
    y = jnp.matmul(x.reshape(*lead, inner), kernel.astype(x.dtype).reshape(inner, math.prod(tail)))
    return y.reshape(*lead, *tail)
