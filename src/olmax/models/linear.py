"""The one place where activations meet weight matrices."""

import functools
import math

import jax
import jax.numpy as jnp

from kernels_pallas.xla_cpu import apart, on_cpu, row_major
from kernels_pallas.xla_tpu import on_tpu


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(x: jax.Array, kernel: jax.Array, contract: int = 1) -> jax.Array:
    """Contracts the last `contract` dimensions of x with the first `contract` of the kernel, in x's
    dtype.

    The kernel (the float32 master during training) is cast to x's dtype; its gradient is
    accumulated in float32 and never rounded to x's dtype.
    """
    return _product(x, kernel.astype(x.dtype), contract)


def _forward(x, kernel, contract):
    return project(x, kernel, contract), (x, kernel)


def _backward(contract, residuals, dy):
    x, kernel = residuals
    # What leads to dy would otherwise be computed again, slowly, while it is transposed.
    dy = apart(dy)
    return (
        input_gradient(dy, kernel, contract),
        kernel_gradient(x, dy, kernel.dtype, contract),
    )


project.defvjp(_forward, _backward)


def input_gradient(dy: jax.Array, kernel: jax.Array, contract: int = 1) -> jax.Array:
    """Gradient of x in `project`, in dy's dtype."""
    # The kernel with its sides exchanged.
    swapped = jnp.moveaxis(kernel, range(contract), range(-contract, 0))
    return _product(dy, swapped.astype(dy.dtype), kernel.ndim - contract)


def kernel_gradient(x: jax.Array, dy: jax.Array, dtype, contract: int = 1) -> jax.Array:
    """Gradient of the kernel in `project`, accumulated in float32."""
    lead = x.ndim - contract

    def flat(x, dy):
        d_kernel_IO = on_cpu(
            _kernel_gradient_on_cpu, _kernel_gradient, _flat(x, lead), _flat(dy, lead)
        )
        return d_kernel_IO.reshape(*x.shape[lead:], *dy.shape[lead:])

    whole = functools.partial(_kernel_gradient, lead=lead)
    return on_tpu(whole, flat, x, dy).astype(dtype)


def _product(x: jax.Array, kernel: jax.Array, contract: int) -> jax.Array:
    """x [..., *inner] and kernel [*inner, ...] of one dtype.

    In programs for TPUs every dimension stays apart: heads that lie outside of the tokens in
    memory, as attention wants them, cannot be joined with their width without a copy.
    """

    def whole(x, kernel):
        inner = tuple(range(x.ndim - contract, x.ndim)), tuple(range(contract))
        return jax.lax.dot_general(x, kernel, (inner, ((), ())))

    def flat(x, kernel):
        lead, tail = x.shape[: x.ndim - contract], kernel.shape[contract:]
        kernel_IO = kernel.reshape(math.prod(kernel.shape[:contract]), math.prod(tail))
        return jnp.matmul(_flat(x, len(lead)), kernel_IO).reshape(*lead, *tail)

    return on_tpu(whole, flat, x, kernel)


def _flat(x: jax.Array, lead: int) -> jax.Array:
    """All dimensions behind the first `lead` as one."""
    return x.reshape(*x.shape[:lead], math.prod(x.shape[lead:]))


def _kernel_gradient(x: jax.Array, dy: jax.Array, lead: int | None = None) -> jax.Array:
    """float32 sum of x and dy over their `lead` leading dimensions, all but one when None.

    The leading dimensions stay apart, so that each may be cut over a mesh axis of its own.
    """
    summed = tuple(range(x.ndim - 1 if lead is None else lead))
    dims = ((summed, summed), ((), ()))
    return jax.lax.dot_general(x, dy, dims, preferred_element_type=jnp.float32)


def _kernel_gradient_on_cpu(x: jax.Array, dy: jax.Array) -> jax.Array:
    """x [..., I] and dy [..., O] -> [I, O], transposing one operand in memory, the narrower one."""

    def product(a, b):
        lead = tuple(range(a.ndim - 1))
        dims = ((tuple(axis + 1 for axis in lead), lead), ((), ()))
        a_first = row_major(jnp.moveaxis(a, -1, 0))
        return jax.lax.dot_general(a_first, b, dims, preferred_element_type=jnp.float32)

    return product(x, dy) if x.shape[-1] <= dy.shape[-1] else row_major(product(dy, x)).T
