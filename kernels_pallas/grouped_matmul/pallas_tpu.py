"""Our Pallas kernels for TPUs: row gather by DMA, SwiGLU in the product, nothing transposed in HBM.

README.md here says what they do and what was measured.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import targets
from kernels_pallas.grouped_matmul.pallas_tpu_kernels import LANES, WIDEST, outer, product
from kernels_pallas.grouped_matmul.rows import add_rows

DTYPES = ("float32", "bfloat16")


def unsupported(dtype, widths: tuple[int, ...], gathered: int | None) -> str | None:
    """Why these dimensions cannot be taken, or None. `gathered`: the width of gathered rows."""
    if dtype not in DTYPES:
        return f"takes rows of {DTYPES}, got {dtype}"
    if any(width % LANES or not width for width in widths):
        return f"needs widths in multiples of {LANES}, got {widths}"
    if max(widths) > WIDEST:
        return f"needs widths of at most {WIDEST}, got {widths}"
    if gathered and dtype == "bfloat16" and gathered % (2 * LANES):
        return f"needs bfloat16 rows to gather of a multiple of {2 * LANES}, got {gathered}"
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
    width = None if rows_M is None else lhs.shape[1]
    _check("grouped_matmul", lhs, rhs.shape[1:], width, interpret)
    dtype = jnp.dtype(preferred_element_type or lhs.dtype)
    static = (expected_rows, transpose_rhs, dtype, interpret)
    return _product(lhs, rhs, group_sizes_G, rows_M, readers_Tr, *static)


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
    widths = gate_up_GCKF.shape[2:]
    _check("grouped_swiglu", x_TK, widths, None if rows_M is None else widths[0], interpret)
    return _swiglu(x_TK, gate_up_GCKF, group_sizes_G, rows_M, readers_Tr, expected_rows, interpret)


def _check(op: str, lhs, widths, gathered, interpret) -> None:
    targets.check_tpu(op, interpret)
    reason = unsupported(str(lhs.dtype), tuple(widths), gathered)
    if reason:
        raise ValueError(f"{op}: implementation 'pallas_tpu' {reason}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _product(
    lhs, rhs, group_sizes_G, rows_M, readers_Tr, expected_rows, transpose_rhs, dtype, interpret
):
    rows = lhs.shape[0] if rows_M is None else rows_M.shape[0]
    if not rows:
        return jnp.zeros((0, rhs.shape[1 if transpose_rhs else 2]), dtype)
    return product(
        lhs[None],
        rhs.astype(lhs.dtype)[:, None],
        group_sizes_G,
        rows_M=rows_M,
        transpose_rhs=transpose_rhs,
        out_dtype=dtype,
        expected_rows=expected_rows,
        interpret=interpret,
    )


def _product_forward(lhs, rhs, group_sizes_G, rows_M, readers_Tr, *static):
    out_MN = _product(lhs, rhs, group_sizes_G, rows_M, readers_Tr, *static)
    return out_MN, (lhs, rhs, group_sizes_G, rows_M, readers_Tr)


def _product_backward(expected_rows, transpose_rhs, dtype, interpret, residuals, d_out_MN):
    lhs, rhs, *integers = residuals
    group_sizes_G, rows_M, readers_Tr = integers
    if not d_out_MN.shape[0]:
        return jnp.zeros_like(lhs), jnp.zeros_like(rhs), *_no_gradient(*integers)
    d_out_MN = d_out_MN.astype(lhs.dtype)
    d_lhs_MK = product(
        d_out_MN[None],
        rhs.astype(lhs.dtype)[:, None],
        group_sizes_G,
        transpose_rhs=not transpose_rhs,
        out_dtype=lhs.dtype,
        expected_rows=expected_rows,
        interpret=interpret,
    )
    if transpose_rhs:
        # The kernel gathers the rows of its first operand only.
        lhs_MK = lhs if rows_M is None else lhs[rows_M]
        factors, picks = (d_out_MN, lhs_MK[None]), None
    else:
        factors, picks = (lhs, d_out_MN[None]), rows_M
    d_rhs_GCKN = outer(
        *factors,
        group_sizes_G,
        rows_M=picks,
        out_dtype=rhs.dtype,
        expected_rows=expected_rows,
        interpret=interpret,
    )
    d_rhs = d_rhs_GCKN[:, 0]
    d_lhs = _to_tokens(d_lhs_MK, rows_M, readers_Tr, group_sizes_G, lhs)
    return d_lhs, d_rhs, *_no_gradient(*integers)


_product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _swiglu(x_TK, gate_up_GCKF, group_sizes_G, rows_M, readers_Tr, expected_rows, interpret):
    rows = x_TK.shape[0] if rows_M is None else rows_M.shape[0]
    if not rows:
        return jnp.zeros((0, gate_up_GCKF.shape[3]), x_TK.dtype)
    return product(
        x_TK[None],
        gate_up_GCKF.astype(x_TK.dtype),
        group_sizes_G,
        rows_M=rows_M,
        mode="swiglu",
        out_dtype=x_TK.dtype,
        expected_rows=expected_rows,
        interpret=interpret,
    )


def _swiglu_forward(x_TK, gate_up_GCKF, group_sizes_G, rows_M, readers_Tr, *static):
    h_MF = _swiglu(x_TK, gate_up_GCKF, group_sizes_G, rows_M, readers_Tr, *static)
    return h_MF, (x_TK, gate_up_GCKF, group_sizes_G, rows_M, readers_Tr)


def _swiglu_backward(expected_rows, interpret, residuals, d_h_MF):
    """Computes gate and up again: they are three times what the forward pass writes."""
    x_TK, gate_up_GCKF, *integers = residuals
    group_sizes_G, rows_M, readers_Tr = integers
    if not d_h_MF.shape[0]:
        zeros = jnp.zeros_like(x_TK), jnp.zeros_like(gate_up_GCKF)
        return *zeros, *_no_gradient(*integers)
    gate_up_GCKF = gate_up_GCKF.astype(x_TK.dtype)
    d_CMF = product(
        x_TK[None],
        gate_up_GCKF,
        group_sizes_G,
        rows_M=rows_M,
        d_hidden_MN=d_h_MF,
        mode="swiglu_backward",
        out_dtype=x_TK.dtype,
        expected_rows=expected_rows,
        interpret=interpret,
    )
    d_x_MK = product(
        d_CMF,
        gate_up_GCKF,
        group_sizes_G,
        transpose_rhs=True,
        out_dtype=x_TK.dtype,
        expected_rows=expected_rows,
        interpret=interpret,
    )
    d_gate_up_GCKF = outer(
        x_TK,
        d_CMF,
        group_sizes_G,
        rows_M=rows_M,
        out_dtype=gate_up_GCKF.dtype,
        expected_rows=expected_rows,
        interpret=interpret,
    )
    d_x_TK = _to_tokens(d_x_MK, rows_M, readers_Tr, group_sizes_G, x_TK)
    return d_x_TK, d_gate_up_GCKF, *_no_gradient(*integers)


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _to_tokens(d_MK, rows_M, readers_Tr, group_sizes_G, like) -> jax.Array:
    if rows_M is None:
        return d_MK
    count = jnp.sum(jnp.maximum(group_sizes_G, 0))
    return add_rows(d_MK, rows_M, like.shape[0], count, readers_Tr).astype(like.dtype)


def _no_gradient(*integers) -> tuple:
    return tuple(None if x is None else np.zeros(x.shape, jax.dtypes.float0) for x in integers)
