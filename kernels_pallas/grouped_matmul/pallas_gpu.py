"""Grouped products on GPUs (Hopper) by our own kernels: rows times matrices, and both gradients.

Interpreted and compiled for an H100, never run on one; not the default.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import hopper
from kernels_pallas.grouped_matmul import ragged
from kernels_pallas.grouped_matmul.pallas_gpu_outer import outer
from kernels_pallas.grouped_matmul.pallas_gpu_product import product
from kernels_pallas.grouped_matmul.rows import take_rows

WIDTHS = 64
"""Widths are multiples of this: of 16 bits, what a swizzled row of shared memory holds."""


def unsupported(dtype: str, widths: tuple[int, ...]) -> str | None:
    """Why these dimensions cannot be taken, or None."""
    if dtype not in hopper.DTYPES:
        return f"takes rows of {hopper.DTYPES}, got {dtype}"
    if any(width % WIDTHS or not width for width in widths):
        return f"needs widths in multiples of {WIDTHS}, got {widths}"
    return None


def grouped_matmul(
    lhs,
    rhs,
    group_sizes_G,
    *,
    rows_M=None,
    readers_Tr=None,
    expected_rows=None,
    transpose_rhs=False,
    preferred_element_type=None,
    interpret: Any = False,
) -> jax.Array:
    """See `kernels_pallas.grouped_matmul.grouped_matmul`."""
    _check("grouped_matmul", lhs, rhs.shape[1:], interpret)
    sizes_G = jnp.maximum(group_sizes_G, 0)
    lhs_MK = lhs if rows_M is None else take_rows(lhs, rows_M, jnp.sum(sizes_G), readers_Tr)
    dtype = jnp.dtype(preferred_element_type or lhs.dtype)
    return _product(lhs_MK, rhs, sizes_G, transpose_rhs, dtype, interpret)


def grouped_swiglu(
    x_TK,
    gate_up_GCKF,
    group_sizes_G,
    *,
    rows_M=None,
    readers_Tr=None,
    expected_rows=None,
    interpret: Any = False,
) -> jax.Array:
    """See `kernels_pallas.grouped_matmul.grouped_swiglu`."""
    _check("grouped_swiglu", x_TK, gate_up_GCKF.shape[2:], interpret)
    return ragged.grouped_swiglu(
        x_TK,
        gate_up_GCKF,
        group_sizes_G,
        rows_M=rows_M,
        readers_Tr=readers_Tr,
        product=functools.partial(grouped_matmul, interpret=interpret),
    )


def _check(op: str, lhs, widths, interpret) -> None:
    hopper.check(op, interpret)
    reason = unsupported(str(lhs.dtype), tuple(widths))
    if reason:
        raise ValueError(f"{op}: implementation 'pallas_gpu' {reason}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _product(lhs_MK, rhs, sizes_G, transpose_rhs, dtype, interpret):
    if not lhs_MK.shape[0]:
        return jnp.zeros((0, rhs.shape[1 if transpose_rhs else 2]), dtype)
    return product(
        lhs_MK,
        rhs.astype(lhs_MK.dtype),
        sizes_G,
        transpose_rhs=transpose_rhs,
        out_dtype=dtype,
        interpret=interpret,
    )


def _forward(lhs_MK, rhs, sizes_G, *static):
    return _product(lhs_MK, rhs, sizes_G, *static), (lhs_MK, rhs, sizes_G)


def _backward(transpose_rhs, dtype, interpret, residuals, d_out_MN):
    lhs_MK, rhs, sizes_G = residuals
    no_gradient = np.zeros(sizes_G.shape, jax.dtypes.float0)
    if not lhs_MK.shape[0]:
        return jnp.zeros_like(lhs_MK), jnp.zeros_like(rhs), no_gradient
    d_out_MN = d_out_MN.astype(lhs_MK.dtype)
    d_lhs_MK = _product(d_out_MN, rhs, sizes_G, not transpose_rhs, lhs_MK.dtype, interpret)
    factors = (d_out_MN, lhs_MK) if transpose_rhs else (lhs_MK, d_out_MN)
    d_rhs = outer(*factors, sizes_G, out_dtype=rhs.dtype, interpret=interpret)
    return d_lhs_MK, d_rhs, no_gradient


_product.defvjp(_forward, _backward)
