"""Rotary position embedding, rotate-half layout, with Llama 3.1's frequency scaling. Everything in
float32.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from kernels_pallas.xla_tpu import on_tpu
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


@jax.custom_vjp
def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [B, L, heads, H]: the pair of component i is i + H/2. float32 inside, result in x's
    dtype. `cos` and `sin` are constants to differentiation.
    """
    return on_tpu(_rotate_on_tpu, _rotate, x, cos, sin)


def _rope_forward(x, cos, sin):
    return apply_rope(x, cos, sin), (cos, sin)


def _rope_backward(residuals, dy):
    cos, sin = residuals
    # The transpose of a rotation is the rotation back.
    return apply_rope(dy, cos, -sin), jnp.zeros_like(cos), jnp.zeros_like(sin)


apply_rope.defvjp(_rope_forward, _rope_backward)


def _rotate(x, cos, sin):
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)


def _rotate_on_tpu(x, cos, sin):
    """The same with the halves exchanged by a product with a signed permutation, which is exact:
    the vector unit would take several passes over memory to move half a register.
    """
    # As attention reads it: XLA would turn recomputed heads to suit the weight gradients, and back.
    x = with_layout_constraint(x, Layout((0, 2, 1, 3)))
    half = x.shape[-1] // 2
    swap_HH = np.zeros((2 * half, 2 * half), np.float32)
    swap_HH[np.arange(half) + half, np.arange(half)] = -1
    swap_HH[np.arange(half), np.arange(half) + half] = 1
    exact = None if x.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    swapped = jnp.matmul(
        x, swap_HH.astype(x.dtype), precision=exact, preferred_element_type=jnp.float32
    )
    cos, sin = (jnp.concatenate([y, y], axis=-1) for y in (cos, sin))
    return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)
