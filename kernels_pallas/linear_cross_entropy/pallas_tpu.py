"""Linear cross-entropy on TPUs: logits exist one tile at a time, in VMEM.

Forward: tiles of tokens x vocabulary, the vocabulary innermost. Maximum and sum of exponentials are
kept for each of the 128 lanes apart and joined once at the end, so that a tile costs vector
operations only and the matrix units stay busy.

Backward: one kernel for both gradients. A tile's logits are computed again, turned into their
gradient and multiplied into dx, which stays in VMEM while the vocabulary passes, and into dw, whose
tiles are fetched from HBM, added to and sent back while the neighbouring tiles are computed. Two
kernels, one a gradient, would compute the logits twice: five products in all instead of four.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import targets as platforms
from kernels_pallas.linear_cross_entropy.parts import capped, columns_here, joined

LANES = 128
NEVER = -1e30
"""Logit of a column that is not there. Finite, so that no lane gives inf - inf."""
SLOTS = 3
"""Tiles of dw in VMEM: one comes, one is added to, one leaves."""
MIB = 2**20
DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))
"""Of x."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of the tiles, in tokens and vocabulary columns."""

    forward: tuple[int, int]
    backward: tuple[int, int]
    rows: int
    """Tokens of a tile whose logits are computed at one time: the next product runs while the
    vector units work on these."""


