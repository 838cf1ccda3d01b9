"""Loops over the tiles that exist, for XLA; the default on CPUs.

The outer loop runs over the groups that have rows, the inner one over tiles of their rows, so work
follows the rows whatever their distribution. (On CPUs `jax.lax.ragged_dot` multiplies every row
with every group's matrix.) A tile that crosses the end of its group computes rows of the next one
too and leaves what stands there as it is. The row gather, the cast and the transposition of a
matrix, SwiGLU and its derivative happen on one tile or one matrix at a time, near the caches.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.xla_cpu import row_major

TILES = (256, 128, 64, 32)
"""Rows of a tile, largest first: the first with two tiles in the average group."""


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
    tiles = _Tiles(group_sizes_G, rhs.shape[0], lhs, rows_M, expected_rows)
    width = rhs.shape[1 if transpose_rhs else 2]

    def group(index, out_MN):
        rhs_KN = _matrix(rhs, index, lhs.dtype, transpose_rhs)

        def tile(start, inside, out_MN):
            out_RN = _matmul(tiles.take(start), rhs_KN).astype(dtype)
            return _put(out_MN, out_RN, start, inside)

        return tiles.each(index, tile, out_MN)

    return tiles.each_group(group, jnp.zeros((tiles.rows, width), dtype))


def _product_forward(lhs, rhs, group_sizes_G, rows_M, expected_rows, transpose_rhs, dtype):
    out_MN = _product(lhs, rhs, group_sizes_G, rows_M, expected_rows, transpose_rhs, dtype)
    return out_MN, (lhs, rhs, group_sizes_G, rows_M)


def _product_backward(expected_rows, transpose_rhs, dtype, residuals, d_out_MN):
    lhs, rhs, group_sizes_G, rows_M = residuals
    tiles = _Tiles(group_sizes_G, rhs.shape[0], lhs, rows_M, expected_rows)
    d_out_MN = d_out_MN.astype(lhs.dtype)

    def group(index, carry):
        rhs_NK = _matrix(rhs, index, lhs.dtype, not transpose_rhs)

        def tile(start, inside, carry):
            d_lhs, d_rhs_kn = carry
            lhs_RK = _zero_outside(tiles.take(start), inside)
            d_out_RN = _zero_outside(_cut(d_out_MN, start, tiles.size), inside)
            d_lhs = tiles.add(d_lhs, _matmul(d_out_RN, rhs_NK), start, inside)
            first, second = (d_out_RN, lhs_RK) if transpose_rhs else (lhs_RK, d_out_RN)
            return d_lhs, d_rhs_kn + _matmul(row_major(first.T), second)

        d_lhs, d_rhs = carry
        zeros_kn = jnp.zeros(rhs.shape[1:], jnp.float32)
        d_lhs, d_rhs_kn = tiles.each(index, tile, (d_lhs, zeros_kn))
        return d_lhs, _set(d_rhs, d_rhs_kn, index)

    d_rhs = jnp.zeros(rhs.shape, rhs.dtype)
    d_lhs, d_rhs = tiles.each_group(group, (tiles.gradient(), d_rhs))
    return d_lhs.astype(lhs.dtype), d_rhs, *_no_gradient(group_sizes_G, rows_M)


_product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _swiglu(x_TK, gate_up_GCKF, group_sizes_G, rows_M, expected_rows):
    return _swiglu_forward(x_TK, gate_up_GCKF, group_sizes_G, rows_M, expected_rows)[0]


def _swiglu_forward(x_TK, gate_up_GCKF, group_sizes_G, rows_M, expected_rows):
    tiles = _Tiles(group_sizes_G, gate_up_GCKF.shape[0], x_TK, rows_M, expected_rows)
    width = gate_up_GCKF.shape[3]

    def group(index, carry):
        gate_up_KP = _gate_up(gate_up_GCKF, index, x_TK.dtype)

        def tile(start, inside, carry):
            gate_up_MP, h_MF = carry
            gate_up_RP = _matmul(tiles.take(start), gate_up_KP)
            gate_RF, up_RF = gate_up_RP[:, :width], gate_up_RP[:, width:]
            h_RF = (gate_RF * jax.nn.sigmoid(gate_RF) * up_RF).astype(h_MF.dtype)
            gate_up_MP = _put(gate_up_MP, gate_up_RP.astype(h_MF.dtype), start, inside)
            return gate_up_MP, _put(h_MF, h_RF, start, inside)

        return tiles.each(index, tile, carry)

    shapes = ((tiles.rows, 2 * width), (tiles.rows, width))
    init = tuple(jnp.zeros(shape, x_TK.dtype) for shape in shapes)
    gate_up_MP, h_MF = tiles.each_group(group, init)
    gate_up_MP = checkpoint_name(gate_up_MP, "gate_up")
    return h_MF, (x_TK, gate_up_GCKF, group_sizes_G, rows_M, gate_up_MP)


def _swiglu_backward(expected_rows, residuals, d_h_MF):
    x_TK, gate_up_GCKF, group_sizes_G, rows_M, gate_up_MP = residuals
    tiles = _Tiles(group_sizes_G, gate_up_GCKF.shape[0], x_TK, rows_M, expected_rows)
    width = gate_up_GCKF.shape[3]

    def group(index, carry):
        gate_up_KP = _gate_up(gate_up_GCKF, index, x_TK.dtype)
        gate_up_PK = row_major(gate_up_KP.T)

        def tile(start, inside, carry):
            d_x, d_gate_up_KP = carry
            gate_up_RP = _cut(gate_up_MP, start, tiles.size).astype(jnp.float32)
            d_h_RF = _zero_outside(_cut(d_h_MF, start, tiles.size), inside).astype(jnp.float32)
            gate_RF, up_RF = gate_up_RP[:, :width], gate_up_RP[:, width:]
            sigmoid_RF = jax.nn.sigmoid(gate_RF)
            d_gate_RF = d_h_RF * up_RF * sigmoid_RF * (1 + gate_RF * (1 - sigmoid_RF))
            d_up_RF = d_h_RF * gate_RF * sigmoid_RF
            d_RP = jnp.concatenate([d_gate_RF, d_up_RF], axis=1).astype(x_TK.dtype)
            d_RP = jax.lax.optimization_barrier(d_RP)
            d_x = tiles.add(d_x, _matmul(d_RP, gate_up_PK), start, inside)
            x_RK = _zero_outside(tiles.take(start), inside)
            return d_x, d_gate_up_KP + _matmul(row_major(x_RK.T), d_RP)

        d_x, d_gate_up = carry
        d_x, d_gate_up_KP = tiles.each(index, tile, (d_x, jnp.zeros(gate_up_KP.shape, jnp.float32)))
        return d_x, _set(d_gate_up, _parts(d_gate_up_KP), index)

    init = (tiles.gradient(), jnp.zeros(gate_up_GCKF.shape, gate_up_GCKF.dtype))
    d_x, d_gate_up = tiles.each_group(group, init)
    return d_x.astype(x_TK.dtype), d_gate_up, *_no_gradient(group_sizes_G, rows_M)


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


class _Tiles:
    """The tiles of every group, and how rows enter and leave them. Letter R: rows of a tile."""

    def __init__(self, group_sizes_G, groups: int, lhs, rows_M, expected_rows: int | None):
        self.lhs, self.rows_M = lhs, rows_M
        self.rows = lhs.shape[0] if rows_M is None else rows_M.shape[0]
        expected = expected_rows or self.rows
        fits = [size for size in TILES if expected >= 2 * size * groups]
        self.size = min(fits[0] if fits else TILES[-1], self.rows)
        sizes_G = jnp.maximum(group_sizes_G, 0)
        # Groups that reach past the last row are cut there.
        self.stop_G = jnp.minimum(jnp.cumsum(sizes_G), self.rows)
        self.start_G = jnp.concatenate([jnp.zeros_like(self.stop_G[:1]), self.stop_G[:-1]])
        self.order_G = jnp.argsort(self.stop_G == self.start_G, stable=True)
        self.filled = jnp.sum(self.stop_G > self.start_G)

    def each_group(self, body: Callable[[jax.Array, Any], Any], init: Any) -> Any:
        """Folds `body(group, carry)` over the groups that have rows, in ascending order."""
        if not self.rows:
            return init
        step = lambda index, carry: body(self.order_G[index], carry)  # noqa: E731
        return jax.lax.fori_loop(0, self.filled, step, init)

    def each(self, group, body: Callable[[jax.Array, jax.Array, Any], Any], init: Any) -> Any:
        """Folds `body(start, inside_R1, carry)` over the tiles of a group. `start` is the tile's
        first row, `inside` says which of its rows are this tile's own to compute.
        """
        first, stop = self.start_G[group], self.stop_G[group]

        def step(index, carry):
            own = first + index * self.size
            start = jnp.minimum(own, self.rows - self.size)
            row_R1 = start + jnp.arange(self.size)[:, None]
            return body(start, (row_R1 >= own) & (row_R1 < stop), carry)

        return jax.lax.fori_loop(0, (stop - first + self.size - 1) // self.size, step, init)

    def take(self, start) -> jax.Array:
        """The tile's rows of lhs [R, K]."""
        if self.rows_M is None:
            return _cut(self.lhs, start, self.size)
        return self.lhs.at[_cut(self.rows_M, start, self.size)].get(mode="clip")

    def gradient(self) -> jax.Array:
        """Zeros for the gradient of lhs; float32 where several rows are added up."""
        return jnp.zeros(self.lhs.shape, self.lhs.dtype if self.rows_M is None else jnp.float32)

    def add(self, d_lhs, d_lhs_RK, start, inside) -> jax.Array:
        """Adds a tile, zero outside its own rows, to the gradient of lhs. One tile after the other
        and, on CPUs, one row after the other: the sum has one order.
        """
        if self.rows_M is None:
            return _put(d_lhs, d_lhs_RK.astype(d_lhs.dtype), start, inside)
        rows_R = _cut(self.rows_M, start, self.size)
        return d_lhs.at[rows_R].add(d_lhs_RK, mode="drop")


