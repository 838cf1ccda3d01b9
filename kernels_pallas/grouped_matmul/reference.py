"""Definition: every group's product with every row, all but the row's own masked away."""

import jax
import jax.numpy as jnp


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
    dtype = preferred_element_type or lhs.dtype
    lhs_MK = lhs if rows_M is None else lhs[rows_M]
    inside_M1 = jnp.arange(lhs_MK.shape[0])[:, None] < jnp.sum(jnp.maximum(group_sizes_G, 0))
    lhs_MK = jnp.where(inside_M1, lhs_MK, 0)
    rhs_GKN = (jnp.swapaxes(rhs, 1, 2) if transpose_rhs else rhs).astype(lhs.dtype)
    stop_G = jnp.cumsum(jnp.maximum(group_sizes_G, 0))
    start_G = jnp.concatenate([jnp.zeros_like(stop_G[:1]), stop_G[:-1]])
    row_M1 = jnp.arange(lhs_MK.shape[0])[:, None]

    def add_group(out_MN, group):
        start, stop, rhs_KN = group
        product_MN = jnp.matmul(lhs_MK, rhs_KN, preferred_element_type=jnp.float32)
        inside_M1 = (row_M1 >= start) & (row_M1 < stop)
        return out_MN + jnp.where(inside_M1, product_MN, 0), None

    zeros_MN = jnp.zeros((lhs_MK.shape[0], rhs_GKN.shape[2]), jnp.float32)
    out_MN, _ = jax.lax.scan(add_group, zeros_MN, (start_G, stop_G, rhs_GKN))
    return out_MN.astype(dtype)


def grouped_swiglu(
    x_TK, gate_up_GCKF, group_sizes_G, *, rows_M=None, readers_Tr=None, expected_rows=None
) -> jax.Array:
    """See `kernels_pallas.grouped_matmul.grouped_swiglu`."""
    gate_MF, up_MF = (
        grouped_matmul(
            x_TK,
            gate_up_GCKF[:, index],
            group_sizes_G,
            rows_M=rows_M,
            preferred_element_type=jnp.float32,
        )
        for index in (0, 1)
    )
    return (jax.nn.silu(gate_MF) * up_MF).astype(x_TK.dtype)
