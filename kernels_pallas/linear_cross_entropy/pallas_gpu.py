"""Linear cross-entropy on GPUs (Hopper): float32 logits never leave a multiprocessor.

Forward: one product, every tile of which ends as three numbers a row (`statistics`).

Backward: some thousand columns at a time. A product whose tiles become the gradient of the logits,
in 16 bits (`gradient`), then cuBLAS' products of it with x and w. So a part of the vocabulary has
its gradient of w once, in one sum over all tokens, and that of x is added up in float32. Blocks on
GPUs have 228 KiB of memory: a row of tiles of dx, which the kernel for TPUs keeps there, does not
fit, hence the gradient of the logits goes through global memory, a part of it at a time.

Interpreted and compiled for an H100, never run on one; not the default.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import hopper
from kernels_pallas.linear_cross_entropy.pallas_gpu_kernels import (
    ALIGN,
    TILE,
    gradient,
    statistics,
)
from kernels_pallas.linear_cross_entropy.parts import columns_here, joined

PART_BYTES = 256 * 2**20
"""Of the gradient of the logits that exist at one time: 8,192 columns of 16,384 tokens."""


def linear_cross_entropy(
    x_TD: jax.Array,
    w_DV: jax.Array,
    targets_T: jax.Array,
    vocab_axes: tuple[str, ...] = (),
    soft_cap: float | None = None,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels_pallas.linear_cross_entropy.linear_cross_entropy`."""
    hopper.check("linear_cross_entropy", interpret)
    if x_TD.dtype not in hopper.DTYPES:
        raise ValueError(
            f"linear_cross_entropy: implementation 'pallas_gpu' takes x of {hopper.DTYPES}; "
            f"x {x_TD.shape} is {x_TD.dtype}"
        )
    columns_T = columns_here(targets_T, w_DV.shape[1], vocab_axes)
    lse_T, target_T = _part(soft_cap, interpret, x_TD, w_DV, columns_T)
    return joined(lse_T, target_T, vocab_axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _part(soft_cap, interpret, x_TD, w_DV, columns_T):
    """(lse, target's logit), float32 [T], over these columns."""
    return _forward(soft_cap, interpret, x_TD, w_DV, columns_T)[0]


def _whole_tiles(x_TD, w_DV):
    """x and w in x's dtype, with zeros up to whole tiles where they have none."""
    tokens, width = x_TD.shape
    depth = -width % ALIGN
    x = jnp.pad(x_TD, ((0, -tokens % TILE.rows), (0, depth)))
    return x, jnp.pad(w_DV.astype(x.dtype), ((0, depth), (0, -w_DV.shape[1] % ALIGN)))


def _rows(values_T, tokens: int):
    return jnp.pad(values_T, (0, tokens - values_T.shape[0]))


def _forward(soft_cap, interpret, x_TD, w_DV, columns_T):
    tokens, vocab = x_TD.shape[0], w_DV.shape[1]
    x, w = _whole_tiles(x_TD, w_DV)
    top, total, target = statistics(
        x,
        w,
        _rows(columns_T, x.shape[0]),
        vocab=vocab,
        soft_cap=soft_cap,
        interpret=interpret,
    )
    top_T = jnp.max(top, axis=0)
    total_T = jnp.sum(total * jnp.exp(top - top_T), axis=0)
    lse_T = (jnp.log(total_T) + top_T)[:tokens]
    return (lse_T, jnp.sum(target, axis=0)[:tokens]), (x_TD, w_DV, columns_T, lse_T)


def _part_width(tokens: int, vocab: int, itemsize: int) -> int:
    """Columns that are computed at one time: even parts of the vocabulary, in whole tiles."""
    most = max(TILE.columns, PART_BYTES // (tokens * itemsize))
    parts = math.ceil(vocab / most)
    return math.ceil(vocab / parts / TILE.columns) * TILE.columns


def _backward(soft_cap, interpret, residuals, cotangents):
    x_TD, w_DV, columns_T, lse_T = residuals
    x, w = _whole_tiles(x_TD, w_DV)
    rows_T = [_rows(values, x.shape[0]) for values in (columns_T, lse_T, *cotangents)]
    vocab = w.shape[1]

    def one(start, width, dx_TD, dw_DV):
        w_DP = jax.lax.dynamic_slice(w, (0, start), (w.shape[0], width))
        d_TP = gradient(x, w, start, *rows_T, width=width, soft_cap=soft_cap, interpret=interpret)
        dx_TD += jax.lax.dot_general(
            d_TP, w_DP, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        dw_DP = jax.lax.dot_general(
            x, d_TP, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return dx_TD, jax.lax.dynamic_update_slice(dw_DV, dw_DP.astype(dw_DV.dtype), (0, start))

    width = min(vocab, _part_width(x.shape[0], vocab, x.dtype.itemsize))
    whole, rest = divmod(vocab, width)
    sums = jnp.zeros(x.shape, jnp.float32), jnp.zeros(w.shape, w_DV.dtype)
    sums = jax.lax.fori_loop(0, whole, lambda i, sums: one(i * width, width, *sums), sums)
    if rest:
        sums = one(jnp.int32(whole * width), rest, *sums)
    dx = sums[0][: x_TD.shape[0], : x_TD.shape[1]].astype(x_TD.dtype)
    dw = sums[1][: w_DV.shape[0], : w_DV.shape[1]]
    return dx, dw, np.zeros(columns_T.shape, jax.dtypes.float0)


_part.defvjp(_forward, _backward)
