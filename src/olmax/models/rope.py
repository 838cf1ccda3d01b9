"""Rotary position embedding, rotate-half layout, with Llama 3.1's frequency scaling. Everything in
float32.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from olmax.models.config import Llama3RopeScaling


def inverse_frequencies(
    head_dim: int, theta: float, scaling: Llama3RopeScaling | None = None
) -> np.ndarray:
    """Angles per position, float32 [head_dim / 2].

    Without scaling theta^(-2i / head_dim). Llama 3.1 divides the slow frequencies by `factor`,
    keeps the fast ones and interpolates between, by wavelength against the original context length.
    """
    inv_freq = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        wavelength = 2 * math.pi / inv_freq
        rotations = scaling.original_max_position_embeddings / wavelength
        smooth = (rotations - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        smooth = np.clip(smooth, 0.0, 1.0)
        inv_freq = smooth * inv_freq + (1 - smooth) * inv_freq / scaling.factor
    return inv_freq.astype(np.float32)


def rotation(positions_BL: jax.Array, inv_freq: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every angle, float32 [B, L, 1, H / 2]."""
    angles = positions_BL.astype(jnp.float32)[..., None, None] * inv_freq
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [B, L, heads, H]: the pair of component i is i + H/2. float32 inside, result in x's
    dtype.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)
