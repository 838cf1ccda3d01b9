"""Instruction schedules of paged attention beside jax's own kernel.

Decoding is bound by memory: what counts is whether a kernel issues the instructions for a stretch
of the cache in less time than HBM takes to deliver it.
"""

import functools
from collections.abc import Iterator

import jax

from kernels_pallas.benchmark import Row
from kernels_pallas.paged_attention import pallas_tpu
from kernels_pallas.paged_attention.api import paged_attention
from kernels_pallas.schedule import Kernel, compile_for

CHIPS = {"v5e": (820e9, 1.5e9), "v5p": (2765e9 / 2, 1.75e9), "v6e": (1640e9, 1.75e9)}
"""Bytes of HBM and clock cycles a second, of one core."""
BATCH, HEADS, HEAD_DIM, CONTEXT = 64, 16, 128, 4096


def _arguments(pages_shape, q_heads, head_dim, batch, context, page, dtype):
    struct = jax.ShapeDtypeStruct
    pages = struct(pages_shape, dtype)
    table = struct((batch, context // page), "int32")
    return struct((batch, q_heads, head_dim), dtype), pages, pages, struct((batch,), "int32"), table


def decode(
    batch: int = BATCH,
    q_heads: int = HEADS,
    kv_heads: int = HEADS,
    head_dim: int = HEAD_DIM,
    context: int = CONTEXT,
    page: int = 16,
    dtype: str = "bfloat16",
    implementation: str = "pallas_tpu",
):
    """One step of decoding; a builder for `schedule.compile_for`."""
    shape = (batch * context // page, page, kv_heads * head_dim)
    run = functools.partial(paged_attention, implementation=implementation)
    return run, _arguments(shape, q_heads, head_dim, batch, context, page, dtype)


def decode_by_jax(page: int = 16, block_pages: int = 16):
    """The same by jax's kernel, whose pages lie one behind another for every head."""
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as theirs

    shape = (HEADS, BATCH * CONTEXT // page, page, HEAD_DIM)
    run = functools.partial(theirs, pages_per_compute_block=block_pages)
    return run, _arguments(shape, HEADS, HEAD_DIM, BATCH, CONTEXT, page, "bfloat16")


def bundles_per_mib(kernel: Kernel, block_bytes: int) -> float:
    """Of the loop over blocks, for every MiB of keys and values that it reads."""
    return kernel.blocks[0].bundles / (block_bytes / 2**20)


def rows() -> Iterator[Row]:
    token_bytes = 2 * HEADS * HEAD_DIM * 2
    for page in (16, 128):
        block_pages = max(1, 256 // page)
        case = f"{BATCH} x {HEADS} heads of {HEAD_DIM}, context {CONTEXT}, page {page}, bfloat16"
        for chip, (bandwidth, clock) in CHIPS.items():
            ours = compile_for(f"{__name__}:decode", chip, page=page)
            theirs = compile_for(
                f"{__name__}:decode_by_jax", chip, page=page, block_pages=block_pages
            )
            row = functools.partial(Row, op="paged_attention", case=case, device=chip)
            block = pallas_tpu.BUFFER_BYTES * 2
            yield row(
                metric="bundles per MiB of cache",
                value=bundles_per_mib(ours.kernels[0], block),
                baseline=bundles_per_mib(
                    theirs.kernels[0], block_pages * page * token_bytes // HEADS
                ),
                against="jax, a head at a time",
                note=f"HBM takes {2**20 / bandwidth * clock:,.0f} cycles",
            )
            yield row(
                metric="temporaries, MiB",
                value=ours.temp_bytes / 2**20,
                baseline=theirs.temp_bytes / 2**20,
                against="jax",
            )
