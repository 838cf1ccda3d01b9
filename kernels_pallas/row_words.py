"""Rows of bfloat16 as memory and links like them: every row a contiguous block of 32-bit words.

An array [M, K] of bfloat16 lies in tiles that hold parts of 16 rows, so whatever moves single rows
(a gather, a ragged exchange between devices) has to bring it into another layout first, and back.
As words, uint32 [M, S, 128] with S = K / 256, a row is whole tiles. Word (s, l) holds columns
128 s + l and K / 2 + 128 s + l. Letter S.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.row_gather import pack, unpack

LANES = 128
MULTIPLE = 2048
"""Rows of so many columns, or several times that, are whole tiles."""


def to_words(x_MK: jax.Array) -> jax.Array:
    """bfloat16 [M, K] as uint32 [M, S, 128]."""
    return pack(x_MK).reshape(x_MK.shape[0], -1, LANES)


def from_words(words_MSL: jax.Array) -> jax.Array:
    """The way back: bfloat16 [M, K]."""
    rows = words_MSL.shape[0]
    return jnp.concatenate(
        [half.reshape(rows, -1) for half in unpack(words_MSL, jnp.bfloat16)], axis=1
    )


def halves(words_MSL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 [M, S, 128] twice: the first and the second half of the columns."""
    low, high = unpack(words_MSL, jnp.float32)
    return low, high


def joined(low_MSL: jax.Array, high_MSL: jax.Array) -> jax.Array:
    """The words of two halves, rounded to bfloat16."""
    low, high = (
        jax.lax.bitcast_convert_type(half.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
        for half in (low_MSL, high_MSL)
    )
    return low | (high << 16)


def sublanes(words: int, rows: int, index: int):
    """Inside a kernel, in a tile [rows * words, 128] of such rows: word block `index` of each."""
    return pl.ds(index, rows, stride=words), slice(None)
