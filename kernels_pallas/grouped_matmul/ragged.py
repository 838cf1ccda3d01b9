"""`jax.lax.ragged_dot`, XLA's own grouped product: a kernel of the compiler's on TPUs, where it is
the default for what ours do not take. Elsewhere it multiplies every row with every matrix.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul.rows import take_rows


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
    sizes_G = jnp.maximum(group_sizes_G, 0)
    lhs_MK = lhs if rows_M is None else take_rows(lhs, rows_M, jnp.sum(sizes_G), readers_Tr)
    rhs_GKN = (jnp.swapaxes(rhs, 1, 2) if transpose_rhs else rhs).astype(lhs.dtype)
    out_MN = jax.lax.ragged_dot(lhs_MK, rhs_GKN, sizes_G, preferred_element_type=jnp.float32)
    # Past the last group backends differ in what they leave.
    inside_M1 = jnp.arange(out_MN.shape[0])[:, None] < jnp.sum(sizes_G)
    return jnp.where(inside_M1, out_MN, 0).astype(preferred_element_type or lhs.dtype)


def grouped_swiglu(
    x_TK,
    gate_up_GCKF,
    group_sizes_G,
    *,
    rows_M=None,
    readers_Tr=None,
    expected_rows=None,
    product: Callable[..., jax.Array] = grouped_matmul,
) -> jax.Array:
    """See `kernels_pallas.grouped_matmul.grouped_swiglu`; `product` multiplies the rows."""
    groups, _, width_in, width = gate_up_GCKF.shape
    gate_up_MP = product(
        x_TK,
        jnp.swapaxes(gate_up_GCKF, 1, 2).reshape(groups, width_in, 2 * width),
        group_sizes_G,
        rows_M=rows_M,
        readers_Tr=readers_Tr,
        preferred_element_type=jnp.float32,
    )
    gate_MF, up_MF = gate_up_MP[:, :width], gate_up_MP[:, width:]
    return (jax.nn.silu(gate_MF) * up_MF).astype(x_TK.dtype)
