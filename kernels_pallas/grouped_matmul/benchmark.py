"""Static schedules of the TPU kernels beside jax's megablox; what is compiled for a GPU, and times
on CPUs (and GPUs), beside `jax.lax.ragged_dot`.
"""

import functools
import importlib
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import gpu_compiler
from kernels_pallas.benchmark import Row, best_seconds
from kernels_pallas.grouped_matmul import pallas_tpu, pallas_tpu_kernels
from kernels_pallas.grouped_matmul.api import grouped_matmul, grouped_swiglu
from kernels_pallas.schedule import CompilationError, Kernel, compile_for

# One OLMoE-1B-7B layer on 4 sequences of 4096 tokens.
TOKENS, SLOTS, GROUPS, WIDTH, HIDDEN = 16384, 8, 64, 2048, 1024
ROWS = TOKENS * SLOTS
TILE = (512, WIDTH, HIDDEN)
"""Rows, K and N of a tile, for our kernels and megablox alike."""
CHIPS = ("v5e", "v5p", "v6e")
OP = "grouped_matmul"


def ours(which: str):
    """`product` [M, 2048] x [G, 2048, 1024], `dlhs` back from its gradient, `drhs`, `gathered` (the
    product with its rows gathered from [T, 2048]), `swiglu` or `swiglu_backward`; for
    `kernels_pallas.schedule`.
    """
    tiles = pallas_tpu_kernels.Tiles(TILE[0], TILE[2])
    # The gradient of lhs contracts over N = 1024 and has K = 2048 columns.
    lhs, d_out = _bf16(1, ROWS, WIDTH), _bf16(1, ROWS, HIDDEN)
    rhs, sizes = _bf16(GROUPS, 1, WIDTH, HIDDEN), jax.ShapeDtypeStruct((GROUPS,), jnp.int32)
    rows = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    product = functools.partial(pallas_tpu_kernels.product, out_dtype=jnp.bfloat16)
    if which == "product":
        return functools.partial(product, tiles=tiles), (lhs, rhs, sizes)
    if which == "gathered":

        def gathered(x, rhs, sizes, rows):
            return product(x, rhs, sizes, rows_M=rows, tiles=tiles)

        return gathered, (_bf16(1, TOKENS, WIDTH), rhs, sizes, rows)
    if which == "dlhs":
        wide = pallas_tpu_kernels.Tiles(TILE[0], WIDTH)
        return functools.partial(product, transpose_rhs=True, tiles=wide), (d_out, rhs, sizes)
    if which in ("swiglu", "swiglu_backward"):
        return _swiglu(which)
    outer = functools.partial(pallas_tpu_kernels.outer, out_dtype=jnp.bfloat16, tiles=tiles)
    return outer, (_bf16(ROWS, WIDTH), d_out, sizes)


def _swiglu(which: str):
    """The public function, weights and their layout as a model has them."""
    x, sizes = _bf16(TOKENS, WIDTH), jax.ShapeDtypeStruct((GROUPS,), jnp.int32)
    rows, gate_up = jax.ShapeDtypeStruct((ROWS,), jnp.int32), _bf16(GROUPS, 2, WIDTH, HIDDEN)

    def forward(x, gate_up, sizes, rows):
        return pallas_tpu.grouped_swiglu(x, gate_up, sizes, rows_M=rows)

    def backward(x, gate_up, sizes, rows, d_h):
        _, pull = jax.vjp(lambda x, gate_up: forward(x, gate_up, sizes, rows), x, gate_up)
        return pull(d_h)

    if which == "swiglu":
        return forward, (x, gate_up, sizes, rows)
    return backward, (x, gate_up, sizes, rows, _bf16(ROWS, HIDDEN))


