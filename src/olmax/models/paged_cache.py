"""Key/value cache in pages: every sequence has its own length and takes memory for that alone."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from kernels_pallas.paged_attention import paged_attention
from olmax.models.annotations import per_device
from olmax.models.config import DecoderConfig

PAGES = (None, "batch", None, "kv_heads")
"""Logical axes of the pages [N, P, S, C]: a device holds the pages of its own sequences."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class PagedCache:
    """Keys and values of the tokens seen so far, in pages of S tokens, heads side by side
    (C = K * H).

    Sequence b's token t lies in slot t % S of page `table_BT[b, t // S]`. On a mesh that cuts the
    batch, page numbers count from the first page of the sequence's own device.
    """

    k_NPSC: jax.Array
    v_NPSC: jax.Array
    table_BT: jax.Array
    """int32; a number beyond the pages where a sequence has none."""
    lengths_B: jax.Array
    """int32: tokens of every sequence."""

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.k_NPSC.shape[2]

    @property
    def stored(self) -> tuple[jax.Array, jax.Array]:
        """What the layers write to."""
        return self.k_NPSC, self.v_NPSC

    def marked(self, segment_ids_BL: jax.Array) -> Self:
        """Itself: nothing need be known before the tokens come."""
        del segment_ids_BL
        return self

    def layer(self, stored, number, segment_ids_BL, *, empty: bool) -> "PagedLayer":
        """The part of layer `number`, int32 scalar, of what the layers before have `stored`."""
        k_NPSC, v_NPSC = stored
        return PagedLayer(
            k_NPSC, v_NPSC, number, self.table_BT, self.lengths_B, segment_ids_BL != 0, empty
        )

    def grown(self, stored, segment_ids_BL: jax.Array) -> Self:
        """The cache after all layers."""
        k_NPSC, v_NPSC = stored
        real_B = jnp.sum(segment_ids_BL != 0, axis=1, dtype=jnp.int32)
        return dataclasses.replace(
            self, k_NPSC=k_NPSC, v_NPSC=v_NPSC, lengths_B=self.lengths_B + real_B
        )


