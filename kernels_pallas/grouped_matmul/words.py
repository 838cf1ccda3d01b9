"""Both halves of an expert and their derivatives on rows as words (`kernels_pallas.row_words`), for
TPUs: rows that came from other devices and go back are never brought into another layout.

Words are integers, to which jax gives no gradients: whoever exchanges rows writes the derivative of
the whole, with the backward functions here (`olmax.models.expert_words`). `expected_rows` and
`interpret` as in `kernels_pallas.grouped_matmul.grouped_matmul`; in a program that is not for TPUs,
without `interpret`, `up` and `down` raise ValueError. Rows behind all groups are not read, and come
back as zeros.
"""

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import targets
from kernels_pallas.grouped_matmul import pallas_tpu
from kernels_pallas.grouped_matmul.pallas_tpu_kernels import outer, product
from kernels_pallas.row_words import MULTIPLE


def suits(dtype, width: int, hidden: int) -> bool:
    """Whether rows of `width` columns can be taken as words, between matrices of `hidden`."""
    fits = pallas_tpu.unsupported(str(jnp.dtype(dtype)), (width, hidden), None) is None
    return fits and jnp.dtype(dtype) == jnp.bfloat16 and width % MULTIPLE == 0


def up(
    x_MSL: jax.Array,
    gate_up_GCKF: jax.Array,
    group_sizes_G: jax.Array,
    *,
    expected_rows: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """silu(x @ gate) * (x @ up), bfloat16 [M, F], of words [M, S, 128] and [G, 2, K, F]."""
    targets.check_tpu("grouped_matmul.words.up", interpret)
    return product(
        x_MSL,
        gate_up_GCKF.astype(jnp.bfloat16),
        group_sizes_G,
        mode="swiglu",
        out_dtype=jnp.bfloat16,
        expected_rows=expected_rows,
        interpret=interpret,
    )


def down(
    h_MF: jax.Array,
    down_GFK: jax.Array,
    group_sizes_G: jax.Array,
    *,
    expected_rows: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """h @ down as words [M, S, 128], of bfloat16 [M, F] and [G, F, K]."""
    targets.check_tpu("grouped_matmul.words.down", interpret)
    return product(
        h_MF[None],
        down_GFK.astype(jnp.bfloat16)[:, None],
        group_sizes_G,
        out_dtype=jnp.bfloat16,
        out_words=True,
        expected_rows=expected_rows,
        interpret=interpret,
    )


def up_backward(
    x_MSL: jax.Array,
    gate_up_GCKF: jax.Array,
    group_sizes_G: jax.Array,
    d_h_MF: jax.Array,
    *,
    expected_rows: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of `up`'s rows, words, and of its matrices, in their dtype."""
    how: dict[str, Any] = dict(expected_rows=expected_rows, interpret=interpret)
    matrices_GCKF = gate_up_GCKF.astype(jnp.bfloat16)
    d_CMF = product(
        x_MSL,
        matrices_GCKF,
        group_sizes_G,
        d_hidden_MN=d_h_MF,
        mode="swiglu_backward",
        out_dtype=jnp.bfloat16,
        **how,
    )
    d_x_MSL = product(
        d_CMF,
        matrices_GCKF,
        group_sizes_G,
        transpose_rhs=True,
        out_dtype=jnp.bfloat16,
        out_words=True,
        **how,
    )
    d_gate_up_GCKF = outer(x_MSL, d_CMF, group_sizes_G, out_dtype=gate_up_GCKF.dtype, **how)
    return d_x_MSL, d_gate_up_GCKF


def down_backward(
    h_MF: jax.Array,
    down_GFK: jax.Array,
    group_sizes_G: jax.Array,
    d_y_MSL: jax.Array,
    *,
    expected_rows: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of `down`'s rows, bfloat16 [M, F], and of its matrices, in their dtype."""
    how: dict[str, Any] = dict(expected_rows=expected_rows, interpret=interpret)
    d_h_MF = product(
        d_y_MSL,
        down_GFK.astype(jnp.bfloat16)[:, None],
        group_sizes_G,
        transpose_rhs=True,
        out_dtype=jnp.bfloat16,
        **how,
    )
    d_down_GCFK = outer(h_MF, d_y_MSL, group_sizes_G, out_dtype=down_GFK.dtype, **how)
    return d_h_MF, d_down_GCFK[:, 0]