def layer_for_gpus(implementation: str):
    """Both halves of the experts of a layer, forward and backward; for
    `kernels_pallas.gpu_compiler`.
    """

    def run(x, gate_up, down, sizes, rows_M, readers_Tr, d_y):
        def layer(x, gate_up, down):
            h = grouped_swiglu(
                x,
                gate_up,
                sizes,
                rows_M=rows_M,
                readers_Tr=readers_Tr,
                implementation=implementation,
            )
            return grouped_matmul(h, down, sizes, implementation=implementation)

        y, pull = jax.vjp(layer, x, gate_up, down)
        return y, pull(d_y)

    matrices = _bf16(GROUPS, 2, WIDTH, HIDDEN), _bf16(GROUPS, HIDDEN, WIDTH)
    integers = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((GROUPS,), (ROWS,), (TOKENS, SLOTS)))
    return run, (_bf16(TOKENS, WIDTH), *matrices, *integers, _bf16(ROWS, WIDTH))


def weight_gradient(implementation: str):
    """The gradient of [64, 2048, 1024] from rows and their gradients."""

    def run(lhs, rhs, sizes, d_out):
        product = functools.partial(grouped_matmul, implementation=implementation)
        return jax.vjp(lambda rhs: product(lhs, rhs, sizes), rhs)[1](d_out)

    rhs, sizes = _bf16(GROUPS, WIDTH, HIDDEN), jax.ShapeDtypeStruct((GROUPS,), jnp.int32)
    return run, (_bf16(ROWS, WIDTH), rhs, sizes, _bf16(ROWS, HIDDEN))


def megablox(which: str):
    """The first three from jax.experimental; it takes `drhs`' lhs transposed."""
    # The package hides this module behind a function of the same name.
    backend = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
    gmm = backend.gmm
    lhs, d_out = _bf16(ROWS, WIDTH), _bf16(ROWS, HIDDEN)
    rhs, sizes = _bf16(GROUPS, WIDTH, HIDDEN), jax.ShapeDtypeStruct((GROUPS,), jnp.int32)
    if which == "product":
        fn = functools.partial(gmm, preferred_element_type=jnp.bfloat16, tiling=TILE)
        return fn, (lhs, rhs, sizes)
    if which == "dlhs":
        tiling = (TILE[0], TILE[2], TILE[1])
        fn = functools.partial(
            gmm, preferred_element_type=jnp.bfloat16, tiling=tiling, transpose_rhs=True
        )
        return fn, (d_out, rhs, sizes)

    def drhs(lhs, d_out, sizes):
        return backend.tgmm(lhs.T, d_out, sizes, preferred_element_type=jnp.bfloat16, tiling=TILE)

    return drhs, (lhs, d_out, sizes)


def _bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def rows() -> Iterator[Row]:
    """Bundles per tile and temporaries beside megablox; then times on this machine's CPUs."""
    shape = f"[{ROWS}, {WIDTH}] x [{GROUPS}, {WIDTH}, {HIDDEN}] bf16, tile {TILE}"
    for chip in CHIPS:
        for which in ("product", "dlhs", "drhs", "gathered"):
            program = compile_for(f"{__name__}:ours", chip, which=which)
            kernel = program.kernel("grouped")
            baseline_of = "product" if which == "gathered" else which
            try:
                baseline = compile_for(f"{__name__}:megablox", chip, which=baseline_of)
            except CompilationError:
                # Its limit of VMEM is the compiler's default, too little for this tile on v5.
                baseline = theirs = None
            else:
                theirs = max(baseline.kernels, key=lambda kernel: kernel.bundles)
            yield Row(
                OP,
                f"{which}, {shape}",
                chip,
                "bundles per tile",
                bundles_per_tile(kernel),
                theirs and bundles_per_tile(theirs),
                "megablox",
                note=f"spills {kernel.blocks[0].spills}"
                + (f", megablox {theirs.blocks[0].spills}" if theirs else "; megablox: out of VMEM")
                + ("; starting the row copies not counted" if which == "gathered" else ""),
            )
            yield Row(
                OP,
                f"{which}, {shape}",
                chip,
                "temporaries, MiB",
                program.temp_bytes / 2**20,
                baseline and baseline.temp_bytes / 2**20,
                "megablox",
            )
    yield from _gpu_rows()
    yield from _cpu_rows()


