"""Public linear cross-entropy: argument checks and choice of implementation."""

import jax

from kernels_pallas.linear_cross_entropy import chunked, reference, saved

IMPLEMENTATIONS = {
    "reference": reference.linear_cross_entropy,
    "chunked": chunked.linear_cross_entropy,
    "saved": saved.linear_cross_entropy,
}


def choose(tokens: int, vocab: int, *, vocab_axes: tuple[str, ...] = ()) -> str:
    """The best implementation for these sizes on the default backend."""
    few = tokens * vocab <= saved.MAX_VALUES
    return "saved" if jax.default_backend() == "cpu" and few and not vocab_axes else "chunked"


def linear_cross_entropy(
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    *,
    vocab_axes: tuple[str, ...] = (),
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of the logits x @ w against integer targets.

    Args:
      x: hidden states [T, D], float32, bfloat16 or float16.
      w: output matrix [D, V]; cast to x's dtype for the product, which accumulates in float32.
      targets: int32 [T], each in 0 .. V - 1. Tokens to ignore: give any valid id and weigh their
        loss by zero.
      vocab_axes: names of the mapped axes (`jax.shard_map`) that V is cut over. w then holds this
        device's columns, in the order of the axis index; targets still count over the whole V.
      implementation: `reference` (materialises [T, V]), `chunked` (computes logits twice), `saved`
        (keeps [T, V] in x's dtype; no `vocab_axes`), or None for the best one here.

    Returns:
      (loss, lse), float32 [T]: -log p(target), in nats, and the log-sum-exp of the logits (for
      z-loss).

    Raises:
      ValueError: shapes that do not fit or an unknown implementation.
    """
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0] or targets.shape != x.shape[:1]:
        raise ValueError(
            "linear_cross_entropy: expected x [T,D], w [D,V], targets [T]; "
            f"got {x.shape}, {w.shape}, {targets.shape}"
        )
    implementation = implementation or choose(x.shape[0], w.shape[1], vocab_axes=vocab_axes)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"linear_cross_entropy: unknown implementation {implementation!r}; "
            f"there are {sorted(IMPLEMENTATIONS)}"
        )
    return IMPLEMENTATIONS[implementation](x, w, targets, vocab_axes)
