"""Key/value cache for generation."""

import dataclasses

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
