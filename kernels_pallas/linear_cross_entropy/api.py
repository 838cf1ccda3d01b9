"""Public linear cross-entropy: argument checks and choice of implementation."""

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import targets as platforms
from kernels_pallas.linear_cross_entropy import (
    chunked,
    pallas_gpu,
    pallas_tpu,
    reference,
    saved,
)

IMPLEMENTATIONS = {
    "reference": reference.linear_cross_entropy,
    "chunked": chunked.linear_cross_entropy,
    "saved": saved.linear_cross_entropy,
    "pallas_tpu": pallas_tpu.linear_cross_entropy,
    "pallas_gpu": pallas_gpu.linear_cross_entropy,
}


def choose(
    tokens: int,
    vocab: int,
    *,
    dtype: Any = "float32",
    vocab_axes: tuple[str, ...] = (),
    soft_cap: float | None = None,
) -> str:
    """The best implementation for these sizes on the platform that is compiled for.

    TPUs: `pallas_tpu` where it takes the dtype. GPUs: `chunked`, products by XLA. CPUs: `saved`
    while its memory is little.
    """
    backend = platforms.platform()
    if backend == "tpu" and jnp.dtype(dtype) in pallas_tpu.DTYPES:
        return "pallas_tpu"
    few = tokens * vocab <= saved.MAX_VALUES
    whole = not vocab_axes and soft_cap is None
    return "saved" if backend == "cpu" and few and whole else "chunked"


def linear_cross_entropy(
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    *,
    z_loss: float = 0.0,
    ignore_index: int | None = None,
    soft_cap: float | None = None,
    vocab_axes: tuple[str, ...] = (),
    implementation: str | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of the logits x @ w against integer targets.

    Args:
      x: hidden states [T, D], float32, bfloat16 or float16 (`pallas_tpu`: not float16;
        `pallas_gpu`: not float32).
      w: output matrix [D, V]; cast to x's dtype for the product, which accumulates in float32.
      targets: int32 [T], each in 0 .. V - 1 or `ignore_index`.
      z_loss: adds z_loss * lse^2 to the loss.
      ignore_index: tokens with this target have loss 0 and no gradient from it; may be outside
        0 .. V - 1. Their lse is returned like any other's.
      soft_cap: logits become soft_cap * tanh(logits / soft_cap); not by `saved`.
      vocab_axes: names of the mapped axes (`jax.shard_map`) that V is cut over. w then holds this
        device's columns, in the order of the axis index; targets still count over the whole V.
      implementation: `reference` (materialises [T, V]), `chunked` (computes logits twice), `saved`
        (keeps [T, V] in x's dtype; no `vocab_axes`), `pallas_tpu` (logits stay in VMEM; TPUs),
        `pallas_gpu` (logits stay in registers; Hopper, never run on one here), or None for the
        best one here.
      interpret: `pallas_tpu` without a TPU, `pallas_gpu` without a GPU: True, or
        `pltpu.InterpretParams(...)`, `plgpu.InterpretGPUParams(...)` to simulate its memories.

    Returns:
      (loss, lse), float32 [T]: -log p(target), in nats, plus z-loss, and the log-sum-exp of the
      logits.

    Raises:
      ValueError: shapes, dtypes or settings that are not as above, an unknown implementation, or
        `pallas_tpu` (`pallas_gpu`) in a program that is not for TPUs (GPUs), without `interpret`.
    """
    _check(x, w, targets, soft_cap)
    if implementation is None:
        implementation = choose(
            x.shape[0], w.shape[1], dtype=x.dtype, vocab_axes=vocab_axes, soft_cap=soft_cap
        )
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"linear_cross_entropy: unknown implementation {implementation!r}; "
            f"there are {sorted(IMPLEMENTATIONS)}"
        )
    options = {}
    if interpret:
        if implementation not in ("pallas_tpu", "pallas_gpu"):
            raise ValueError(
                "linear_cross_entropy: interpret is for implementations 'pallas_tpu' and "
                f"'pallas_gpu', not {implementation!r}"
            )
        options["interpret"] = interpret
    counts_T = None
    if ignore_index is not None:
        counts_T = targets != ignore_index
        targets = jnp.where(counts_T, targets, 0)
    loss_T, lse_T = IMPLEMENTATIONS[implementation](x, w, targets, vocab_axes, soft_cap, **options)
    if z_loss:
        loss_T += z_loss * jnp.square(lse_T)
    if counts_T is not None:
        loss_T = jnp.where(counts_T, loss_T, 0.0)
    return loss_T, lse_T


def _check(x, w, targets, soft_cap) -> None:
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0] or targets.shape != x.shape[:1]:
        raise ValueError(
            "linear_cross_entropy: expected x [T,D], w [D,V], targets [T]; "
            f"got {x.shape}, {w.shape}, {targets.shape}"
        )
    for name, array in (("x", x), ("w", w), ("targets", targets)):
        if not array.size:
            raise ValueError(f"linear_cross_entropy: {name} {array.shape} is empty")
    for name, array in (("x", x), ("w", w)):
        if array.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise ValueError(
                f"linear_cross_entropy: {name} {array.shape} is {array.dtype}; "
                "float32, bfloat16 and float16 are accepted"
            )
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(
            f"linear_cross_entropy: targets {targets.shape} is {targets.dtype}; integers are "
            "accepted"
        )
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"linear_cross_entropy: soft_cap is {soft_cap}; it must be above 0")
