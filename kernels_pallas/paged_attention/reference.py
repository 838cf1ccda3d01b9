"""Definition: every sequence's pages are gathered and every score is materialised."""

import jax
import jax.numpy as jnp


def paged_attention(q_BQH, k_pages_PSC, v_pages_PSC, lengths_B, table_BT, *, scale) -> jax.Array:
    """See `kernels_pallas.paged_attention.paged_attention`."""
    batch, q_heads, head_dim = q_BQH.shape
    kv_heads = k_pages_PSC.shape[2] // head_dim
    q_BKGH = q_BQH.reshape(batch, kv_heads, q_heads // kv_heads, head_dim)
    k_BSKH = k_pages_PSC[table_BT].reshape(batch, -1, kv_heads, head_dim)
    v_BSKH = v_pages_PSC[table_BT].reshape(batch, -1, kv_heads, head_dim)
    here_BS = jnp.arange(k_BSKH.shape[1]) < lengths_B[:, None]
    scores_BKGS = scale * jnp.einsum(
        "bkgh,bskh->bkgs", q_BKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    scores_BKGS = jnp.where(here_BS[:, None, None], scores_BKGS, -jnp.inf)
    top_BKG1 = jnp.max(scores_BKGS, axis=-1, keepdims=True)
    weights_BKGS = jnp.exp(scores_BKGS - jnp.where(jnp.isfinite(top_BKG1), top_BKG1, 0.0))
    total_BKG1 = jnp.sum(weights_BKGS, axis=-1, keepdims=True)
    weights_BKGS = weights_BKGS / jnp.where(total_BKG1 == 0, 1.0, total_BKG1)
    # What lies behind a sequence's end may be anything.
    v_BSKH = jnp.where(here_BS[:, :, None, None], v_BSKH, 0)
    out_BKGH = jnp.einsum(
        "bkgs,bskh->bkgh",
        weights_BKGS.astype(v_BSKH.dtype),
        v_BSKH,
        preferred_element_type=jnp.float32,
    )
    return out_BKGH.reshape(q_BQH.shape).astype(q_BQH.dtype)
