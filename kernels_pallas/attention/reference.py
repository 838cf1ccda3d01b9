"""Definition of attention in plain jnp: every score is materialised."""

import jax
import jax.numpy as jnp


def attention_mask(
    q_len: int,
    kv_len: int,
    *,
    causal: bool,
    q_offset: jax.Array | int,
    q_segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
) -> jax.Array | None:
    """bool, broadcastable to [B, L, S]: which keys a query may see. None when all of them."""
    mask = None
    if causal:
        q_pos = jnp.arange(q_len)[:, None] + q_offset
        mask = (jnp.arange(kv_len)[None, :] <= q_pos)[None]
    if q_segment_ids is not None and kv_segment_ids is not None:
        same = (q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]) & (
            q_segment_ids[:, :, None] != 0
        )
        mask = same if mask is None else mask & same
    return mask


def masked_attention(q_BLQH, k_BSKH, v_BSKH, mask, scale) -> jax.Array:
    """softmax(scale * q k^T) v under `mask`; rows that may see nothing give zeros. Scores and
    softmax in float32.
    """
    batch, q_len, q_heads, head_dim = q_BLQH.shape
    kv_heads = k_BSKH.shape[2]
    q_BLKGH = q_BLQH.reshape(batch, q_len, kv_heads, q_heads // kv_heads, head_dim)
    scores_BKGLS = (
        jnp.einsum("blkgh,bskh->bkgls", q_BLKGH, k_BSKH, preferred_element_type=jnp.float32) * scale
    )
    if mask is not None:
        mask = mask[:, None, None]
        scores_BKGLS = jnp.where(mask, scores_BKGLS, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(scores_BKGLS, axis=-1, keepdims=True))
    weights = jnp.exp(scores_BKGLS - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    probabilities = (weights / jnp.where(total == 0, 1.0, total)).astype(v_BSKH.dtype)
    out_BLKGH = jnp.einsum(
        "bkgls,bskh->blkgh", probabilities, v_BSKH, preferred_element_type=jnp.float32
    )
    return out_BLKGH.reshape(batch, q_len, q_heads, head_dim).astype(q_BLQH.dtype)


def attention(
    q_BLQH, k_BSKH, v_BSKH, *, causal, scale, q_offset, q_segment_ids, kv_segment_ids
) -> jax.Array:
    """See `kernels_pallas.attention.attention`."""
    mask = attention_mask(
        q_BLQH.shape[1],
        k_BSKH.shape[1],
        causal=causal,
        q_offset=q_offset,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
    )
    return masked_attention(q_BLQH, k_BSKH, v_BSKH, mask, scale)
