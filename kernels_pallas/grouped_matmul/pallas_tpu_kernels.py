"""The TPU kernels under `pallas_tpu`: rows times matrices, and rows times rows.

Letters: M rows, R rows of a tile, C matrices of a group that share their input (gate and up), K
contracted, N columns, J columns of a block. Rows of bfloat16 may come and go as words (uint32
[M, S, 128], `row_words.py`).

A grid step is a visit of a tile for a group. The whole width K of a tile and, where it fits, the
whole matrix of a group lie in VMEM, so a matrix is read once however many tiles its group has.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.grouped_matmul import visits as visits_lib
from kernels_pallas.row_gather import Gather, GatherInputs, gather_inputs, pack, unpack
from kernels_pallas.row_words import from_words, joined, sublanes, to_words

VMEM_BUDGET = 44 * 2**20
"""What tiles are sized for. The limit leaves room for what the compiler adds."""
VMEM_LIMIT = 60 * 2**20
CHUNKS = (2048, 1024, 512, 256)
"""Columns of one product inside a block. Every product ends with a drained pipeline, so long ones
are better; where a loop's body has two, long ones take minutes to compile.
"""
LANES = 128
WIDEST = 16384
"""A tile holds rows whole: up to this width one of 16 rows fits beside a block of 128 columns."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows of a tile and columns of a block."""

    rows: int
    columns: int


