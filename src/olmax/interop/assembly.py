"""Building parameters on their devices out of a checkpoint's tensors, block by block.

Every parameter is allocated once, on the devices it belongs to. Tensors are read in blocks of a few
megabytes that are transposed, cast and written into their slot on the device, in place. The host
holds one block at a time, and no collective runs: hosts need not keep in step.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from olmax.interop import layout
from olmax.interop.layout import Piece
from olmax.interop.tensor_files import TensorFiles
from olmax.models.config import DecoderConfig


@dataclasses.dataclass
class _Shard:
    """What one device holds of a parameter."""

    device: Any
    """The jax device; None: wherever jax puts arrays by default."""
    region: dict[str, tuple[int, int]]
    """(start, stop) of every dimension letter, in the parameter's order."""
    array: jax.Array


class Assembly:
    """The parameters of one model under construction."""

    def __init__(self, config: DecoderConfig, dtype: str, shardings: Mapping[str, Sharding | None]):
        """Parameters get `dtype` and the sharding under their path (none: default device)."""
        self._config = config
        self._sizes = layout.sizes(config)
        self._dtype = jnp.dtype(dtype)
        self._shardings = shardings
        self._shards: dict[str, list[_Shard]] = {}

    def write(self, files: TensorFiles, name: str, first_row: int, piece: Piece) -> None:
        """Copies one piece of a stored tensor, which begins at `first_row`, into its parameter."""
        shards = self._shards.setdefault(piece.param, [])
        if not shards:
            shards.extend(self._allocate(piece.param))
        if piece.layer is not None:
            shards = [shard for shard in shards if _holds(shard, "N", piece.layer)]
        if piece.expert is not None:
            shards = [shard for shard in shards if _holds(shard, "E", piece.expert)]
        sizes = {**self._sizes, "C": piece.fused[1]}
        lead = piece.axes[0]
        # Rows of the file for one step along the leading letter.
        step = math.prod(sizes[letter] for letter in piece.dims.split(",")[0][1:])
        inner = [sizes[letter] for letter in piece.axes[1:]]
        # Devices with the same range of the leading letter share what is read.
        for span in sorted({shard.region[lead] for shard in shards}):
            sharing = [shard for shard in shards if shard.region[lead] == span]
            rows = (first_row + edge * step for edge in span)
            for row, block in files.blocks(name, *rows, multiple=step):
                block = block.reshape(-1, *inner)
                for shard in sharing:
                    _place(shard, block, (row - first_row) // step, piece)
                # Without waiting, blocks would pile up in front of the device.
                jax.block_until_ready([shard.array for shard in sharing])

    def finish(self, param: str) -> jax.Array:
        """The finished parameter; it is gone from here."""
        shards = self._shards.pop(param)
        sharding = self._shardings.get(param)
        if sharding is None:
            return shards[0].array
        return jax.make_array_from_single_device_arrays(
            self._shape(param), sharding, [shard.array for shard in shards]
        )

    def _shape(self, param: str) -> tuple[int, ...]:
        fused = self._config.group_size + 2 if param == "blocks.attention.qkv" else 2
        return tuple(
            fused if letter == "C" else self._sizes[letter] for letter in layout.PARAMETERS[param]
        )

    def _allocate(self, param: str) -> list[_Shard]:
        shape, letters = self._shape(param), layout.PARAMETERS[param]
        sharding = self._shardings.get(param)
        places = {None: (slice(None),) * len(shape)}
        if sharding is not None:
            places = sharding.addressable_devices_indices_map(shape)
        shards = []
        for device, index in places.items():
            spans = [part.indices(n)[:2] for part, n in zip(index or (), shape, strict=True)]
            zeros = jnp.zeros([stop - start for start, stop in spans], self._dtype, device=device)
            shards.append(_Shard(device, dict(zip(letters, spans, strict=True)), zeros))
        return shards


def _holds(shard: _Shard, letter: str, index: int) -> bool:
    start, stop = shard.region[letter]
    return start <= index < stop


def _place(shard: _Shard, block: np.ndarray, offset: int, piece: Piece) -> None:
    """Writes the shard's part of a block that begins at `offset` along its leading letter."""
    lead = piece.axes[0]
    # The block is inside the shard's range of the leading letter, and a fused axis is never cut.
    cut = [slice(None) if x in (lead, "C") else slice(*shard.region[x]) for x in piece.axes]
    block = np.ascontiguousarray(block[tuple(cut)])
    target = {"N": piece.layer or 0, "C": piece.fused[0], lead: offset}
    if piece.expert is not None:
        target["E"] = piece.expert
    starts = tuple(np.int32(target.get(x, first) - first) for x, (first, _) in shard.region.items())
    shard.array = _write(
        shard.array,
        block if shard.device is None else jax.device_put(block, shard.device),
        starts,
        permutation=tuple(piece.axes.index(x) for x in shard.region if x in piece.axes),
        new_axes=tuple(i for i, x in enumerate(shard.region) if x not in piece.axes),
    )


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("permutation", "new_axes"))
def _write(array, block, starts, *, permutation, new_axes):
    # The donated array is updated in place; the position is an argument, so that one compilation
    # serves every layer.
    block = jnp.expand_dims(jnp.transpose(block, permutation), new_axes).astype(array.dtype)
    return jax.lax.dynamic_update_slice(array, block, starts)
