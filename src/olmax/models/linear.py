"""The one place where activations meet weight matrices."""

import math

import jax
import jax.numpy as jnp

from kernels_pallas.xla_cpu import apart, on_cpu, row_major
from kernels_pallas.xla_tpu import in_memory


def project(x: jax.Array, kernel: jax.Array, contract: int = 1) -> jax.Array:
    """Contracts the last `contract` dimensions of x with the first `contract` of the kernel, in x's
    dtype.

    The kernel (the float32 master during training) is cast to x's dtype; its gradient is
    accumulated in float32 and never rounded to x's dtype.
    """
    lead, tail = x.shape[: x.ndim - contract], kernel.shape[contract:]
    inner = math.prod(kernel.shape[:contract])
    y = _matmul(x.reshape(*lead, inner), kernel.reshape(inner, math.prod(tail)))
    return y.reshape(*lead, *tail)


@jax.custom_vjp
def _matmul(x: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    return jnp.matmul(in_memory(x), kernel_IO.astype(x.dtype))


def _forward(x, kernel_IO):
    return _matmul(x, kernel_IO), (x, kernel_IO)


def _backward(residuals, dy):
    x, kernel_IO = residuals
    # What leads to dy would otherwise be computed again, slowly, while it is transposed.
    dy = in_memory(apart(dy))
    return input_gradient(dy, kernel_IO), kernel_gradient(x, dy, kernel_IO.dtype)


_matmul.defvjp(_forward, _backward)


def input_gradient(dy: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    """dy [..., O] -> [..., I], in dy's dtype."""
    return jax.lax.dot_general(dy, kernel_IO.astype(dy.dtype), (((dy.ndim - 1,), (1,)), ((), ())))


def kernel_gradient(x: jax.Array, dy: jax.Array, dtype) -> jax.Array:
    """x [..., I] and dy [..., O] -> [I, O], accumulated in float32."""
    d_kernel_IO = on_cpu(_kernel_gradient_on_cpu, _kernel_gradient, in_memory(x), dy)
    return d_kernel_IO.astype(dtype)


def _kernel_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """x [..., I] and dy [..., O] -> float32 [I, O], summed over all leading dimensions.

    The leading dimensions stay apart, so that each may be cut over a mesh axis of its own.
    """
    lead = tuple(range(x.ndim - 1))
    dims = ((lead, lead), ((), ()))
    return jax.lax.dot_general(x, dy, dims, preferred_element_type=jnp.float32)


def _kernel_gradient_on_cpu(x: jax.Array, dy: jax.Array) -> jax.Array:
    """The same, transposing one operand in memory, the narrower one."""

    def product(a, b):
        lead = tuple(range(a.ndim - 1))
        dims = ((tuple(axis + 1 for axis in lead), lead), ((), ()))
        a_first = row_major(jnp.moveaxis(a, -1, 0))
        return jax.lax.dot_general(a_first, b, dims, preferred_element_type=jnp.float32)

    return product(x, dy) if x.shape[-1] <= dy.shape[-1] else row_major(product(dy, x)).T
