"""Checksums of arrays, computed where the arrays lie.

Array files have no checksums of their own, so a flipped bit would be restored without notice. A
checksum here depends on the values and their positions alone: not on mesh, hosts or file format.
"""

import jax
import jax.numpy as jnp

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


def _checksum(x: jax.Array) -> jax.Array:
    """Sum of all elements' bit patterns, each times an odd number made of its position, mod 2^32.

    An odd factor is invertible, so any change of a single element of up to 32 bits changes the sum.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    if x.dtype.itemsize == 8:
        x = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize]).astype(jnp.uint32)
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        position = position * jnp.uint32(size % 2**32) + index
    # A mixed position: neighbours' factors must not differ by a constant.
    factor = position * jnp.uint32(2654435761)
    factor = (factor ^ (factor >> 15)) | jnp.uint32(1)
    return jnp.sum(bits * factor, dtype=jnp.uint32)


@jax.jit
def checksums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """uint32 scalar of every array, under the same names."""
    return {name: _checksum(x) for name, x in arrays.items()}
