"""Static schedules of the TPU kernels, and the memory they take beside plain XLA."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from kernels_pallas.benchmark import Row
from kernels_pallas.router import pallas_tpu, reference
from kernels_pallas.schedule import compile_for

# One OLMoE-1B-7B layer on 4 sequences of 4096 tokens.
TOKENS, SLOTS, EXPERTS, WIDTH = 16384, 8, 64, 2048
CHIPS = ("v5e", "v5p", "v6e")
OP = "router"


def ours(which: str):
    """`route`, `combine` (bfloat16) or `combine_float32`, for `kernels_pallas.schedule`."""
    logits = jax.ShapeDtypeStruct((TOKENS, EXPERTS), jnp.float32)
    if which == "route":
        return functools.partial(_route, pallas_tpu), (logits,)
    return functools.partial(_combine, pallas_tpu), _combine_arguments(which)


def plain(which: str):
    """The definitions, by XLA."""
    logits = jax.ShapeDtypeStruct((TOKENS, EXPERTS), jnp.float32)
    if which == "route":
        return functools.partial(_route, reference), (logits,)
    return functools.partial(_combine, reference), _combine_arguments(which)


def _route(module, logits_TE):
    return module.route(logits_TE, SLOTS, None)


def _combine(module, y_MD, destinations_Tk, weights_Tk):
    return module.combine(y_MD, destinations_Tk, weights_Tk)


def _combine_arguments(which: str):
    dtype = jnp.float32 if which.endswith("float32") else jnp.bfloat16
    slots = (TOKENS, SLOTS)
    return (
        jax.ShapeDtypeStruct((TOKENS * SLOTS, WIDTH), dtype),
        jax.ShapeDtypeStruct(slots, jnp.int32),
        jax.ShapeDtypeStruct(slots, jnp.float32),
    )


def rows() -> Iterator[Row]:
    """Bundles of a block of tokens, and temporary memory against the definition's by XLA."""
    shape = f"{TOKENS} tokens, {EXPERTS} experts, top {SLOTS}"
    for chip in CHIPS:
        for which in ("route", "combine", "combine_float32"):
            program = compile_for(f"{__name__}:ours", chip, which=which)
            baseline = compile_for(f"{__name__}:plain", chip, dump=False, which=which)
            case = f"{which}, {shape}" if which == "route" else f"{which}, {shape}, width {WIDTH}"
            kernel = program.kernel("route" if which == "route" else "combine")
            yield Row(
                OP, case, chip, "bundles of the kernel's listing", kernel.bundles,
                note=f"{kernel.spills} spills",
            )  # fmt: skip
            yield Row(
                OP,
                case,
                chip,
                "temporaries, MiB",
                program.temp_bytes / 2**20,
                baseline.temp_bytes / 2**20,
                "the definition by XLA",
            )
