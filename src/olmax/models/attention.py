"""Self-attention: fused qkv projection, optional full-width QK-norm, RoPE, grouped heads, optional
KV cache.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.attention import PER_DEVICE, attention, choose, ring_attention
from kernels_pallas.xla_cpu import apart
from kernels_pallas.xla_tpu import on_tpu
from olmax.models import parameters
from olmax.models.annotations import annotate, mesh_axes, per_device
from olmax.models.config import DecoderConfig, Execution
from olmax.models.kv_cache import LayerCache
from olmax.models.linear import project
from olmax.models.norm import RMSNorm
from olmax.models.paged_cache import PagedLayer
from olmax.models.rope import apply_rope


class Attention(nnx.Module):
    """Causal grouped-query self-attention of every layer (parameters stacked on the leading `stack`
    dimensions).
    """

    def __init__(self, config: DecoderConfig, execution: Execution, *, stack=(), rngs: nnx.Rngs):
        self.config = config
        self.execution = execution
        d, k, g, h = config.d_model, config.n_kv_heads, config.group_size, config.head_dim
        dtype = execution.param_dtype
        if config.init == "scaled":
            in_std, out_std = (
                parameters.fan_in_std(d),
                parameters.depth_scaled_std(d, config.n_layers, len(stack) + 4),
            )
        else:
            in_std = out_std = config.init_std
        self.qkv = parameters.param(
            rngs,
            parameters.truncated_normal(in_std),
            [*stack, (d, "embed"), (k, "kv_heads"), (g + 2, None), (h, None)],
            dtype,
        )
        self.out = parameters.param(
            rngs,
            parameters.truncated_normal(out_std),
            [*stack, (k, "kv_heads"), (g, None), (h, None), (d, "embed")],
            dtype,
        )
        if config.qk_norm == "full":
            norm: Any = dict(eps=config.norm_eps, stack=stack, param_dtype=dtype, rngs=rngs)
            self.q_norm = RMSNorm([(k, "kv_heads"), (g, None), (h, None)], **norm)
            self.k_norm = RMSNorm([(k, "kv_heads"), (h, None)], **norm)

    def __call__(
        self,
        x_BLD: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        segment_ids_BL: jax.Array | None = None,
        cache: LayerCache | PagedLayer | None = None,
        subsegment_ids_BL: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | PagedLayer | None]:
        """Attention output [B, L, D], and the cache with the new tokens when there is one.
        `subsegment_ids_BL` is for passes without a cache.
        """
        batch, length, _ = x_BLD.shape
        heads = checkpoint_name(project_heads(x_BLD, self.qkv[...]), "qkv")
        q_BLKGH = annotate(heads[0], ("batch", "length", "kv_heads", None, None))
        k_BLKH, v_BLKH = (annotate(y, ("batch", "length", "kv_heads", None)) for y in heads[1:])
        if self.config.qk_norm == "full":
            q_BLKGH, k_BLKH = self.q_norm(q_BLKGH), self.k_norm(k_BLKH)
        q_BLQH = apply_rope(q_BLKGH.reshape(batch, length, self.config.n_heads, -1), *rotation)
        k_BLKH = apply_rope(k_BLKH, *rotation)

        q_offset = 0
        kv_segment_ids_BS = segment_ids_BL
        if cache is not None:
            q_offset = cache.start
            cache, k_BLKH, v_BLKH = cache.append(k_BLKH, v_BLKH)
            k_BLKH, v_BLKH = k_BLKH.astype(q_BLQH.dtype), v_BLKH.astype(q_BLQH.dtype)
            if isinstance(cache, PagedLayer):
                # A prompt's padding comes last, where its tokens do not see it.
                segment_ids_BL = kv_segment_ids_BS = None
            else:
                kv_segment_ids_BS = cache.segment_ids_BS[:, : k_BLKH.shape[1]]

        if isinstance(cache, PagedLayer) and length == 1:
            o_BLKGH = cache.attend(q_BLQH.reshape(q_BLKGH.shape)[:, 0])[:, None]
        else:
            o_BLKGH = self._attend(
                q_BLQH,
                k_BLKH,
                v_BLKH,
                q_offset,
                {"segment_ids": (segment_ids_BL, kv_segment_ids_BS)}
                | {"subsegment_ids": (subsegment_ids_BL, subsegment_ids_BL)},
                cache is not None,
            )
        o_BLKGH = checkpoint_name(o_BLKGH, "attention_output")
        o_BLKGH = annotate(o_BLKGH, ("batch", "length", "kv_heads", None, None))
        return project(o_BLKGH, self.out[...], contract=3), cache

    def _attend(self, q_BLQH, k_BSKH, v_BSKH, q_offset, ids, cached):
        """Causal attention by the implementation chosen, per device where it must be. `ids` are the
        pairs of [B, L] and [B, S] that `attention` takes as `q_<name>` and `kv_<name>`.
        """
        implementation = self.execution.attention
        if implementation is None or not isinstance(q_offset, int):
            # Decoding at a place known only at run time is beyond most implementations.
            implementation = choose(
                q_BLQH.shape, k_BSKH.shape, causal=True, q_offset=q_offset, dtype=q_BLQH.dtype
            )

        ids = {name: pair for name, pair in ids.items() if pair[0] is not None}

        def attend(q_BLKGH, k_BSKH, v_BSKH, *flat):
            batch, length, k, g, h = q_BLKGH.shape
            names = [side + name for name in ids for side in ("q_", "kv_")]
            o_BLQH = attention(
                q_BLKGH.reshape(batch, length, k * g, h),
                k_BSKH,
                v_BSKH,
                causal=True,
                q_offset=q_offset,
                **dict(zip(names, flat, strict=True)),
                implementation=implementation,
            )
            return o_BLQH.reshape(q_BLKGH.shape)

        axis = mesh_axes("length", q_BLQH.shape[1])
        ring = implementation == "pallas_tpu" and len(axis) == 1 and not cached
        length = "length" if ring else None
        if not cached:
            # Under context parallelism queries stay cut along the sequence. Without a ring every
            # device sees all keys.
            k_BSKH = annotate(k_BSKH, ("batch", length, "kv_heads", None))
            v_BSKH = annotate(v_BSKH, ("batch", length, "kv_heads", None))

        # Grouped, so that query heads are never cut away from their key heads.
        q_BLKGH = q_BLQH.reshape(*q_BLQH.shape[:2], k_BSKH.shape[2], -1, q_BLQH.shape[3])
        arrays = (q_BLKGH, k_BSKH, v_BSKH)
        axes = [
            ("batch", length, "kv_heads", None, None),
            *[("batch", length, "kv_heads", None)] * 2,
        ]
        if ring:
            # Queries and keys are the same tokens.
            flat = [pair[0] for pair in ids.values()]
            ring_of = functools.partial(attend_in_ring, names=tuple(ids), axis_name=axis[0])
            return per_device(ring_of, axes + [("batch", length)] * len(flat), *arrays, *flat)
        for pair in ids.values():
            arrays += pair
            axes += [("batch", length)] * 2
        if implementation in PER_DEVICE:
            return per_device(attend, axes, *arrays)
        return attend(*arrays)


def attend_in_ring(q_BLKGH, k_BLKH, v_BLKH, *ids, names: tuple[str, ...], axis_name: str):
    """Causal self-attention of this device's part of a sequence that is cut along a mesh axis;
    `names` are those of `ids`, [B, L] each.
    """
    batch, length, k, g, h = q_BLKGH.shape
    o_BLQH = ring_attention(
        q_BLKGH.reshape(batch, length, k * g, h),
        k_BLKH,
        v_BLKH,
        axis_name=axis_name,
        axis_size=jax.lax.axis_size(axis_name),
        **dict(zip(names, ids, strict=True)),
    )
    return o_BLQH.reshape(q_BLKGH.shape)


@jax.custom_vjp
def project_heads(
    x_BLD: jax.Array, kernel_DKCH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, L, K, G, H], keys and values [B, L, K, H]."""
    return on_tpu(_project_apart, _project_fused, x_BLD, kernel_DKCH)


