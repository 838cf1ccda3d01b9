"""Paged attention for XLA: a few pages of every sequence at one time, softmax online.

The loop ends at the longest sequence, so what is paid for is the longest length, not the capacity
of the page table.
"""

import jax
import jax.numpy as jnp

BLOCK_TOKENS = 64
NEVER = -1e30
"""Score of a token that is not there. Finite, so that no row gives inf - inf."""


def paged_attention(q_BQH, k_pages_PSC, v_pages_PSC, lengths_B, table_BT, *, scale) -> jax.Array:
    """See `kernels_pallas.paged_attention.paged_attention`."""
    batch, q_heads, head_dim = q_BQH.shape
    page_size = k_pages_PSC.shape[1]
    kv_heads = k_pages_PSC.shape[2] // head_dim
    q_BKGH = q_BQH.reshape(batch, kv_heads, q_heads // kv_heads, head_dim)
    block_pages = min(max(1, BLOCK_TOKENS // page_size), table_BT.shape[1])
    block_tokens = block_pages * page_size
    table_BT = jnp.pad(table_BT, ((0, 0), (0, -table_BT.shape[1] % block_pages)))

    def one_block(block, carry):
        top_BKG1, total_BKG1, sum_BKGH = carry
        pages = jax.lax.dynamic_slice_in_dim(table_BT, block * block_pages, block_pages, axis=1)
        k_BSKH = k_pages_PSC[pages].reshape(batch, block_tokens, kv_heads, head_dim)
        v_BSKH = v_pages_PSC[pages].reshape(batch, block_tokens, kv_heads, head_dim)
        here_BS = block * block_tokens + jnp.arange(block_tokens) < lengths_B[:, None]
        scores_BKGS = scale * jnp.einsum(
            "bkgh,bskh->bkgs", q_BKGH, k_BSKH, preferred_element_type=jnp.float32
        )
        scores_BKGS = jnp.where(here_BS[:, None, None], scores_BKGS, NEVER)
        # What lies behind a sequence's end may be anything.
        v_BSKH = jnp.where(here_BS[:, :, None, None], v_BSKH, 0)
        new_BKG1 = jnp.maximum(top_BKG1, jnp.max(scores_BKGS, axis=-1, keepdims=True))
        weights_BKGS = jnp.exp(scores_BKGS - new_BKG1)
        shrink_BKG1 = jnp.exp(top_BKG1 - new_BKG1)
        part_BKGH = jnp.einsum(
            "bkgs,bskh->bkgh",
            weights_BKGS.astype(v_BSKH.dtype),
            v_BSKH,
            preferred_element_type=jnp.float32,
        )
        total_BKG1 = total_BKG1 * shrink_BKG1 + jnp.sum(weights_BKGS, axis=-1, keepdims=True)
        return new_BKG1, total_BKG1, sum_BKGH * shrink_BKG1 + part_BKGH

    n_blocks = -(-jnp.max(lengths_B) // block_tokens)
    column = (*q_BKGH.shape[:-1], 1)
    start = (
        jnp.full(column, NEVER, jnp.float32),
        jnp.zeros(column, jnp.float32),
        jnp.zeros(q_BKGH.shape, jnp.float32),
    )
    _, total_BKG1, sum_BKGH = jax.lax.fori_loop(0, n_blocks, one_block, start)
    # A sequence of length 0 beside longer ones has weighed what is not there.
    empty_B111 = (lengths_B == 0)[:, None, None, None]
    out_BKGH = jnp.where(empty_B111, 0.0, sum_BKGH / jnp.where(total_BKG1 == 0, 1.0, total_BKG1))
    return out_BKGH.reshape(q_BQH.shape).astype(q_BQH.dtype)
