"""Causal self-attention on TPUs by jax's own splash kernel: blockwise softmax in VMEM, nothing of
size L x L in HBM, blocks above the diagonal skipped. What `pallas_tpu` is compared with.

It is a per-device program: the compiler cannot cut it over a mesh, so a caller whose arrays are
sharded calls it inside `jax.shard_map` with batch and heads cut and the sequence whole.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.attention import masks

LANES = 128
BLOCK = 512


def unsupported(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], *, causal: bool, q_offset: jax.Array | int
) -> str | None:
    """Why these arguments cannot be taken, or None."""
    if not causal:
        return "needs causal=True"
    if not isinstance(q_offset, int) or q_offset or q_shape[1] != k_shape[1]:
        return "is for whole sequences: q_offset 0 and as many keys as queries"
    if q_shape[1] % LANES or q_shape[3] % LANES:
        return f"needs sequence length and head width in multiples of {LANES}, got {q_shape}"
    return None


def attention(
    q_BLQH,
    k_BSKH,
    v_BSKH,
    *,
    shape: masks.Shape,
    ids: masks.Ids,
    scale: float,
    need_lse: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels_pallas.attention.attention`. The log-sum-exp is empty.

    `interpret` runs the kernel without a TPU.
    """
    reason = unsupported(
        q_BLQH.shape, k_BSKH.shape, causal=shape.causal, q_offset=shape.q_offset or 0
    )
    if shape.window is not None or ids.subsegments is not None or ids.mask is not None or need_lse:
        reason = "takes no window, subsegments, mask or return_lse"
    if reason:
        raise ValueError(f"attention: implementation 'splash' {reason}")
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    _, length, heads, _ = q_BLQH.shape
    kernel = _kernel(length, heads, interpret)
    # The kernel takes scores as they are, so the queries carry the scale.
    q_BQLH = jnp.swapaxes(q_BLQH * jnp.asarray(scale, q_BLQH.dtype), 1, 2)
    k_BKSH, v_BKSH = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
    if ids.segments is None:
        out_BQLH = jax.vmap(kernel)(q_BQLH, k_BKSH, v_BKSH)
    else:
        segment_ids = splash_attention_kernel.SegmentIds(*ids.segments)
        out_BQLH = jax.vmap(kernel)(q_BQLH, k_BKSH, v_BKSH, segment_ids)
    out_BLQH = jnp.swapaxes(jnp.asarray(out_BQLH), 1, 2)
    no_lse = jnp.zeros((0,), jnp.float32)
    if ids.segments is None:
        return out_BLQH, no_lse
    # Inside the kernel padding is a segment like any other and sees itself.
    return jnp.where((ids.segments[0] != 0)[:, :, None, None], out_BLQH, 0), no_lse


def _kernel(length: int, heads: int, interpret: bool):
    # Imported late: it is slow to import, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    block = next(size for size in (BLOCK, BLOCK // 2, LANES) if length % size == 0)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    causal = splash_attention_mask.CausalMask((length, length))
    mask = splash_attention_mask.MultiHeadMask([causal] * heads)
    return splash_attention_kernel.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