@dataclasses.dataclass
class PagedLayer:
    """One layer's part of a cache while new tokens are read: all layers' pages, written in place.

    `real_BL` is False where a token is padding: it is written nowhere. Where several new tokens a
    sequence come (a prompt, in pieces), all sequences that get real ones have the same length.
    """

    k_NPSC: jax.Array
    v_NPSC: jax.Array
    layer: jax.Array
    """int32 scalar."""
    table_BT: jax.Array
    lengths_B: jax.Array
    """int32: tokens before the new ones."""
    real_BL: jax.Array
    empty: bool

    @property
    def stored(self) -> tuple[jax.Array, jax.Array]:
        """See `PagedCache.stored`."""
        return self.k_NPSC, self.v_NPSC

    @property
    def start(self) -> jax.Array | int:
        """Number of a prompt's first new token; a Python 0 where the cache is known to be empty."""
        if self.empty:
            return 0
        return jnp.max(jnp.where(self.real_BL[:, 0], self.lengths_B, 0))

    def append(
        self, k_BLKH: jax.Array, v_BLKH: jax.Array
    ) -> tuple["PagedLayer", jax.Array, jax.Array]:
        """The cache with the new tokens, and the keys and values [B, S, K, H] that a prompt's
        tokens may see; just the new ones when there is one a sequence (see `attend`).
        """
        grown = dataclasses.replace(
            self,
            k_NPSC=self._write(self.k_NPSC, k_BLKH),
            v_NPSC=self._write(self.v_NPSC, v_BLKH),
        )
        if self.empty or self.decodes:
            return grown, k_BLKH.astype(self.k_NPSC.dtype), v_BLKH.astype(self.v_NPSC.dtype)
        return grown, grown._gather(grown.k_NPSC, k_BLKH), grown._gather(grown.v_NPSC, v_BLKH)

    @property
    def decodes(self) -> bool:
        """Whether there is one new token a sequence."""
        return self.real_BL.shape[1] == 1

    def attend(self, q_BKGH: jax.Array) -> jax.Array:
        """Attention of one new query a sequence over its tokens, the new one among them; zeros
        where the new token is padding.
        """
        lengths_B = jnp.where(self.real_BL[:, 0], self.lengths_B + 1, 0)

        def local(q_BKGH, k_NPSC, v_NPSC, table_BT, lengths_B, layer):
            pages = k_NPSC.shape[1]
            # The layers' pages one behind another: cutting a layer out would copy it.
            out_BQH = paged_attention(
                q_BKGH.reshape(q_BKGH.shape[0], -1, q_BKGH.shape[-1]),
                k_NPSC.reshape(-1, *k_NPSC.shape[2:]),
                v_NPSC.reshape(-1, *v_NPSC.shape[2:]),
                lengths_B,
                jnp.minimum(table_BT, pages - 1) + layer * pages,
            )
            return out_BQH.reshape(q_BKGH.shape)

        axes = [("batch", "kv_heads", None, None), PAGES, PAGES, ("batch", None), ("batch",), ()]
        return per_device(
            local,
            axes,
            q_BKGH.astype(self.k_NPSC.dtype),
            self.k_NPSC,
            self.v_NPSC,
            self.table_BT,
            lengths_B,
            self.layer,
        ).astype(q_BKGH.dtype)

    def _write(self, pages_NPSC: jax.Array, x_BLKH: jax.Array) -> jax.Array:
        page_size = pages_NPSC.shape[2]
        token_BL = self.lengths_B[:, None] + jnp.arange(x_BLKH.shape[1])

        def local(pages_NPSC, x_BLKH, table_BT, token_BL, real_BL, layer):
            page_BL = jnp.take_along_axis(table_BT, token_BL // page_size, axis=1, mode="clip")
            # Beyond the last page: dropped.
            page_BL = jnp.where(real_BL, page_BL, pages_NPSC.shape[1])
            x_BLC = x_BLKH.reshape(*x_BLKH.shape[:2], -1).astype(pages_NPSC.dtype)
            return pages_NPSC.at[layer, page_BL, token_BL % page_size].set(x_BLC, mode="drop")

        rows = ("batch", None)
        axes = [PAGES, (*rows, "kv_heads", None), rows, rows, rows, ()]
        arguments = (pages_NPSC, x_BLKH, self.table_BT, token_BL, self.real_BL, self.layer)
        return per_device(local, axes, *arguments)

    def _gather(self, pages_NPSC: jax.Array, like_BLKH: jax.Array) -> jax.Array:
        """All tokens of every sequence [B, S, K, H]; anything where it has none."""

        def local(_, pages_NPSC, table_BT, layer):
            x_BTSC = pages_NPSC.at[layer, table_BT].get(mode="clip")
            return x_BTSC.reshape(table_BT.shape[0], -1, pages_NPSC.shape[3])

        rows = ("batch", None)
        # The new tokens only say how the result lies on a mesh.
        like_BLC = like_BLKH.reshape(*like_BLKH.shape[:2], -1)
        axes = [(*rows, "kv_heads"), PAGES, rows, ()]
        x_BSC = per_device(local, axes, like_BLC, pages_NPSC, self.table_BT, self.layer)
        return x_BSC.reshape(*x_BSC.shape[:2], *like_BLKH.shape[2:])


def init_paged_cache(
    config: DecoderConfig, table_BT: jax.Array, pages: int, page_size: int, dtype: str = "float32"
) -> PagedCache:
    """An empty cache of `pages` pages for the sequences of the page table."""
    shape = (config.n_layers, pages, page_size, config.n_kv_heads * config.head_dim)
    return PagedCache(
        k_NPSC=jnp.zeros(shape, dtype),
        v_NPSC=jnp.zeros(shape, dtype),
        table_BT=table_BT,
        lengths_B=jnp.zeros(table_BT.shape[0], jnp.int32),
    )
