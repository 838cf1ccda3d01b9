"""Paged attention on TPUs: pages come from HBM by DMA while those before them are computed.

A page holds all heads of its tokens side by side, S x (K * H), and is copied as a whole. All heads
are computed in one product: the queries stand in a matrix [Q, K * H] that is zero outside each
head's own columns, so that scores come out as [Q, tokens], dense in registers whatever the number
of heads and their width. The zeros cost nothing: a matrix unit holds the keys, and streams at least
eight rows past them even if only one is of use.

The order of the copies is fixed beforehand: block after block of a sequence, sequence after
sequence, the empty ones left out. Two buffers take turns over all of them, so that the first block
of a sequence is on its way while the last one of the sequence before is computed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import targets

LANES = 128
BUFFER_BYTES = 2**20
"""Of keys fetched at one time, about."""
NEVER = -1e30
"""Score of a token that is not there. Finite, so that no row gives inf - inf."""
SMEM_BYTES = 2**19
"""What the page table may take."""


def unsupported(q: jax.Array, k_pages: jax.Array, page_table: jax.Array) -> str | None:
    """Why these arguments cannot be taken, or None."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 or bfloat16, got q {q.shape} in {q.dtype}"
    rows = 32 // q.dtype.itemsize
    if k_pages.shape[1] % rows:
        return f"needs pages of a multiple of {rows} tokens in {q.dtype}, got {k_pages.shape}"
    if page_table.size * 4 > SMEM_BYTES:
        return f"takes a page_table of {SMEM_BYTES // 4} entries at most, got {page_table.shape}"
    return None


