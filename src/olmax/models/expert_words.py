"""Experts on other devices, with every row as the words that travel (`kernels_pallas.row_words`).

What `expert_parallel.exchange`, the products of `kernels_pallas.grouped_matmul` and `combine` of
the router compute one after the other, as one function with a derivative of its own: between them,
TPUs bring buffers for the worst case from one layout into another, seven times a layer. Letters: M
rows sent, R rows received, E experts here, k experts of one token.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.grouped_matmul import words
from kernels_pallas.row_words import from_words, halves, joined, to_words
from olmax.models.expert_parallel import Exchange, exchange


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def experts_by_words(
    x_TD: jax.Array,
    weights_Tk: jax.Array,
    gate_up_ECDF: jax.Array,
    down_EFD: jax.Array,
    destinations_Tk: jax.Array,
    rows_M: jax.Array,
    plan: Exchange,
    axes: tuple[str, ...],
    interpret: Any = False,
) -> jax.Array:
    """The weighted sum of the outputs of every token's experts: bfloat16 [T, D].

    Called inside `shard_map`; where `words.suits` the sizes.

    Args:
      x_TD: bfloat16.
      weights_Tk: float32.
      gate_up_ECDF, down_EFD: of this device's experts.
      destinations_Tk: int32, the row of each (token, slot), or M for one that has no expert.
      rows_M: int32, the token of each row.
      plan, axes: as in `exchange`.
      interpret: as in `kernels_pallas.grouped_matmul.grouped_matmul`.
    """
    arguments = (x_TD, weights_Tk, gate_up_ECDF, down_EFD, destinations_Tk, rows_M, plan)
    return _forward(*arguments, axes, interpret)[0]


def _forward(
    x_TD, weights_Tk, gate_up_ECDF, down_EFD, destinations_Tk, rows_M, plan, axes, interpret
):
    how = dict(expected_rows=plan.rows_back, interpret=interpret)
    x_RSL = exchange(to_words(x_TD)[rows_M], plan, axes)
    h_RF = words.up(x_RSL, gate_up_ECDF, plan.counts_E, **how)
    y_RSL = words.down(h_RF, down_EFD, plan.counts_E, **how)
    y_MSL = exchange(y_RSL, plan.reversed(), axes)
    y_TD = _sum(y_MSL, destinations_Tk, weights_Tk.astype(jnp.float32))
    integers = (destinations_Tk, rows_M, plan)
    return y_TD, (x_RSL, h_RF, y_MSL, weights_Tk, gate_up_ECDF, down_EFD, integers)


def _backward(axes, interpret, residuals, d_y_TD):
    x_RSL, h_RF, y_MSL, weights_Tk, gate_up_ECDF, down_EFD, integers = residuals
    destinations_Tk, rows_M, plan = integers
    how = dict(expected_rows=plan.rows_back, interpret=interpret)
    d_y_TSL = to_words(d_y_TD)
    d_low_TSL, d_high_TSL = halves(d_y_TSL)
    d_weights_Tk = jnp.stack(
        [
            jnp.sum(low_TSL * d_low_TSL + high_TSL * d_high_TSL, axis=(1, 2))
            for low_TSL, high_TSL in _slots(y_MSL, destinations_Tk)
        ],
        axis=1,
    )
    weight_M = jnp.zeros(rows_M.shape, jnp.float32)
    weight_M = weight_M.at[destinations_Tk.reshape(-1)].set(
        weights_Tk.astype(jnp.float32).reshape(-1), mode="drop", unique_indices=True
    )
    weight_M11 = weight_M[:, None, None]
    d_y_MSL = joined(*(weight_M11 * half for half in halves(d_y_TSL[rows_M])))
    d_y_RSL = exchange(d_y_MSL, plan, axes)
    d_h_RF, d_down_EFD = words.down_backward(h_RF, down_EFD, plan.counts_E, d_y_RSL, **how)
    d_x_RSL, d_gate_up_ECDF = words.up_backward(x_RSL, gate_up_ECDF, plan.counts_E, d_h_RF, **how)
    d_x_MSL = exchange(d_x_RSL, plan.reversed(), axes)
    d_x_TD = _sum(d_x_MSL, destinations_Tk, None)
    no_gradient = (np.zeros(x.shape, jax.dtypes.float0) for x in (destinations_Tk, rows_M))
    return (
        *(d_x_TD, d_weights_Tk.astype(weights_Tk.dtype), d_gate_up_ECDF, d_down_EFD),
        *(*no_gradient, None),
    )


experts_by_words.defvjp(_forward, _backward)


def _slots(rows_MSL, destinations_Tk) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Both halves, float32 [T, S, 128], of the rows of every token's first slot, second, ...; zeros
    for a slot without a row, whatever stands in those that nobody has sent.
    """
    for row_T in destinations_Tk.T:
        found_T11 = (row_T < rows_MSL.shape[0])[:, None, None]
        words_TSL = rows_MSL.at[row_T].get(mode="clip")
        low_TSL, high_TSL = (jnp.where(found_T11, half, 0) for half in halves(words_TSL))
        yield low_TSL, high_TSL


def _sum(rows_MSL, destinations_Tk, weights_Tk) -> jax.Array:
    """bfloat16 [T, D]: the rows of every token, times their weights, slot after slot."""
    low_TSL = high_TSL = jnp.zeros((destinations_Tk.shape[0], *rows_MSL.shape[1:]), jnp.float32)
    for slot, (low, high) in enumerate(_slots(rows_MSL, destinations_Tk)):
        weight_T11 = 1.0 if weights_Tk is None else weights_Tk[:, slot, None, None]
        low_TSL, high_TSL = low_TSL + weight_T11 * low, high_TSL + weight_T11 * high
    return from_words(joined(low_TSL, high_TSL))
