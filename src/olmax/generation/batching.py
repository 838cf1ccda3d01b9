"""Shapes and placement of batches that scoring and generation run.

Every distinct shape is compiled once, so lengths and row counts are rounded up to a few sizes.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from olmax import sharding
from olmax.errors import UserError
from olmax.models.config import DecoderConfig
from olmax.models.decoder import Decoder


def bucket(n: int, *, minimum: int = 1) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least `n` and `minimum`."""
    n = max(n, minimum)
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if power >= 4 and power * 3 // 4 >= n else power


def length_bucket(n: int, config: DecoderConfig, mesh: Mesh | None) -> int:
    """Padded length for rows of up to `n` tokens: a bucket, but not beyond the model's context, and
    a multiple of the mesh's context axis.
    """
    context = 1 if mesh is None else mesh.shape["context"]
    length = max(n, min(bucket(n, minimum=16), config.max_seq_len))
    return -(-length // context) * context


def row_bucket(n: int, mesh: Mesh | None) -> int:
    """Padded number of rows for `n` rows: a power of two times the pieces a batch is cut into."""
    shards = 1 if mesh is None else sharding.batch_shards(mesh)
    return shards << (-(-n // shards) - 1).bit_length()


def mesh_of(model: Decoder) -> Mesh | None:
    """The mesh that a model's parameters lie on; None on a single device."""
    placed = model.embedder.embedding[...].sharding
    return placed.mesh if isinstance(placed, NamedSharding) and placed.mesh.size > 1 else None  # type: ignore[return-value]


def place(x: np.ndarray, mesh: Mesh | None, *, batch_only: bool = False) -> jax.Array:
    """A batch [B, L, ...] on the devices: rows over the batch axes, and the length over the context
    axis unless `batch_only`. Every process gives the same whole array.
    """
    if mesh is None:
        return jax.numpy.asarray(x)
    placement = sharding.batch_sharding(mesh, 1 if batch_only else x.ndim)
    return jax.make_array_from_callback(x.shape, placement, lambda index: x[index])


def as_ids(ids: Sequence[int] | np.ndarray, config: DecoderConfig, what: str) -> np.ndarray:
    """`ids` as int32 [L].

    Raises:
      UserError: not integers, or outside the model's vocabulary; `what` says whose they are.
    """
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise UserError(f"{what}: token ids must be a flat list of integers")
    bad = array[(array < 0) | (array >= config.vocab_size)]
    if bad.size:
        raise UserError(
            f"{what}: token id {bad[0]} is outside the model's vocabulary of {config.vocab_size}; "
            "was it made by another tokenizer?"
        )
    return array.astype(np.int32)
