"""Key/value cache for generation."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from olmax.models.config import DecoderConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class KVCache:
    """Keys and values of the tokens seen so far.

    Sequences of a batch share slots: a write puts every row's new tokens at the same slots, so
    prompts of unequal length are padded on the left and `segment_ids_BS` (0 = padding, 1 = real)
    keeps the padding out of attention.
    """

    k_NBSKH: jax.Array
    v_NBSKH: jax.Array
    segment_ids_BS: jax.Array
    """int32; 0 marks slots that are empty or padding."""
    length: jax.Array
    """int32 scalar: slots written so far."""

    @property
    def capacity(self) -> int:
        """Number of slots S."""
        return self.k_NBSKH.shape[2]

    @property
    def stored(self) -> tuple[jax.Array, jax.Array]:
        """What the layers write to."""
        return self.k_NBSKH, self.v_NBSKH

    def marked(self, segment_ids_BL: jax.Array) -> Self:
        """The cache that knows which of the tokens about to come are real."""
        segment_ids_BS = jax.lax.dynamic_update_slice_in_dim(
            self.segment_ids_BS, segment_ids_BL.astype(jnp.int32), self.length, axis=1
        )
        return dataclasses.replace(self, segment_ids_BS=segment_ids_BS)

    def layer(self, stored, number, segment_ids_BL, *, empty: bool) -> "LayerCache":
        """The part of layer `number`, int32 scalar, of what the layers before have `stored`."""
        del segment_ids_BL
        k_NBSKH, v_NBSKH = stored
        start = 0 if empty else self.length
        return LayerCache(k_NBSKH, v_NBSKH, number, self.segment_ids_BS, start)

    def grown(self, stored, segment_ids_BL: jax.Array) -> Self:
        """The cache after all layers."""
        k_NBSKH, v_NBSKH = stored
        length = self.length + segment_ids_BL.shape[1]
        return dataclasses.replace(self, k_NBSKH=k_NBSKH, v_NBSKH=v_NBSKH, length=length)


@dataclasses.dataclass
class LayerCache:
    """One layer's part of a cache while its tokens are read.

    Holds the keys and values of all layers: they are written in place, where cutting a layer out
    and putting it back would copy it.
    """

    k_NBSKH: jax.Array
    v_NBSKH: jax.Array
    layer: jax.Array
    """int32 scalar."""
    segment_ids_BS: jax.Array
    """Of all slots, those of the new tokens too."""
    start: jax.Array | int
    """Slot of the first new token; a Python 0 where the cache is known to be empty."""

    @property
    def stored(self) -> tuple[jax.Array, jax.Array]:
        """See `KVCache.stored`."""
        return self.k_NBSKH, self.v_NBSKH

    def append(
        self, k_BLKH: jax.Array, v_BLKH: jax.Array
    ) -> tuple["LayerCache", jax.Array, jax.Array]:
        """The cache with the new tokens, and the keys and values [B, S, K, H] they may see.

        S is the capacity, or the new tokens alone where the cache is known to be empty.
        """
        k_BLKH, v_BLKH = k_BLKH.astype(self.k_NBSKH.dtype), v_BLKH.astype(self.v_NBSKH.dtype)
        at = (self.layer, 0, self.start, 0, 0)
        grown = dataclasses.replace(
            self,
            k_NBSKH=jax.lax.dynamic_update_slice(self.k_NBSKH, k_BLKH[None], at),
            v_NBSKH=jax.lax.dynamic_update_slice(self.v_NBSKH, v_BLKH[None], at),
        )
        if isinstance(self.start, int) and self.start == 0:
            return grown, k_BLKH, v_BLKH
        k_BSKH = jax.lax.dynamic_index_in_dim(grown.k_NBSKH, self.layer, keepdims=False)
        v_BSKH = jax.lax.dynamic_index_in_dim(grown.v_NBSKH, self.layer, keepdims=False)
        return grown, k_BSKH, v_BSKH


def init_cache(
    config: DecoderConfig, batch_size: int, capacity: int, dtype: str = "float32"
) -> KVCache:
    """An empty cache for `batch_size` sequences of up to `capacity` tokens."""
    shape = (config.n_layers, batch_size, capacity, config.n_kv_heads, config.head_dim)
    return KVCache(
        k_NBSKH=jnp.zeros(shape, dtype),
        v_NBSKH=jnp.zeros(shape, dtype),
        segment_ids_BS=jnp.zeros((batch_size, capacity), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )
