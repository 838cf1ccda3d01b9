"""Loops over the tiles that exist, for XLA; the default on CPUs.

Work follows the rows whatever their distribution. (On CPUs `jax.lax.ragged_dot` multiplies every
row with every group's matrix.) The row gather, the cast and the transposition of a matrix, SwiGLU
and its derivative happen on one tile or one matrix at a time, near the caches.

Letters as in `tiles`: P groups abreast, R rows of a tile.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.grouped_matmul.tiles import Tiles
from kernels_pallas.xla_cpu import row_major


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
) -> jax.Array:
    """See `kernels_pallas.grouped_matmul.grouped_matmul`."""
    dtype = jnp.dtype(preferred_element_type or lhs.dtype)
    return _product(lhs, rhs, group_sizes_G, rows_M, expected_rows, transpose_rhs, dtype)


def grouped_swiglu(
    x_TK, gate_up_GCKF, group_sizes_G, *, rows_M=None, readers_Tr=None, expected_rows=None
) -> jax.Array:
    """See `kernels_pallas.grouped_matmul.grouped_swiglu`."""
    return _swiglu(x_TK, gate_up_GCKF, group_sizes_G, rows_M, expected_rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _product(lhs, rhs, group_sizes_G, rows_M, expected_rows, transpose_rhs, dtype):
    rows = (lhs if rows_M is None else rows_M).shape[0]
    matmul = _matmul_transposed if transpose_rhs else _matmul

    def step(step, out_MN):
        rhs_P = step.matrices(rhs, lhs.dtype)

        def tile(tile, out_MN):
            return tile.put(out_MN, matmul(tile.gathered(lhs, rows_M), rhs_P))

        return step.fold(tile, out_MN)

    out_MN = jnp.zeros((rows, rhs.shape[1 if transpose_rhs else 2]), dtype)
    return Tiles(group_sizes_G, rows, expected_rows).fold(step, out_MN)


def _product_forward(lhs, rhs, group_sizes_G, rows_M, expected_rows, transpose_rhs, dtype):
    out_MN = _product(lhs, rhs, group_sizes_G, rows_M, expected_rows, transpose_rhs, dtype)
    return out_MN, (lhs, rhs, group_sizes_G, rows_M)


def _product_backward(expected_rows, transpose_rhs, dtype, residuals, d_out_MN):
    lhs, rhs, group_sizes_G, rows_M = residuals
    d_out_MN = d_out_MN.astype(lhs.dtype)
    matmul = _matmul if transpose_rhs else _matmul_transposed

    def step(step, carry):
        rhs_P = step.matrices(rhs, lhs.dtype)

        def tile(tile, carry):
            d_lhs, d_rhs = carry
            lhs_PRK = tile.own(tile.gathered(lhs, rows_M))
            d_out_PRN = tile.own(tile.rows_of(d_out_MN))
            d_lhs = tile.add(d_lhs, matmul(d_out_PRN, rhs_P), rows_M)
            first, second = (d_out_PRN, lhs_PRK) if transpose_rhs else (lhs_PRK, d_out_PRN)
            return d_lhs, step.add(d_rhs, _sum_of_outer(first, second))

        return step.fold(tile, carry)

    tiles = Tiles(group_sizes_G, d_out_MN.shape[0], expected_rows)
    init = (_gradient(lhs, rows_M), jnp.zeros(rhs.shape, jnp.float32))
    d_lhs, d_rhs = tiles.fold(step, init)
    no_gradient = _no_gradient(group_sizes_G, rows_M)
    return d_lhs.astype(lhs.dtype), d_rhs.astype(rhs.dtype), *no_gradient


_product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _swiglu(x_TK, gate_up_GCKF, group_sizes_G, rows_M, expected_rows):
    return _swiglu_forward(x_TK, gate_up_GCKF, group_sizes_G, rows_M, expected_rows)[0]


def _swiglu_forward(x_TK, gate_up_GCKF, group_sizes_G, rows_M, expected_rows):
    rows = (x_TK if rows_M is None else rows_M).shape[0]
    width = gate_up_GCKF.shape[3]

    def step(step, carry):
        gate_up_PKC = step.matrices(gate_up_GCKF, x_TK.dtype, _side_by_side)

        def tile(tile, carry):
            gate_up_MC, h_MF = carry
            gate_up_PRC = _matmul(tile.gathered(x_TK, rows_M), gate_up_PKC)
            return tile.put(gate_up_MC, gate_up_PRC), tile.put(h_MF, _silu_times(gate_up_PRC))

        return step.fold(tile, carry)

    init = tuple(jnp.zeros((rows, columns), x_TK.dtype) for columns in (2 * width, width))
    gate_up_MC, h_MF = Tiles(group_sizes_G, rows, expected_rows).fold(step, init)
    gate_up_MC = checkpoint_name(gate_up_MC, "gate_up")
    return h_MF, (x_TK, gate_up_GCKF, group_sizes_G, rows_M, gate_up_MC)


def _swiglu_backward(expected_rows, residuals, d_h_MF):
    x_TK, gate_up_GCKF, group_sizes_G, rows_M, gate_up_MC = residuals

    def step(step, carry):
        gate_up_PKC = step.matrices(gate_up_GCKF, x_TK.dtype, _side_by_side)

        def tile(tile, carry):
            d_x, d_gate_up = carry
            d_h_PRF = tile.own(tile.rows_of(d_h_MF)).astype(jnp.float32)
            gate_up_PRC = tile.own(tile.rows_of(gate_up_MC)).astype(jnp.float32)
            d_PRC = _d_silu_times(gate_up_PRC, d_h_PRF).astype(x_TK.dtype)
            d_PRC = jax.lax.optimization_barrier(d_PRC)
            d_x = tile.add(d_x, _matmul_transposed(d_PRC, gate_up_PKC), rows_M)
            x_PRK = tile.own(tile.gathered(x_TK, rows_M))
            return d_x, step.add(d_gate_up, _apart(_sum_of_outer(x_PRK, d_PRC)))

        return step.fold(tile, carry)

    tiles = Tiles(group_sizes_G, d_h_MF.shape[0], expected_rows)
    init = (_gradient(x_TK, rows_M), jnp.zeros(gate_up_GCKF.shape, jnp.float32))
    d_x, d_gate_up = tiles.fold(step, init)
    no_gradient = _no_gradient(group_sizes_G, rows_M)
    return d_x.astype(x_TK.dtype), d_gate_up.astype(gate_up_GCKF.dtype), *no_gradient


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _matmul(a_PRK, b_PKN) -> jax.Array:
    product = jnp.matmul(a_PRK, b_PKN, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(product)


def _matmul_transposed(a_PRN, b_PKN) -> jax.Array:
    return _matmul(a_PRN, jnp.swapaxes(b_PKN, 1, 2))


def _sum_of_outer(a_PRK, b_PRN) -> jax.Array:
    """Outer products of the rows' vectors, summed over them: [P, K, N]."""
    return _matmul(row_major(jnp.swapaxes(a_PRK, 1, 2)), b_PRN)


