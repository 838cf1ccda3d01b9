"""Row gathers inside a kernel: one DMA per row, a tile ahead of its use.

Memory addresses single rows of 32-bit arrays only, so 16-bit rows travel two values to a word:
column c of the first half with column c of the second.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

UNROLL = 8
"""Tiles have a multiple of this many rows."""


def pack(x_TK: jax.Array) -> jax.Array:
    """What rows are gathered from: float32 as it is, 16-bit floats as uint32 [T, K / 2]."""
    if x_TK.dtype == jnp.float32:
        return x_TK
    half = x_TK.shape[1] // 2
    low, high = (
        jax.lax.bitcast_convert_type(part, jnp.uint16).astype(jnp.uint32)
        for part in (x_TK[:, :half], x_TK[:, half:])
    )
    return low | (high << 16)


def unpack(words: jax.Array, dtype) -> tuple[jax.Array, ...]:
    """Columns of packed rows as `dtype`: one array of a float32 source, two halves of another."""
    if words.dtype == jnp.float32:
        return (words.astype(dtype),)
    low = jax.lax.bitcast_convert_type(words << 16, jnp.float32)
    high = jax.lax.bitcast_convert_type(words & jnp.uint32(0xFFFF0000), jnp.float32)
    return low.astype(dtype), high.astype(dtype)


@dataclasses.dataclass(frozen=True)
class Gather:
    """Two slots of a tile of packed rows each: one being read, one being filled."""

    source: jax.Array
    """Packed rows in HBM."""
    rows: jax.Array
    """SMEM [1, R]: which rows the current tile has, and `next_rows` the tile after."""
    next_rows: jax.Array
    slots: jax.Array
    """VMEM [2, R, W]."""
    semaphores: jax.Array

    @property
    def size(self) -> int:
        return self.slots.shape[1]

    def start_all(self, rows, slot) -> None:
        """Starts the copies of a tile's rows, about 7 bundles each."""

        def some(index, carry):
            for offset in range(UNROLL):
                row = index * UNROLL + offset
                pltpu.make_async_copy(
                    self.source.at[pl.ds(rows[0, row], 1)],
                    self.slots.at[slot, pl.ds(row, 1)],
                    self.semaphores.at[slot],
                ).start()
            return carry

        jax.lax.fori_loop(0, self.size // UNROLL, some, None)

    def wait(self, slot) -> None:
        """Until a whole tile has arrived: the copies' bytes are counted together."""
        whole = self.slots.at[slot]
        pltpu.make_async_copy(whole, whole, self.semaphores.at[slot]).wait()


@dataclasses.dataclass(frozen=True)
class GatherInputs:
    """What a `pallas_call` needs for a gather: operands, and scratch memory."""

    inputs: list[tuple[jax.Array, pl.BlockSpec]]
    scratch: list[Any]


def gather_inputs(
    source: jax.Array, rows_t1R: jax.Array, tile_index: Callable[..., jax.Array]
) -> GatherInputs:
    """Operands in the order of `Gather`'s first fields, and its slots and semaphores.

    Args:
      source: packed rows [T, W].
      rows_t1R: int32 [tiles, 1, R]; those beyond the source are clipped.
      tile_index: from the arguments of an index map to the step's tile.
    """
    tiles, _, size = rows_t1R.shape
    rows_t1R = jnp.clip(rows_t1R, 0, source.shape[0] - 1)

    def spec(ahead: int) -> pl.BlockSpec:
        def index(*args):
            return jnp.minimum(tile_index(*args) + ahead, tiles - 1), 0, 0

        return pl.BlockSpec((None, 1, size), index, memory_space=pltpu.SMEM)

    return GatherInputs(
        inputs=[
            # Not pl.ANY: XLA may place that in VMEM, where a row's copy is loads and stores.
            (source, pl.BlockSpec(memory_space=pltpu.HBM)),
            (rows_t1R, spec(0)),
            (rows_t1R, spec(1)),
        ],
        scratch=[
            pltpu.VMEM((2, size, source.shape[1]), source.dtype),
            pltpu.SemaphoreType.DMA((2,)),
        ],
    )