def tiles(tokens: int, width: int, vocab: int, itemsize: int) -> Tiles:
    """Tiles that fill the matrix units and fit into the VMEM of every chip (64 MiB on v5p).

    Arithmetic per byte of the streamed operand grows with the tokens of a tile, so these come
    first; the bytes of a tile of hidden states bound them.
    """
    # float32 products work on several bfloat16 pieces of their operands, which take VMEM too.
    tile_bytes = (2 if itemsize == 4 else 4) * MIB
    most = max(128, min(1024, tile_bytes // (width * itemsize) // 128 * 128))
    rows = _even(tokens, most, 32 // itemsize if tokens <= most else LANES)
    columns = max(LANES, min(512, 2 * MIB // (width * itemsize) // LANES * LANES))
    columns = _dividing(vocab, columns)
    # Fewer than `SLOTS` tiles would be fetched again before they have left.
    backward = min(columns, max(LANES, vocab // SLOTS // LANES * LANES))
    return Tiles((rows, columns), (rows, backward), 256)


def _even(size: int, limit: int, align: int) -> int:
    """The smallest multiple of `align` that covers `size` in as few pieces as `limit` allows."""
    pieces = math.ceil(size / limit)
    return math.ceil(size / pieces / align) * align


def _dividing(vocab: int, limit: int) -> int:
    """A multiple of the lanes that divides `vocab`, not much below `limit`; else an even cut."""
    for size in range(limit, limit // 2, -LANES):
        if vocab % size == 0:
            return size
    return _even(vocab, limit, LANES)


def linear_cross_entropy(
    x_TD: jax.Array,
    w_DV: jax.Array,
    targets_T: jax.Array,
    vocab_axes: tuple[str, ...] = (),
    soft_cap: float | None = None,
    *,
    interpret: Any = False,
    sizes: Tiles | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels_pallas.linear_cross_entropy.linear_cross_entropy`. `sizes`: None: `tiles`."""
    if x_TD.dtype not in DTYPES:
        raise ValueError(
            f"linear_cross_entropy: implementation 'pallas_tpu' takes x in float32 or bfloat16, "
            f"got {x_TD.dtype} {x_TD.shape}"
        )
    tokens, width = x_TD.shape
    vocab = w_DV.shape[1]
    sizes = sizes or tiles(tokens, width, vocab, x_TD.dtype.itemsize)
    platforms.check_tpu("linear_cross_entropy", interpret)
    columns_T = columns_here(targets_T, vocab, vocab_axes)
    lse_T, target_T = _part(soft_cap, sizes, interpret, x_TD, w_DV, columns_T)
    return joined(lse_T, target_T, vocab_axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _part(soft_cap, sizes, interpret, x_TD, w_DV, columns_T):
    """(lse, target's logit), float32 [T], over these columns of the vocabulary.

    A target outside 0 .. V - 1 is not among them: its logit counts as 0.
    """
    return _forward(soft_cap, sizes, interpret, x_TD, w_DV, columns_T)[0]


def _padded(x: jax.Array, multiples: tuple[int, ...]) -> jax.Array:
    """`x` with zeros at the ends, every dimension a multiple of its number."""
    ends = [(0, -size % multiple) for size, multiple in zip(x.shape, multiples, strict=True)]
    return jnp.pad(x, ends) if any(end for _, end in ends) else x


def _precision(dtype) -> jax.lax.Precision:
    """float32 operands would otherwise be rounded to bfloat16."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def _dot(a, b, contract: tuple[int, int]):
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(
        a, b, dims, precision=_precision(a.dtype), preferred_element_type=jnp.float32
    )


def _row_pieces(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _forward(soft_cap, sizes, interpret, x_TD, w_DV, columns_T):
    tokens, width = x_TD.shape
    vocab = w_DV.shape[1]
    rows, columns = sizes.forward
    x = _padded(x_TD, (rows, 1))
    w = _padded(w_DV.astype(x.dtype), (1, columns))
    # -1 is in no tile.
    targets = jnp.pad(columns_T, (0, -tokens % rows), constant_values=-1)[:, None]
    grid = (x.shape[0] // rows, w.shape[1] // columns)
    kernel = functools.partial(
        _forward_kernel,
        vocab=None if w.shape[1] == vocab else vocab,
        soft_cap=soft_cap,
        pieces=_row_pieces(rows, sizes.rows),
    )
    row_block = pl.BlockSpec((rows, 1), lambda t, v: (t, 0))
    lanes = pltpu.VMEM((rows, LANES), jnp.float32)
    results = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[
            pl.BlockSpec((rows, width), lambda t, v: (t, 0)),
            pl.BlockSpec((width, columns), lambda t, v: (0, v)),
            row_block,
        ],
        out_specs=[row_block, row_block],
        out_shape=[jax.ShapeDtypeStruct((x.shape[0], 1), jnp.float32)] * 2,
        scratch_shapes=[lanes] * 3,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=_forward_vmem(sizes, width, x.dtype.itemsize),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * x.shape[0] * width * w.shape[1],
            transcendentals=x.shape[0] * w.shape[1],
            bytes_accessed=x.nbytes + grid[0] * w.nbytes + 12 * tokens,
        ),
        interpret=interpret,
        name="linear_cross_entropy_forward",
    )(x, w, targets)
    lse_T, target_T = (result[:tokens, 0] for result in results)
    return (lse_T, target_T), (x_TD, w_DV, columns_T, lse_T)


def _forward_vmem(sizes: Tiles, width: int, itemsize: int) -> int:
    rows, columns = sizes.forward
    blocks = 2 * itemsize * width * (rows + columns)
    return max(32 * MIB, blocks + 4 * rows * (columns * 2 + LANES * 12) + 4 * MIB)


def _forward_kernel(
    x_ref,
    w_ref,
    target_ref,
    lse_ref,
    logit_ref,
    top_ref,
    total_ref,
    found_ref,
    *,
    vocab,
    soft_cap,
    pieces,
):
    tile, n_tiles = pl.program_id(1), pl.num_programs(1)
    columns = w_ref.shape[1]

    @pl.when(tile == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, NEVER)
        total_ref[...] = jnp.zeros_like(total_ref)
        found_ref[...] = jnp.zeros_like(found_ref)

    for piece in pieces:
        logits_RC = capped(_dot(x_ref[piece, :], w_ref[...], (1, 0)), soft_cap)
        shape = (logits_RC.shape[0], LANES)
        lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1) + tile * columns
        target = jnp.broadcast_to(target_ref[piece, :], shape)
        groups = []
        found = found_ref[piece, :]
        for start in range(0, columns, LANES):
            group = logits_RC[:, start : start + LANES]
            found += jnp.where(lane == target - start, group, 0.0)
            if vocab is not None:
                group = jnp.where(lane < vocab - start, group, NEVER)
            groups.append(group)
        found_ref[piece, :] = found
        old = top_ref[piece, :]
        top = functools.reduce(jnp.maximum, groups, old)
        total = total_ref[piece, :] * jnp.exp(old - top)
        total_ref[piece, :] = functools.reduce(jnp.add, [jnp.exp(g - top) for g in groups], total)
        top_ref[piece, :] = top

    @pl.when(tile == n_tiles - 1)
    def _():
        top_R1 = jnp.max(top_ref[...], axis=1, keepdims=True)
        weights = total_ref[...] * jnp.exp(top_ref[...] - top_R1)
        lse_ref[...] = jnp.log(jnp.sum(weights, axis=1, keepdims=True)) + top_R1
        logit_ref[...] = jnp.sum(found_ref[...], axis=1, keepdims=True)


def _backward(soft_cap, sizes, interpret, residuals, cotangents):
    x_TD, w_DV, columns_T, lse_T = residuals
    tokens, width = x_TD.shape
    vocab = w_DV.shape[1]
    rows, columns = sizes.backward
    halves = _cores()
    x = _padded(x_TD, (rows, 1))
    n_columns = max(SLOTS, math.ceil(vocab / (halves * columns)))
    w = _padded(w_DV.astype(x.dtype), (1, halves * n_columns * columns))
    end = (0, -tokens % rows)
    targets = jnp.pad(columns_T, end, constant_values=-1)[:, None]
    d_lse, d_target = cotangents
    row_values = [jnp.pad(y, end)[:, None] for y in (lse_T, d_lse, d_target)]
    n_rows = x.shape[0] // rows
    kernel = functools.partial(
        _backward_kernel,
        vocab=None if w.shape[1] == vocab else vocab,
        soft_cap=soft_cap,
        pieces=_row_pieces(rows, sizes.rows),
    )
    row_block = pl.BlockSpec((rows, 1), lambda c, t, v: (t, 0))
    # One buffer where the next tile is far away.
    once = pl.Buffered(1)
    dx, dw = pl.pallas_call(
        kernel,
        grid=(halves, n_rows, n_columns),
        in_specs=[
            pl.BlockSpec((rows, width), lambda c, t, v: (t, 0), pipeline_mode=once),
            pl.BlockSpec((width, rows), lambda c, t, v: (0, t), pipeline_mode=once),
            pl.BlockSpec((width, columns), lambda c, t, v: (0, c * n_columns + v)),
            *[row_block] * 4,
        ],
        out_specs=[
            pl.BlockSpec((None, rows, width), lambda c, t, v: (c, t, 0), pipeline_mode=once),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((halves, *x.shape), x.dtype if halves == 1 else jnp.float32),
            jax.ShapeDtypeStruct(w.shape, jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((rows, width), jnp.float32),
            pltpu.VMEM((rows, columns), x.dtype),
            pltpu.VMEM((SLOTS, width, columns), jnp.float32),
            pltpu.SemaphoreType.DMA((SLOTS,)),
            pltpu.SemaphoreType.DMA((SLOTS,)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_backward_vmem(sizes, width, x.dtype.itemsize),
        ),
        cost_estimate=pl.CostEstimate(
            flops=6 * x.shape[0] * width * w.shape[1],
            transcendentals=x.shape[0] * w.shape[1],
            bytes_accessed=3 * x.nbytes + n_rows * (w.nbytes + 8 * w.size),
        ),
        interpret=interpret,
        name="linear_cross_entropy_backward",
    )(x, x.T, w, targets, *row_values)
    dx_TD = jnp.sum(dx, axis=0)[:tokens].astype(x_TD.dtype)
    d_columns_T = np.zeros(columns_T.shape, jax.dtypes.float0)
    return dx_TD, dw[:, :vocab].astype(w_DV.dtype), d_columns_T


_part.defvjp(_forward, _backward)


def _cores() -> int:
    """TensorCores that share a device, each of which takes a part of the vocabulary."""
    try:
        return pltpu.get_tpu_info().num_cores
    except ValueError:
        return 1


def _backward_vmem(sizes: Tiles, width: int, itemsize: int) -> int:
    rows, columns = sizes.backward
    blocks = itemsize * width * (2 * rows + 2 * columns) + 2 * 4 * 4 * rows * LANES
    results = rows * width * (4 + 4 + itemsize) + (SLOTS + 1) * 4 * width * columns
    pieces = 2 * itemsize * width * (2 * rows + columns) if itemsize == 4 else 0
    return max(32 * MIB, blocks + results + pieces + rows * columns * (itemsize + 8) + 2 * MIB)


def _backward_kernel(
    x_ref,
    xt_ref,
    w_ref,
    target_ref,
    lse_ref,
    d_lse_ref,
    d_target_ref,
    dx_ref,
    dw_ref,
    sum_ref,
    d_logits_ref,
    slots_ref,
    arrived,
    left,
    *,
    vocab,
    soft_cap,
    pieces,
):
    half, row, tile = (pl.program_id(axis) for axis in range(3))
    n_rows, n_tiles = pl.num_programs(1), pl.num_programs(2)
    columns = w_ref.shape[1]
    step = row * n_tiles + tile
    last = n_rows * n_tiles - 1

    def place(step):
        start = (half * n_tiles + jax.lax.rem(step, n_tiles)) * columns
        slot = jax.lax.rem(step, SLOTS)
        return slot, dw_ref.at[:, pl.ds(pl.multiple_of(start, LANES), columns)]

    def fetch(step):
        slot, hbm = place(step)
        return pltpu.make_async_copy(hbm, slots_ref.at[slot], arrived.at[slot])

    def send(step):
        slot, hbm = place(step)
        return pltpu.make_async_copy(slots_ref.at[slot], hbm, left.at[slot])

    # The slot of the next tile is that of the tile before the last one. The tile itself was sent
    # at least `SLOTS` steps ago, so it has left too.
    @pl.when(step >= SLOTS - 1)
    def _():
        send(step - (SLOTS - 1)).wait()

    @pl.when((step + 1 >= n_tiles) & (step < last))
    def _():
        fetch(step + 1).start()

    # All sums start before the products, which the compiler can then schedule as one.
    slot = jax.lax.rem(step, SLOTS)

    @pl.when(row == 0)
    def _():
        slots_ref[slot] = jnp.zeros_like(slots_ref[slot])

    @pl.when(row > 0)
    def _():
        fetch(step).wait()

    @pl.when(tile == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    first = tile * columns + half * n_tiles * columns
    for piece in pieces:
        logits_RC = capped(_dot(x_ref[piece, :], w_ref[...], (1, 0)), soft_cap)
        column = jax.lax.broadcasted_iota(jnp.int32, logits_RC.shape, 1) + first
        d_RC = jnp.exp(logits_RC - lse_ref[piece, :]) * d_lse_ref[piece, :]
        d_RC += jnp.where(column == target_ref[piece, :], d_target_ref[piece, :], 0.0)
        if soft_cap is not None:
            d_RC *= 1.0 - jnp.square(logits_RC / soft_cap)
        if vocab is not None:
            d_RC = jnp.where(column < vocab, d_RC, 0.0)
        d_logits_ref[piece, :] = d_RC.astype(d_logits_ref.dtype)

    sum_ref[...] += _dot(d_logits_ref[...], w_ref[...], (1, 1))
    slots_ref[slot] += _dot(xt_ref[...], d_logits_ref[...], (1, 0))

    @pl.when(tile == n_tiles - 1)
    def _():
        dx_ref[...] = sum_ref[...].astype(dx_ref.dtype)

    send(step).start()

    @pl.when(step == last)
    def _():
        for late in range(SLOTS - 1):
            send(last - late).wait()
