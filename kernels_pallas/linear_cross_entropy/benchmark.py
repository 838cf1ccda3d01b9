"""Memory and instruction schedules of linear cross-entropy, forward and backward.

The comparison is XLA's own program for the materialised loss. Its products are not Pallas kernels
and have no listing; the compiler's estimate of their cycles stands in the compiled program.
"""

import functools
import math
import os
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from kernels_pallas import gpu_compiler
from kernels_pallas.benchmark import Row, best_seconds
from kernels_pallas.linear_cross_entropy import pallas_tpu
from kernels_pallas.linear_cross_entropy.api import linear_cross_entropy
from kernels_pallas.schedule import ENVIRONMENT, TOPOLOGIES, Program, compile_for

TOKENS, WIDTH, VOCAB = 16_384, 2048, 100_352
"""OLMo 2 1B, one device's step of 4 x 4096 tokens."""
CHIPS = {"v5e": 2 * 4 * 128**2, "v5p": 2 * 4 * 128**2, "v6e": 2 * 4 * 256**2}
"""bfloat16 FLOPs of a core in one cycle at its peak."""


def forward_backward(
    implementation: str = "pallas_tpu",
    tokens: int = TOKENS,
    width: int = WIDTH,
    vocab: int = VOCAB,
    dtype: str = "bfloat16",
    soft_cap: float | None = None,
):
    """Mean loss with z-loss and its gradients; a builder for `schedule.compile_for`."""

    def run(x_TD, w_DV, targets_T):
        def total(x_TD, w_DV):
            loss_T, _ = linear_cross_entropy(
                x_TD,
                w_DV,
                targets_T,
                z_loss=1e-4,
                soft_cap=soft_cap,
                implementation=implementation,
            )
            return jnp.mean(loss_T)

        return jax.value_and_grad(total, (0, 1))(x_TD, w_DV)

    struct = jax.ShapeDtypeStruct
    shapes = (struct((tokens, width), dtype), struct((width, vocab), dtype))
    return run, (*shapes, struct((tokens,), "int32"))


def cycles_of_xla(chip: str, implementation: str = "reference") -> int | None:
    """The compiler's estimate for a program without Pallas kernels or loops; None where it gave up
    on an instruction.
    """
    os.environ.update(ENVIRONMENT)
    device = topologies.get_topology_desc(TOPOLOGIES[chip], platform="tpu").devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    run, shapes = forward_backward(implementation)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in shapes]
    compiled = jax.jit(run).trace(*shapes).lower(lowering_platforms=("tpu",)).compile()
    cycles = re.findall(r'"estimated_cycles":"(\d+)"', compiled.as_text() or "")
    total = sum(map(int, cycles))
    return total if total < 2**62 else None


def cycles_of(program: Program, chip: str) -> float:
    """Bundles of both kernels times their grid steps, or what the matrix units need at their peak
    where that is more: a listing does not show that they are still busy.

    A little too many: what only the first and the last step of a row run is counted for all.
    """
    sizes = pallas_tpu.tiles(TOKENS, WIDTH, VOCAB, 2)
    total = 0.0
    for name, (rows, columns) in (("forward", sizes.forward), ("backward", sizes.backward)):
        steps = math.ceil(TOKENS / rows) * math.ceil(VOCAB / columns)
        products = {"forward": 1, "backward": 3}[name]
        busy = products * 2 * rows * columns * WIDTH / CHIPS[chip]
        total += steps * max(busy, program.kernel(name).bundles)
    return total


def rows() -> Iterator[Row]:
    shape = f"forward + backward, {TOKENS:,} x {WIDTH:,} x {VOCAB:,} bfloat16"
    row = functools.partial(Row, op="linear_cross_entropy", case=shape)
    for chip in CHIPS:
        ours = compile_for(f"{__name__}:forward_backward", chip)
        theirs = compile_for(
            f"{__name__}:forward_backward", chip, dump=False, implementation="reference"
        )
        estimate = cycles_of_xla(chip)
        row_here = functools.partial(row, device=chip, against="XLA, materialised")
        yield row_here(
            metric="temporaries, MiB",
            value=ours.temp_bytes / 2**20,
            baseline=theirs.temp_bytes / 2**20,
        )
        yield row_here(
            metric="million cycles",
            value=cycles_of(ours, chip) / 1e6,
            baseline=estimate and estimate / 1e6,
            note="one core; schedule of ours, the compiler's estimate for XLA's",
        )
    yield from compiled_for_gpus(row)
    yield from on_gpu(row)


def compiled_for_gpus(row) -> Iterator[Row]:
    """Memory of both implementations for GPUs, and registers of our kernels."""
    target = f"{__name__}:forward_backward"
    row = functools.partial(row, device="H100, compiled")
    if not gpu_compiler.available():
        yield row(metric="temporaries, MiB", value=None, note="`make gpu-compiler` is not built")
        return
    ours, chunked, whole = (
        gpu_compiler.compile_for(target, implementation=name)
        for name in ("pallas_gpu", "chunked", "reference")
    )
    for program, note in ((ours, "`pallas_gpu`"), (chunked, "`chunked`, the default there")):
        yield row(
            metric="temporaries, MiB",
            value=program.temp_bytes / 2**20,
            baseline=whole.temp_bytes / 2**20,
            against="XLA, materialised",
            note=note,
        )
    yield from (row(**cells) for cells in gpu_compiler.cells(ours))


def on_gpu(row) -> Iterator[Row]:
    """Time and memory beside the materialised loss, where there is a GPU."""
    if jax.default_backend() != "gpu":
        yield row(
            device="GPU",
            metric="ms",
            value=None,
            against="XLA, materialised",
            note="not run, no GPU here; `pallas_gpu` never ran on one and is not the default",
        )
        return
    baseline_ms, baseline_mebibytes = _measured("reference")
    for name in ("pallas_gpu", "chunked"):
        milliseconds, mebibytes = _measured(name)
        for metric, value, baseline in (
            ("ms", milliseconds, baseline_ms),
            ("temporaries, MiB", mebibytes, baseline_mebibytes),
        ):
            yield row(
                device=jax.devices()[0].device_kind,
                metric=metric,
                value=value,
                baseline=baseline,
                against="XLA, materialised",
                note=f"`{name}`",
            )


def _measured(implementation: str) -> tuple[float, float]:
    """Milliseconds, the best of ten, and MiB of temporaries."""
    run, (x, w, targets) = forward_backward(implementation)
    keys = jax.random.split(jax.random.key(0), 3)
    arguments = (
        jax.random.normal(keys[0], x.shape, x.dtype),
        WIDTH**-0.5 * jax.random.normal(keys[1], w.shape, w.dtype),
        jax.random.randint(keys[2], targets.shape, 0, VOCAB),
    )
    compiled = jax.jit(run).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return 1e3 * best_seconds(compiled, *arguments), memory.temp_size_in_bytes / 2**20
