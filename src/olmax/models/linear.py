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
    lead = dy.ndim - (kernel.ndim - contract)

    def whole(dy, kernel):
        outer = tuple(range(lead, dy.ndim)), tuple(range(contract, kernel.ndim))
        return jax.lax.dot_general(dy, kernel, (outer, ((), ())))

    def flat(dy, kernel):
        sides = ((lead,), (1,)), ((), ())
        dx = jax.lax.dot_general(_flat(dy, lead), _matrix(kernel, contract), sides)
        return dx.reshape(*dy.shape[:lead], *kernel.shape[:contract])

    return on_tpu(whole, flat, dy, kernel.astype(dy.dtype))


def kernel_gradient(x: jax.Array, dy: jax.Array, dtype, contract: int = 1) -> jax.Array:
    """Gradient of the kernel in `project`, accumulated in float32."""
    lead = x.ndim - contract
    whole = functools.partial(_kernel_gradient, lead=lead)

    def flat(x, dy):
        d_kernel_IO = on_cpu(_kernel_gradient_on_cpu, whole, _flat(x, lead), _flat(dy, lead))
        return d_kernel_IO.reshape(*x.shape[lead:], *dy.shape[lead:])

    return on_tpu(whole, flat, x, dy).astype(dtype)


def _product(x: jax.Array, kernel: jax.Array, contract: int) -> jax.Array:
    """x [..., *inner] and kernel [*inner, ...] of one dtype.

    In programs for TPUs every dimension stays apart: heads that lie outside of the tokens in
    memory, as attention wants them, cannot be joined with their width without a copy.
    """
    lead = x.ndim - contract

    def whole(x, kernel):
        inner = tuple(range(lead, x.ndim)), tuple(range(contract))
        return jax.lax.dot_general(x, kernel, (inner, ((), ())))

    def flat(x, kernel):
        y = jnp.matmul(_flat(x, lead), _matrix(kernel, contract))
        return y.reshape(*x.shape[:lead], *kernel.shape[contract:])

    return on_tpu(whole, flat, x, kernel)


def _matrix(kernel: jax.Array, contract: int) -> jax.Array:
    """[I, O] of a kernel [*inner, *outer] with `contract` inner dimensions."""
    return kernel.reshape(math.prod(kernel.shape[:contract]), math.prod(kernel.shape[contract:]))


def _flat(x: jax.Array, lead: int) -> jax.Array:
    """All dimensions behind the first `lead` as one."""
    return x.reshape(*x.shape[:lead], math.prod(x.shape[lead:]))


def _kernel_gradient(x: jax.Array, dy: jax.Array, lead: int) -> jax.Array:
    """float32 sum of x and dy over their `lead` leading dimensions.

    The leading dimensions stay apart, so that each may be cut over a mesh axis of its own.
    """
    summed = tuple(range(lead))
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
