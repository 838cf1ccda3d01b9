"""Definition of attention in plain jnp: every score is materialised."""

import jax
import jax.numpy as jnp

from kernels_pallas.attention import masks


def attention(
    q_BLQH, k_BSKH, v_BSKH, *, shape: masks.Shape, ids: masks.Ids, scale: float
) -> tuple[jax.Array, jax.Array]:
    """See `kernels_pallas.attention.attention`. Returns the output and the log-sum-exp [B, Q, L];
    scores and softmax are float32.
    """
    batch, q_len, q_heads, head_dim = q_BLQH.shape
    kv_heads = k_BSKH.shape[2]
    q_BLKGH = q_BLQH.reshape(batch, q_len, kv_heads, q_heads // kv_heads, head_dim)
    scores_BKGLS = (
        jnp.einsum("blkgh,bskh->bkgls", q_BLKGH, k_BSKH, preferred_element_type=jnp.float32) * scale
    )
    seen = masks.dense(shape, ids, slice(0, q_len), slice(0, k_BSKH.shape[1]))
    if seen is not None:
        scores_BKGLS = jnp.where(seen[:, None, None], scores_BKGLS, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(scores_BKGLS, axis=-1, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(scores_BKGLS - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    safe_total = jnp.where(total == 0, 1.0, total)
    probabilities = (weights / safe_total).astype(v_BSKH.dtype)
    out_BLKGH = jnp.einsum(
        "bkgls,bskh->blkgh", probabilities, v_BSKH, preferred_element_type=jnp.float32
    )
    lse_BKGL = jnp.where(total == 0, -jnp.inf, top + jnp.log(safe_total))[..., 0]
    out_BLQH = out_BLKGH.reshape(batch, q_len, q_heads, head_dim).astype(q_BLQH.dtype)
    return out_BLQH, lse_BKGL.reshape(batch, q_heads, q_len)


def gradients(
    q_BLQH, k_BSKH, v_BSKH, out_BLQH, lse_BQL, d_out_BLQH, *, shape, ids, scale
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk, dv in float32, where the softmax may run over more keys than these: `out_BLQH` and
    `lse_BQL` are those of all of them.
    """
    batch, q_len, q_heads, head_dim = q_BLQH.shape
    kv_heads = k_BSKH.shape[2]
    grouped = (batch, q_len, kv_heads, q_heads // kv_heads, head_dim)
    q_BLKGH, out_BLKGH, d_out_BLKGH = (
        x.reshape(grouped).astype(jnp.float32) for x in (q_BLQH, out_BLQH, d_out_BLQH)
    )
    k_BSKH, v_BSKH = k_BSKH.astype(jnp.float32), v_BSKH.astype(jnp.float32)
    scores_BKGLS = jnp.einsum("blkgh,bskh->bkgls", q_BLKGH, k_BSKH) * scale
    lse_BKGL1 = lse_BQL.reshape(batch, kv_heads, -1, q_len, 1)
    weights_BKGLS = jnp.exp(scores_BKGLS - jnp.where(jnp.isneginf(lse_BKGL1), jnp.inf, lse_BKGL1))
    seen = masks.dense(shape, ids, slice(0, q_len), slice(0, k_BSKH.shape[1]))
    if seen is not None:
        weights_BKGLS = jnp.where(seen[:, None, None], weights_BKGLS, 0.0)
    delta_BLKG = jnp.sum(d_out_BLKGH * out_BLKGH, axis=-1)
    d_weights_BKGLS = jnp.einsum("blkgh,bskh->bkgls", d_out_BLKGH, v_BSKH)
    delta_BKGL1 = jnp.transpose(delta_BLKG, (0, 2, 3, 1))[..., None]
    d_scores_BKGLS = weights_BKGLS * (d_weights_BKGLS - delta_BKGL1) * scale
    dq_BLKGH = jnp.einsum("bkgls,bskh->blkgh", d_scores_BKGLS, k_BSKH)
    dk_BSKH = jnp.einsum("bkgls,blkgh->bskh", d_scores_BKGLS, q_BLKGH)
    dv_BSKH = jnp.einsum("bkgls,blkgh->bskh", weights_BKGLS, d_out_BLKGH)
    return dq_BLKGH.reshape(q_BLQH.shape), dk_BSKH, dv_BSKH