def paged_attention(
    q_BQH: jax.Array,
    k_pages_PSC: jax.Array,
    v_pages_PSC: jax.Array,
    lengths_B: jax.Array,
    table_BT: jax.Array,
    *,
    scale: float,
    interpret: Any = False,
    block_pages: int | None = None,
) -> jax.Array:
    """See `kernels_pallas.paged_attention.paged_attention`. `block_pages`: pages fetched at one
    time; None: as many as `BUFFER_BYTES` takes.
    """
    reason = unsupported(q_BQH, k_pages_PSC, table_BT)
    if reason:
        raise ValueError(f"paged_attention: implementation 'pallas_tpu' {reason}")
    targets.check_tpu("paged_attention", interpret)
    batch, q_heads, head_dim = q_BQH.shape
    _, page_size, width = k_pages_PSC.shape
    page_bytes = page_size * width * k_pages_PSC.dtype.itemsize
    if block_pages is None:
        block_pages = max(1, BUFFER_BYTES // page_bytes)
    block_pages = min(block_pages, table_BT.shape[1])

    cores = min(_cores(), batch)
    share = -(-batch // cores)
    lengths_B = jnp.pad(lengths_B, (0, cores * share - batch))
    blocks_CB = -(-lengths_B // (block_pages * page_size)).reshape(cores, share)
    # Blocks of this core before a sequence: the buffers take turns over all of them.
    before_CB = jnp.cumsum(blocks_CB, axis=1) - blocks_CB
    number_CB = jnp.arange(cores * share, dtype=jnp.int32).reshape(cores, share)
    filled_CB = jnp.where(blocks_CB > 0, number_CB, cores * share)
    # The next sequence of this core that is not empty; the number of all where there is none.
    later_CB = jax.lax.cummin(filled_CB, axis=1, reverse=True)
    next_CB = jnp.pad(later_CB[:, 1:], ((0, 0), (0, 1)), constant_values=cores * share)

    # 1 in the columns of a query's own key head.
    own_KK = jnp.eye(width // head_dim, dtype=jnp.float32)
    own_QC = jnp.repeat(jnp.repeat(own_KK, q_heads * head_dim // width, 0), head_dim, 1)
    q_spec = pl.BlockSpec(
        (None, q_heads, head_dim),
        lambda core, i, *_: (jnp.minimum(core * share + i, batch - 1), 0, 0),
    )
    kernel = functools.partial(_kernel, share=share, batch=batch, scale=scale)
    buffer = pltpu.VMEM((2, block_pages, page_size, width), k_pages_PSC.dtype)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(cores, share),
            in_specs=[
                q_spec,
                pl.BlockSpec(own_QC.shape, lambda *_: (0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=q_spec,
            scratch_shapes=[
                buffer,
                buffer,
                pltpu.VMEM((q_heads, width), jnp.float32),
                pltpu.SemaphoreType.DMA((2, 2)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q_BQH.shape, q_BQH.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=max(32 * 2**20, 8 * block_pages * page_bytes),
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * q_heads * width * table_BT.shape[1] * page_size,
            transcendentals=batch * q_heads * table_BT.shape[1] * page_size,
            bytes_accessed=2 * table_BT.size * page_bytes + 2 * q_BQH.nbytes,
        ),
        interpret=interpret,
        name="paged_attention",
    )(
        lengths_B,
        table_BT.reshape(-1),
        next_CB.reshape(-1),
        before_CB.reshape(-1),
        q_BQH,
        own_QC,
        k_pages_PSC,
        v_pages_PSC,
    )


def _cores() -> int:
    """TensorCores that share a device, each of which takes a part of the sequences."""
    try:
        return pltpu.get_tpu_info().num_cores
    except ValueError:
        return 1


def _kernel(
    lengths_ref,
    table_ref,
    next_ref,
    before_ref,
    q_ref,
    own_ref,
    k_hbm_ref,
    v_hbm_ref,
    o_ref,
    k_ref,
    v_ref,
    sum_ref,
    arrived,
    *,
    share,
    batch,
    scale,
):
    sequence = pl.program_id(0) * share + pl.program_id(1)
    _, block_pages, page_size, width = k_ref.shape
    q_heads, head_dim = q_ref.shape
    block_tokens = block_pages * page_size
    table_width = table_ref.shape[0] // batch

    def each_copy(sequence, block, slot, act):
        first = block * block_pages
        count = jnp.minimum(_pieces(lengths_ref[sequence], page_size) - first, block_pages)

        def one(i, _):
            page = table_ref[sequence * table_width + first + i]
            for hbm, buffer, kind in ((k_hbm_ref, k_ref, 0), (v_hbm_ref, v_ref, 1)):
                semaphore = arrived.at[kind, slot]
                act(pltpu.make_async_copy(hbm.at[page], buffer.at[slot, i], semaphore))

        jax.lax.fori_loop(0, count, one, None)

    length = lengths_ref[sequence]
    n_blocks = _pieces(length, block_tokens)

    @pl.when((n_blocks > 0) & (before_ref[sequence] == 0))
    def _():
        each_copy(sequence, 0, 0, lambda copy: copy.start())

    own_QC = own_ref[...] > 0
    q_QC = jnp.concatenate([q_ref[...]] * (width // head_dim), axis=1)
    q_QC = jnp.where(own_QC, q_QC, jnp.zeros_like(q_QC))
    sum_ref[...] = jnp.zeros_like(sum_ref)

    def one_block(block, carry):
        top_Q1, total_Q1 = carry
        slot = jax.lax.rem(before_ref[sequence] + block, 2)
        ends = block + 1 == n_blocks
        following = jnp.where(ends, next_ref[sequence], sequence)

        @pl.when(following < lengths_ref.shape[0])
        def _():
            each_copy(following, jnp.where(ends, 0, block + 1), 1 - slot, lambda c: c.start())

        each_copy(sequence, block, slot, lambda copy: copy.wait())
        left = length - block * block_tokens
        k_TC = k_ref[slot].reshape(block_tokens, width)
        scores_QT = scale * _dot(q_QC, k_TC, (1, 1))
        token = jax.lax.broadcasted_iota(jnp.int32, scores_QT.shape, 1)
        scores_QT = jnp.where(token < left, scores_QT, NEVER)

        @pl.when(left < block_tokens)
        def _():
            # Their weight is zero, but what lies there need not be a number.
            v_TC = v_ref[slot].reshape(block_tokens, width)
            token = jax.lax.broadcasted_iota(jnp.int32, v_TC.shape, 0)
            v_ref[slot] = jnp.where(token < left, v_TC, jnp.zeros_like(v_TC)).reshape(
                block_pages, page_size, width
            )

        new_Q1 = jnp.maximum(top_Q1, jnp.max(scores_QT, axis=1, keepdims=True))
        weights_QT = jnp.exp(scores_QT - new_Q1)
        shrink_Q1 = jnp.exp(top_Q1 - new_Q1)
        v_TC = v_ref[slot].reshape(block_tokens, width)
        sum_ref[...] = sum_ref[...] * shrink_Q1 + _dot(weights_QT.astype(v_TC.dtype), v_TC, (1, 0))
        total_Q1 = total_Q1 * shrink_Q1 + jnp.sum(weights_QT, axis=1, keepdims=True)
        return new_Q1, total_Q1

    start = (jnp.full((q_heads, 1), NEVER, jnp.float32), jnp.zeros((q_heads, 1), jnp.float32))
    _, total_Q1 = jax.lax.fori_loop(0, n_blocks, one_block, start)
    own = jnp.where(own_QC, sum_ref[...], 0.0)
    out_QH = functools.reduce(
        jnp.add, [own[:, start : start + head_dim] for start in range(0, width, head_dim)]
    )

    @pl.when(sequence < batch)
    def _():
        o_ref[...] = (out_QH / jnp.where(total_Q1 == 0, 1.0, total_Q1)).astype(o_ref.dtype)


def _pieces(size, piece: int):
    """`pl.cdiv` of what is not negative; rounding towards minus infinity costs more."""
    return jax.lax.div(size + piece - 1, piece)


def _dot(a, b, contract: tuple[int, int]):
    exact = a.dtype == jnp.float32
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        # float32 operands would otherwise be rounded to bfloat16.
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