def _silu_times(gate_up_PRC) -> jax.Array:
    gate, up = jnp.split(gate_up_PRC, 2, axis=2)
    return gate * jax.nn.sigmoid(gate) * up


def _d_silu_times(gate_up_PRC, d_h_PRF) -> jax.Array:
    gate, up = jnp.split(gate_up_PRC, 2, axis=2)
    sigmoid = jax.nn.sigmoid(gate)
    d_gate = d_h_PRF * up * sigmoid * (1 + gate * (1 - sigmoid))
    return jnp.concatenate([d_gate, d_h_PRF * gate * sigmoid], axis=2)


def _side_by_side(gate_up_P2KF) -> jax.Array:
    """Gate and up as columns of one matrix, [P, K, 2 F]."""
    groups, _, rows, _ = gate_up_P2KF.shape
    return jnp.swapaxes(gate_up_P2KF, 1, 2).reshape(groups, rows, -1)


def _apart(gate_up_PKC) -> jax.Array:
    """The reverse, [P, 2, K, F]."""
    groups, rows, _ = gate_up_PKC.shape
    return jnp.swapaxes(gate_up_PKC.reshape(groups, rows, 2, -1), 1, 2)


def _gradient(lhs, rows_M) -> jax.Array:
    """Zeros for the gradient of lhs; float32 where several rows are added up."""
    return jnp.zeros(lhs.shape, lhs.dtype if rows_M is None else jnp.float32)


def _no_gradient(*integers) -> tuple:
    zeros = lambda x: np.zeros(x.shape, jax.dtypes.float0)  # noqa: E731
    return tuple(None if x is None else zeros(x) for x in integers)