def _project_forward(x_BLD, kernel_DKCH):
    return project_heads(x_BLD, kernel_DKCH), (x_BLD, kernel_DKCH)


def _project_backward(residuals, gradients):
    def pull_back(project_some):
        return lambda x, kernel, dy: jax.vjp(project_some, x, kernel)[1](dy)

    return on_tpu(pull_back(_project_apart), pull_back(_project_fused), *residuals, gradients)


project_heads.defvjp(_project_forward, _project_backward)


def _project_apart(x_BLD, kernel_DKCH):
    """Three products: each gives its heads in the order of the attention kernel, which XLA's TPU
    backend otherwise takes a pass over memory for, here and again for the gradients.
    """
    heads_DQH = kernel_DKCH[:, :, :-2].reshape(kernel_DKCH.shape[0], -1, kernel_DKCH.shape[3])
    q_BLQH = project(x_BLD, heads_DQH)
    return (
        q_BLQH.reshape(*x_BLD.shape[:2], kernel_DKCH.shape[1], -1, kernel_DKCH.shape[3]),
        project(x_BLD, kernel_DKCH[:, :, -2]),
        project(x_BLD, kernel_DKCH[:, :, -1]),
    )


def _project_fused(x_BLD, kernel_DKCH):
    return split_heads(project(x_BLD, kernel_DKCH))


@jax.custom_vjp
def split_heads(qkv_BLKCH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, L, K, G, H], keys and values [B, L, K, H] of the fused projection."""
    return qkv_BLKCH[..., :-2, :], qkv_BLKCH[..., -2, :], qkv_BLKCH[..., -1, :]


def _split_forward(qkv_BLKCH):
    return split_heads(qkv_BLKCH), None


def _split_backward(_, gradients):
    # Fused into the joining they would be computed element by element, with all that leads to them.
    dq_BLKGH, dk_BLKH, dv_BLKH = apart(gradients)
    dk_dv_BLKCH = jnp.stack((dk_BLKH, dv_BLKH), axis=-2)
    return (jnp.concatenate((dq_BLKGH, dk_dv_BLKCH), axis=-2),)


split_heads.defvjp(_split_forward, _split_backward)
