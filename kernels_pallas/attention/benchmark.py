"""Static schedules of the attention kernels beside those of jax's splash attention."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import schedule
from kernels_pallas.attention import masks, pallas_tpu
from kernels_pallas.attention.api import attention
from kernels_pallas.benchmark import Row

PRODUCTION: dict[str, Any] = dict(batch=4, length=4096, heads=16, head_dim=128)
SMALL: dict[str, Any] = dict(batch=1, length=4096, heads=2, head_dim=128)
"""The same kernels as for `PRODUCTION`, whose listing has every block once whatever the grid."""

TILE = 512 * 512
HERE = "kernels_pallas.attention.benchmark:"
CHIPS = ("v5e", "v5p", "v6e")


def ours(
    *,
    backward: bool,
    batch: int,
    length: int,
    heads: int,
    head_dim: int,
    kv_length: int | None = None,
    kv_heads: int | None = None,
    dtype: str = "bfloat16",
    causal: bool = True,
    window: int | None = None,
    segments: bool = False,
    subsegments: bool = False,
    mask: bool = False,
    q_block: int = 512,
    kv_block: int = 512,
):
    """Our forward or backward kernel and its arguments, for `schedule.compile_for`."""
    kv_length = length if kv_length is None else kv_length
    kv_heads = heads if kv_heads is None else kv_heads
    q = jax.ShapeDtypeStruct((batch, length, heads, head_dim), dtype)
    kv = jax.ShapeDtypeStruct((batch, kv_length, kv_heads, head_dim), dtype)
    pair: Any = (
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
        jax.ShapeDtypeStruct((batch, kv_length), jnp.int32),
    )
    dense: Any = jax.ShapeDtypeStruct((1, length, kv_length), jnp.bool_)
    ids = masks.Ids(
        pair if segments else None, pair if subsegments else None, dense if mask else None
    )
    blocks = pallas_tpu.Blocks(q_block, kv_block).fitted(length, kv_length)
    settings = pallas_tpu.Settings(
        masks.Shape(causal, window, length, kv_length), head_dim**-0.5, blocks, blocks, False
    )
    if not backward:
        from kernels_pallas.attention.pallas_tpu_forward import forward

        return lambda q, k, v, ids: forward(q, k, v, ids, settings), (q, kv, kv, ids)
    from kernels_pallas.attention.pallas_tpu_backward import backward as run_backward

    row = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)

    def run(q, k, v, ids, out, lse, d_out, d_lse):
        return run_backward(q, k, v, ids, out, lse, d_out, d_lse, settings)

    return run, (q, kv, kv, ids, q, row, q, row)


def for_gpus(implementation: str):
    """Causal attention forward and backward at `PRODUCTION`; for `kernels_pallas.gpu_compiler`."""
    sizes = (PRODUCTION[name] for name in ("batch", "length", "heads", "head_dim"))
    q = jax.ShapeDtypeStruct(tuple(sizes), jnp.bfloat16)

    def run(q, k, v, d_out):
        def forward(q, k, v):
            return attention(q, k, v, causal=True, implementation=implementation)

        out, pull = jax.vjp(forward, q, k, v)
        return out, pull(d_out)

    return run, (q, q, q, q)


def splash(
    *,
    backward: bool,
    batch: int,
    length: int,
    heads: int,
    head_dim: int,
    segments: bool,
    block: int = 512,
):
    """jax's splash attention with a causal mask, or that and its backward pass."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv")
    names += ("block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask(
            [splash_attention_mask.CausalMask((length, length))] * heads
        ),
        block_sizes=splash_attention_kernel.BlockSizes(**dict.fromkeys(names, block)),
        head_shards=1,
        q_seq_shards=1,
    )
    x = jax.ShapeDtypeStruct((batch, heads, length, head_dim), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def forward(q, k, v, ids):
        if not segments:
            return jax.vmap(kernel)(q, k, v)
        return jax.vmap(kernel)(q, k, v, splash_attention_kernel.SegmentIds(ids, ids))

    def both(q, k, v, ids, d_out):
        _, pull = jax.vjp(lambda q, k, v: forward(q, k, v, ids), q, k, v)
        return pull(d_out)

    return (both, (x, x, x, ids, x)) if backward else (forward, (x, x, x, ids))


def rows() -> Iterator[Row]:
    if schedule.libtpu_version() is None:
        yield Row("attention", "all", "TPU", "bundles", None, note="libtpu is not installed")
        return
    for chip in CHIPS:
        yield from schedules(chip)
        for backward in (False, True):
            program = schedule.compile_for(
                HERE + "ours", chip, dump=False, backward=backward, segments=True, **PRODUCTION
            )
            yield Row(
                "attention",
                f"{'backward' if backward else 'forward'}, 4 x 4096, 16 heads of 128, bfloat16",
                chip,
                "temporaries, MiB",
                program.temp_bytes / 2**20,
                note=f"arguments {program.argument_bytes / 2**20:.0f}, results "
                f"{program.output_bytes / 2**20:.0f} MiB",
            )
    yield Row(
        "attention",
        "forward and backward by cuDNN",
        "GPU",
        "time",
        None,
        note="never run, for want of a GPU; by name only, the default there is XLA's `blocked`",
    )


def schedules(chip: str) -> Iterator[Row]:
    """Bundles of a block of scores in which nothing is hidden, per 512 x 512 of it."""
    for segments in (False, True):
        theirs = schedule.compile_for(
            HERE + "splash", chip, backward=True, segments=segments, **SMALL
        )
        for backward, q_block in ((False, 512), (False, 1024), (True, 512)):
            parts = ("dq", "dkv") if backward else ("fwd",)
            beside = [theirs.kernel(f"splash_mha_{part}").blocks[0] for part in parts]
            options = dict(backward=backward, segments=segments, q_block=q_block)
            program = schedule.compile_for(HERE + "ours", chip, **options, **SMALL)
            (kernel,) = program.kernels
            # The longer block is the one that hides pairs.
            hiding, full = kernel.blocks
            tiles = q_block * 512 / TILE
            yield Row(
                "attention",
                f"{'backward' if backward else 'forward'}, causal"
                f"{' and segments' if segments else ''}, blocks {q_block} x 512",
                chip,
                "bundles per 512 x 512",
                full.bundles / tiles,
                sum(one.bundles for one in beside),
                f"splash {' + '.join(parts)}, blocks 512 x 512",
                f"{full.spills} spills (splash {sum(one.spills for one in beside)}); where pairs "
                f"are hidden {hiding.bundles / tiles:,.0f} bundles and {hiding.spills} spills; "
                f"{kernel.overhead} more per step",
            )