def tile_rows(rows: int, groups: int) -> int:
    """Rows of a tile: at most half of an average group, as every group ends in a partial tile."""
    for size in (512, 256):
        if rows >= 2 * size * groups:
            return size
    return min(128, -(-rows // 16) * 16)


def choose_tiles(
    rows: int, groups: int, columns: int, vmem: Callable[[int], tuple[int, int]]
) -> Tiles:
    """The most rows, `tile_rows` of them if possible, with which a block of columns fits VMEM, and
    the widest block that then divides the columns into whole lanes and fits.

    Args:
      rows: of all groups.
      groups: their number.
      columns: to be divided.
      vmem: rows of a tile -> (bytes whatever the columns, bytes for each column of a block).
    """
    most = tile_rows(rows, groups)
    blocks = [
        columns // parts
        for parts in range(1, columns // LANES + 1)
        if columns % parts == 0 and columns // parts % LANES == 0
    ]
    for size in [most, *(size for size in (256, 128, 64, 32, 16) if size < most)]:
        fixed, per_column = vmem(size)
        for block in blocks:
            if fixed + block * per_column <= VMEM_BUDGET:
                return Tiles(size, block)
    raise AssertionError("widths up to WIDEST fit")


def _visited_rows(rows: int, tile: int, groups: int) -> int:
    """Rows of all visits: a tile is computed whole for every group that has some of it."""
    return (-(-rows // tile) + groups - 1) * tile


def product(
    lhs_CMK: jax.Array,
    rhs_GCKN: jax.Array,
    group_sizes_G: jax.Array,
    *,
    rows_M: jax.Array | None = None,
    d_hidden_MN: jax.Array | None = None,
    transpose_rhs: bool = False,
    mode: str = "sum",
    out_dtype: Any,
    out_words: bool = False,
    tiles: Tiles | None = None,
    expected_rows: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Rows times the matrices of their group.

    Args:
      lhs_CMK: [C, M, K] in mode `sum`, else [1, M, K]; [1, T, K] with `rows_M`. Or words of M rows.
      rhs_GCKN: [G, C, K, N], or [G, C, N, K] with `transpose_rhs`.
      expected_rows: of all groups together, where the rows are a bound for them; what tiles
        and the declared cost are made for.
      mode: `sum` adds the C products up: [M, N]. `swiglu` is silu(first) * second: [M, N].
        `swiglu_backward` returns the gradients of first and second, [2, M, N], from `d_hidden`.
      out_words: the result of mode `sum`, bfloat16, as words.
    """
    groups, parts = rhs_GCKN.shape[:2]
    width, columns = rhs_GCKN.shape[2:][:: -1 if transpose_rhs else 1]
    words = lhs_CMK.shape[1] if lhs_CMK.dtype == jnp.uint32 else 0
    dtype = jnp.dtype("bfloat16") if words else lhs_CMK.dtype
    if words:
        rows, lhs_CMK = lhs_CMK.shape[0], lhs_CMK.reshape(1, -1, LANES)
    else:
        rows = lhs_CMK.shape[1] if rows_M is None else rows_M.shape[0]
    item, outputs = dtype.itemsize, 2 if mode == "swiglu_backward" else 1

    def vmem(size: int) -> tuple[int, int]:
        per_column = 2 * parts * width * item
        per_column += 2 * size * outputs * jnp.dtype(out_dtype).itemsize
        per_column += 0 if d_hidden_MN is None else 2 * size * item
        return 3 * size * width * item * lhs_CMK.shape[0], per_column

    expected = expected_rows or rows
    tiles = tiles or choose_tiles(expected, groups, columns, vmem)
    # A word holds columns of both halves: they are written by one block of columns, or afterwards.
    writes_words = out_words and tiles.columns == columns
    visits = visits_lib.by_tile(group_sizes_G, rows, tiles.rows)
    scalars = visits[:4]

    def tile_index(n, v, group_V, tile_V, *_):
        return tile_V[v]

    def group_index(n, v, group_V, *_):
        # The rows past the last group have no matrix; they keep the last one.
        return jnp.minimum(group_V[v], groups - 1)

    gather = _gather_inputs(lhs_CMK[0], rows_M, tiles.rows, tile_index)
    scratch = []
    if gather is not None or words:
        scratch = [pltpu.VMEM((tiles.rows, width), dtype)]
        scratch += [] if gather is None else gather.scratch
    if transpose_rhs:
        rhs_block, rhs_place = (tiles.columns, width), lambda n: (n, 0)
    else:
        rhs_block, rhs_place = (width, tiles.columns), lambda n: (0, n)
    rhs_spec = pl.BlockSpec(
        (None, parts, *rhs_block), lambda n, v, *s: (group_index(n, v, *s), 0, *rhs_place(n))
    )
    lhs_block = (tiles.rows * words, LANES) if words else (tiles.rows, width)
    lhs_spec = pl.BlockSpec(
        (lhs_CMK.shape[0], *lhs_block), lambda n, v, *s: (0, tile_index(n, v, *s), 0)
    )
    d_hidden_spec = pl.BlockSpec(
        (tiles.rows, tiles.columns), lambda n, v, *s: (tile_index(n, v, *s), n)
    )
    inputs = [(rhs_GCKN, rhs_spec)]
    inputs += [(lhs_CMK, lhs_spec)] if gather is None else gather.inputs
    inputs += [] if d_hidden_MN is None else [(d_hidden_MN, d_hidden_spec)]
    out_block, out_shape = (tiles.rows, tiles.columns), (rows, columns)
    if writes_words:
        out_block, out_shape = (
            (lines * columns // (2 * LANES), LANES) for lines in (tiles.rows, rows)
        )
    out = pl.pallas_call(
        functools.partial(
            _product_kernel,
            groups=groups,
            size=tiles.rows,
            columns=tiles.columns,
            gathers=gather is not None,
            words=words,
            writes_words=writes_words,
            has_d_hidden=d_hidden_MN is not None,
            transpose_rhs=transpose_rhs,
            mode=mode,
            dtype=dtype,
            interpret=bool(interpret),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(columns // tiles.columns, visits.count),
            in_specs=[spec for _, spec in inputs],
            out_specs=pl.BlockSpec(
                (outputs, *out_block), lambda n, v, *s: (0, tile_index(n, v, *s), n)
            ),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct(
            (outputs, *out_shape), jnp.uint32 if writes_words else out_dtype
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
            disable_bounds_checks=True,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * _visited_rows(expected, tiles.rows, groups) * width * columns * parts,
            bytes_accessed=item * (rhs_GCKN.size + expected * width + rows * outputs * columns),
            transcendentals=0 if mode == "sum" else expected * columns,
        ),
        interpret=interpret,
        name=f"grouped_{mode}" if mode != "sum" else "grouped_matmul",
    )(*scalars, *[array for array, _ in inputs])
    if writes_words:
        return out[0].reshape(rows, -1, LANES)
    if out_words:
        return to_words(out[0])
    return out if outputs == 2 else out[0]


def _product_kernel(
    group_V,
    tile_V,
    start_G,
    stop_G,
    rhs_CKJ,
    *refs,
    groups: int,
    size: int,
    columns: int,
    gathers: bool,
    words: int,
    writes_words: bool,
    has_d_hidden: bool,
    transpose_rhs: bool,
    mode: str,
    dtype,
    interpret: bool,
):
    refs = list(refs)
    visit, visits = pl.program_id(1), pl.num_programs(1)
    if gathers:
        source, rows, next_rows = refs[:3]
        *refs, lhs_RK, slots, semaphores = refs[3:]
        gather = Gather(source, rows, next_rows, slots, semaphores)
    else:
        lhs_CRK, *refs = refs
        gather = None
        lhs_RK: Any = refs.pop() if words else None
    d_hidden_RJ: Any = refs.pop(0) if has_d_hidden else None
    (out_ORJ,) = refs
    tile, group = tile_V[visit], group_V[visit]
    chunk = _chunk(columns, products=1 if mode == "sum" else 2)
    chunks = columns // chunk
    row_R1 = tile * size + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    inside_R1 = (row_R1 >= start_G[group]) & (row_R1 < stop_G[group])

    if gather is not None:

        @pl.when(_is_new_tile(tile_V, visit))
        def _():
            _arrive(gather, tile, visit)
            _place_all(_pieces(gather.slots, tile % 2), lhs_RK)

    if words:

        @pl.when(_is_new_tile(tile_V, visit))
        def _():
            _place_all(_word_pieces(lhs_CRK.at[0], words, size), lhs_RK)

    def lhs(part: int):
        return lhs_CRK[part] if lhs_RK is None else lhs_RK[...]

    def products(place) -> list[jax.Array]:
        """These columns of every matrix's product with its rows, float32 [R, columns]."""
        return [
            _dot(
                lhs(part if mode == "sum" else 0),
                rhs_CKJ[part, place, :] if transpose_rhs else rhs_CKJ[part, :, place],
                ((1,), (1 if transpose_rhs else 0,)),
                interpret,
            )
            for part in range(rhs_CKJ.shape[0])
        ]

    def write_words(out_RJ, first: int):
        """The product's columns from `first` on: both halves of a row, or a part of one."""
        blocks = columns // (2 * LANES)
        for block in range(blocks):
            at = sublanes(blocks, size, block)
            old = out_ORJ.at[0][at]
            low, high = (
                out_RJ[:, column : column + LANES] if 0 <= column < out_RJ.shape[1] else None
                for column in (block * LANES - first, (blocks + block) * LANES - first)
            )
            if low is None and high is None:
                continue
            zeros = jnp.zeros((size, LANES), jnp.float32)
            new = joined(zeros if low is None else low, zeros if high is None else high)
            if low is None:
                new |= old & jnp.uint32(0xFFFF)
            if high is None:
                new |= old & jnp.uint32(0xFFFF0000)
            out_ORJ.at[0][at] = jnp.where(inside_R1, new, old)

    def compute_words():
        step = columns if columns <= CHUNKS[0] else _chunk(columns // 2, products=1)
        for first in range(0, columns, step):
            write_words(functools.reduce(jnp.add, products(pl.ds(first, step))), first)

    def compute():
        def one(index, carry):
            place = pl.ds(pl.multiple_of(index * chunk, chunk), chunk)
            if mode == "sum":
                values = [functools.reduce(jnp.add, products(place))]
            elif mode == "swiglu":
                gate_RJ, up_RJ = products(place)
                values = [gate_RJ * jax.nn.sigmoid(gate_RJ) * up_RJ]
            else:
                gate_RJ, up_RJ = products(place)
                d_h_RJ = d_hidden_RJ[:, place].astype(jnp.float32)
                sigmoid_RJ = jax.nn.sigmoid(gate_RJ)
                d_gate_RJ = d_h_RJ * up_RJ * sigmoid_RJ * (1 + gate_RJ * (1 - sigmoid_RJ))
                values = [d_gate_RJ, d_h_RJ * gate_RJ * sigmoid_RJ]
            for part, value in enumerate(values):
                new_RJ = value.astype(out_ORJ.dtype)
                out_ORJ[part, :, place] = jnp.where(inside_R1, new_RJ, out_ORJ[part, :, place])
            return carry

        jax.lax.fori_loop(0, chunks, one, None)

    if gather is not None:
        _start_next(gather, tile_V, visit, tile_V[visits - 1])
    pl.when(group < groups)(compute_words if writes_words else compute)

    @pl.when(group == groups)
    def _():
        if writes_words:
            return write_words(jnp.zeros((size, columns), jnp.float32), 0)
        for part in range(out_ORJ.shape[0]):
            out_ORJ[part] = jnp.where(inside_R1, jnp.zeros_like(out_ORJ[part]), out_ORJ[part])


def outer(
    lhs_MK: jax.Array,
    d_out_CMN: jax.Array,
    group_sizes_G: jax.Array,
    *,
    rows_M: jax.Array | None = None,
    out_dtype: Any,
    tiles: Tiles | None = None,
    expected_rows: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """[G, C, K, N]: for every group the sum over its rows of lhs [K, 1] times d_out [1, N].
    Either may be words. `expected_rows` as in `product`.
    """
    (groups,) = group_sizes_G.shape
    words, d_words = (
        array.shape[1] if array.dtype == jnp.uint32 else 0 for array in (lhs_MK, d_out_CMN)
    )
    parts, rows, columns = d_out_CMN.shape
    if d_words:
        parts, rows, columns = 1, d_out_CMN.shape[0], 2 * LANES * d_words
    width = 2 * LANES * words if words else lhs_MK.shape[1]
    dtype = jnp.dtype("bfloat16") if words else lhs_MK.dtype
    item = dtype.itemsize

    def vmem(size: int) -> tuple[int, int]:
        per_column = 2 * parts * (width * 4 + size * item) + (size * item if d_words else 0)
        return 3 * size * width * item, per_column

    expected = expected_rows or rows
    tiles = tiles or choose_tiles(expected, groups, columns, vmem)
    if d_words and tiles.columns < columns:
        # A block of columns lies in parts of the words of all rows.
        d_words, d_out_CMN = 0, from_words(d_out_CMN)[None]
    visits = visits_lib.by_group(group_sizes_G, rows, tiles.rows)
    last_tile = visits.tile_V[visits.count - 1].reshape(1)
    scalars = (*visits[:4], last_tile)

    def tile_index(n, v, group_V, tile_V, *_):
        return tile_V[v]

    gather = _gather_inputs(lhs_MK, rows_M, tiles.rows, tile_index)
    if words:
        lhs_MK = lhs_MK.reshape(-1, LANES)
    if d_words:
        d_out_CMN = d_out_CMN.reshape(1, -1, LANES)
    d_out_block = (tiles.rows * d_words, LANES) if d_words else (tiles.rows, tiles.columns)
    d_out_spec = pl.BlockSpec((parts, *d_out_block), lambda n, v, *s: (0, tile_index(n, v, *s), n))
    lhs_block = (tiles.rows * words, LANES) if words else (tiles.rows, width)
    lhs_spec = pl.BlockSpec(lhs_block, lambda n, v, *s: (tile_index(n, v, *s), 0))
    inputs = [(d_out_CMN, d_out_spec)]
    inputs += [(lhs_MK, lhs_spec)] if gather is None else gather.inputs
    block = (parts, width, tiles.columns)
    sums_apart = jnp.dtype(out_dtype) != jnp.float32
    return pl.pallas_call(
        functools.partial(
            _outer_kernel,
            size=tiles.rows,
            columns=tiles.columns,
            gathers=gather is not None,
            words=words,
            d_words=d_words,
            sums_apart=sums_apart,
            dtype=dtype,
            interpret=bool(interpret),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(columns // tiles.columns, visits.count),
            in_specs=[spec for _, spec in inputs],
            out_specs=pl.BlockSpec((None, *block), lambda n, v, group_V, *_: (group_V[v], 0, 0, n)),
            scratch_shapes=[
                pltpu.VMEM((width, tiles.rows), dtype),
                *([pltpu.VMEM(block, jnp.float32)] if sums_apart else []),
                *([pltpu.VMEM((tiles.rows, columns), dtype)] if d_words else []),
                *([] if gather is None else gather.scratch),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((groups, parts, width, columns), out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
            disable_bounds_checks=True,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * _visited_rows(expected, tiles.rows, groups) * width * columns * parts,
            bytes_accessed=item * expected * (width + parts * columns)
            + 4 * groups * parts * width * columns,
            transcendentals=0,
        ),
        interpret=interpret,
        name="grouped_outer",
    )(*scalars, *[array for array, _ in inputs])


def _outer_kernel(
    group_V,
    tile_V,
    start_G,
    stop_G,
    last_tile,
    d_out_CRJ,
    *refs,
    size: int,
    columns: int,
    gathers: bool,
    words: int,
    d_words: int,
    sums_apart: bool,
    dtype,
    interpret: bool,
):
    refs = list(refs)
    visit, visits = pl.program_id(1), pl.num_programs(1)
    if gathers:
        source, rows, next_rows, *refs = refs
        *refs, slots, semaphores = refs
        gather = Gather(source, rows, next_rows, slots, semaphores)
    else:
        lhs_RK, *refs = refs
        gather = None
    out_CKJ, lhs_KR = refs[:2]
    sums_CKJ = refs[2] if sums_apart else out_CKJ
    d_out_RJ: Any = refs[-1] if d_words else None
    tile, group = tile_V[visit], group_V[visit]
    parts, width = d_out_CRJ.shape[0], lhs_KR.shape[0]
    chunk = _chunk(columns, products=parts)
    chunks = columns // chunk
    row_R1 = tile * size + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    inside_R1 = (row_R1 >= start_G[group]) & (row_R1 < stop_G[group])

    # All rows of the tile belong to the group.
    is_whole = (tile * size >= start_G[group]) & ((tile + 1) * size <= stop_G[group])
    is_first = (visit == 0) | (group_V[jnp.maximum(visit - 1, 0)] != group)

    def pieces():
        if words:
            for piece, values in _word_pieces(lhs_RK, words, size):
                yield from _placed(piece, values, dtype, width)
        elif gather is None:
            for column in range(0, width, LANES):
                yield column, lhs_RK[:, pl.ds(column, LANES)]
        else:
            for piece, values in _pieces(gather.slots, tile % 2):
                yield from _placed(piece, values, dtype, width)

    if d_words:

        @pl.when(_is_new_tile(tile_V, visit))
        def _():
            _place_all(_word_pieces(d_out_CRJ.at[0], d_words, size), d_out_RJ)

    def compute(masked: bool):
        def inside(values):
            return jnp.where(inside_R1, values, jnp.zeros_like(values)) if masked else values

        # Rows of other groups must go from both sides: zero times what may stand there is not zero.
        for column, values in pieces():
            lhs_KR[pl.ds(column, LANES), :] = inside(values).T

        def one(index, carry):
            place = pl.ds(pl.multiple_of(index * chunk, chunk), chunk)
            for part in range(parts):
                d_RJ = d_out_RJ[:, place] if d_words else d_out_CRJ[part, :, place]
                before_KJ = jnp.where(is_first, 0.0, sums_CKJ[part, :, place])
                sums_CKJ[part, :, place] = before_KJ + _dot(
                    lhs_KR[...], inside(d_RJ), ((1,), (0,)), interpret
                )
            return carry

        jax.lax.fori_loop(0, chunks, one, None)

    if gather is not None:
        pl.when(_is_new_tile(tile_V, visit))(lambda: _arrive(gather, tile, visit))
        _start_next(gather, tile_V, visit, last_tile[0])
    pl.when(is_whole)(lambda: compute(masked=False))
    pl.when(~is_whole)(lambda: compute(masked=True))

    if sums_apart:
        is_last = (visit == visits - 1) | (group_V[jnp.minimum(visit + 1, visits - 1)] != group)

        @pl.when(is_last)
        def _():
            out_CKJ[...] = sums_CKJ[...].astype(out_CKJ.dtype)


def _gather_inputs(x_TK, rows_M, size: int, tile_index) -> GatherInputs | None:
    if rows_M is None:
        return None
    tiles = -(-rows_M.shape[0] // size)
    rows_t1R = jnp.pad(rows_M, (0, tiles * size - rows_M.shape[0])).reshape(tiles, 1, size)
    return gather_inputs(pack(x_TK), rows_t1R, tile_index)


def _chunk(columns: int, products: int) -> int:
    limit = CHUNKS[0] if products == 1 else 512
    return next((size for size in CHUNKS if size <= limit and columns % size == 0), LANES)


def _is_new_tile(tile_V, visit):
    return (visit == 0) | (tile_V[jnp.maximum(visit - 1, 0)] != tile_V[visit])


def _arrive(gather: Gather, tile, visit) -> None:
    """Waits for the tile's rows, which the tile before has started; the first starts its own."""
    slot = tile % 2
    pl.when(visit == 0)(lambda: gather.start_all(gather.rows, slot))
    gather.wait(slot)


def _start_next(gather: Gather, tile_V, visit, last_tile) -> None:
    """The first visit of a tile starts the rows of the next one."""
    tile = tile_V[visit]

    @pl.when(_is_new_tile(tile_V, visit) & (tile < last_tile))
    def _():
        gather.start_all(gather.next_rows, 1 - tile % 2)


def _pieces(slots, slot):
    """(first column, words) of a tile of packed rows, 128 columns at a time."""
    for column in range(0, slots.shape[2], LANES):
        yield column, slots[slot, :, pl.ds(column, LANES)]


def _word_pieces(rows, words: int, size: int):
    """The same of a tile of rows as words, [R * S, 128]."""
    for block in range(words):
        yield block * LANES, rows[sublanes(words, size, block)]


def _place_all(pieces, rows_RK) -> None:
    """Writes pieces of packed rows where their columns belong."""
    for piece, words in pieces:
        for column, values in _placed(piece, words, rows_RK.dtype, rows_RK.shape[1]):
            rows_RK[:, pl.ds(column, values.shape[1])] = values


def _placed(column: int, words, dtype, width: int):
    """(first column, values) of the one or two pieces in a piece of packed rows."""
    for half, values in enumerate(unpack(words, dtype)):
        yield column + half * (width // 2), values


def _dot(a, b, dims, interpret: bool):
    if interpret:
        # XLA's CPU backend has no products of bfloat16 for every layout; these are the same.
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (dims, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