def _gpu_rows() -> Iterator[Row]:
    """Memory and registers as compiled for a GPU; the speed of our weight gradient where there is
    one.
    """
    case = f"layer, forward + backward, {TOKENS} tokens, {SLOTS} of {GROUPS} experts, "
    row = functools.partial(Row, OP, f"{case}{WIDTH} x {HIDDEN}, bf16", "H100, compiled")
    if gpu_compiler.available():
        target = f"{__name__}:layer_for_gpus"
        ours, loops, xla = (
            gpu_compiler.compile_for(target, implementation=name)
            for name in ("pallas_gpu", "tiled", "ragged")
        )
        for program, note in ((ours, "`pallas_gpu`"), (loops, "`tiled`, the default there")):
            value, baseline = program.temp_bytes / 2**20, xla.temp_bytes / 2**20
            yield row("temporaries, MiB", value, baseline, "jax.lax.ragged_dot", note)
        for cells in gpu_compiler.cells(ours):
            yield row(**cells)
    else:
        yield row("temporaries, MiB", None, note="`make gpu-compiler` is not built")
    row = functools.partial(
        Row, OP, f"drhs, [{ROWS}, {WIDTH}] x [{GROUPS}, {WIDTH}, {HIDDEN}] bf16"
    )
    if jax.default_backend() != "gpu":
        note = "not run, no GPU here; `tiled` is the default, `pallas_gpu` never ran on one"
        yield row("GPU", "TFLOP/s", None, against="tiled", note=note)
        return
    value, baseline = (_gradient_speed(name) for name in ("pallas_gpu", "tiled"))
    note = "`pallas_gpu` beside `tiled`, the default there"
    yield row(jax.devices()[0].device_kind, "TFLOP/s", value, baseline, "tiled", note)


def _gradient_speed(implementation: str) -> float:
    """TFLOP/s of `weight_gradient` on this machine's GPU, the best of ten; a multinomial
    draw of the groups' sizes.
    """
    run, shapes = weight_gradient(implementation)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    lhs, rhs, d_out = (
        jax.random.normal(key, shape.shape, shape.dtype)
        for key, shape in zip(keys, shapes, strict=True)
        if shape.dtype == jnp.bfloat16
    )
    drawn = np.random.default_rng(0).multinomial(ROWS, np.ones(GROUPS) / GROUPS)
    arguments = (lhs, rhs, jnp.asarray(drawn, jnp.int32), d_out)
    return 2 * ROWS * WIDTH * HIDDEN / best_seconds(jax.jit(run), *arguments) / 1e12


def bundles_per_tile(kernel: Kernel) -> int:
    """The products of one tile and what every step of the grid does besides."""
    return kernel.blocks[0].bundles + kernel.overhead


def _cpu_rows() -> Iterator[Row]:
    """Forward and backward in milliseconds, the two in turns; the least of five each."""
    device = jax.devices("cpu")[0].device_kind
    for dtype in ("float32", "bfloat16"):
        for count, groups, width, columns in ((8192, 32, 256, 128), (4096, 8, 256, 256)):
            rng = np.random.default_rng(0)
            lhs = jnp.asarray(rng.normal(size=(count, width)), dtype)
            rhs = jnp.asarray(rng.normal(size=(groups, width, columns)), jnp.float32)
            sizes = jnp.asarray(rng.multinomial(count, np.ones(groups) / groups), jnp.int32)

            def gradients(lhs, rhs, sizes, implementation):
                def total(lhs, rhs):
                    out = grouped_matmul(lhs, rhs, sizes, implementation=implementation)
                    return jnp.sum(out.astype(jnp.float32) ** 2)

                return jax.grad(total, (0, 1))(lhs, rhs)

            run = jax.jit(gradients, static_argnums=3)
            best = dict.fromkeys(("tiled", "ragged"), float("inf"))
            for turn in range(6):
                for name in best:
                    start = time.perf_counter()
                    jax.block_until_ready(run(lhs, rhs, sizes, name))
                    if turn:
                        best[name] = min(best[name], time.perf_counter() - start)
            yield Row(
                OP,
                f"gradients, [{count}, {width}] x [{groups}, {width}, {columns}] {dtype}",
                f"CPU ({device})",
                "ms",
                1e3 * best["tiled"],
                1e3 * best["ragged"],
                "jax.lax.ragged_dot",
            )