def _matrix(rhs, group, dtype, transpose: bool) -> jax.Array:
    """One group's matrix, apart from what reads it so that its loop does not prepare it again."""
    rhs_KN = jax.lax.dynamic_index_in_dim(rhs, group, keepdims=False).astype(dtype)
    return jax.lax.optimization_barrier(row_major(rhs_KN.T) if transpose else rhs_KN)


def _gate_up(gate_up_GCKF, group, dtype) -> jax.Array:
    """One group's gate and up matrices side by side [K, 2 F]."""
    gate_up_CKF = jax.lax.dynamic_index_in_dim(gate_up_GCKF, group, keepdims=False).astype(dtype)
    return jax.lax.optimization_barrier(jnp.concatenate([*gate_up_CKF], axis=1))


def _parts(gate_up_KP) -> jax.Array:
    """The two halves of the columns, [2, K, F]."""
    return jnp.stack(jnp.split(gate_up_KP, 2, axis=1))


def _matmul(a, b) -> jax.Array:
    return jax.lax.optimization_barrier(jnp.matmul(a, b, preferred_element_type=jnp.float32))


def _cut(x, start, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size)


def _zero_outside(x_RN, inside) -> jax.Array:
    return jax.lax.optimization_barrier(jnp.where(inside, x_RN, 0))


def _put(out_MN, out_RN, start, inside) -> jax.Array:
    kept_RN = _cut(out_MN, start, out_RN.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(
        out_MN, jnp.where(inside, out_RN, kept_RN), start, axis=0
    )


def _set(out_GKN, out_KN, group) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(out_GKN, out_KN.astype(out_GKN.dtype), group, 0)


def _no_gradient(*integers) -> tuple:
    zeros = lambda x: np.zeros(x.shape, jax.dtypes.float0)  # noqa: E731
    return tuple(None if x is None else zeros(x) for x in integers)
