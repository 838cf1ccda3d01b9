"""Public routing functions: argument checks and choice of implementation."""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.router import pallas_tpu, reference, xla
from kernels_pallas.router.routing import Dispatch, Routing

IMPLEMENTATIONS: dict[str, ModuleType] = {
    "reference": reference,
    "xla": xla,
    "pallas_tpu": pallas_tpu,
}

PER_DEVICE = frozenset({"pallas_tpu"})
"""Implementations the compiler cannot cut over a mesh: sharded callers use `jax.shard_map`."""

FLOATS = ("float32", "bfloat16", "float16")


def choose() -> str:
    """The best implementation on the default backend.

    `xla` on every one: our kernels have not been timed on a TPU.
    """
    return "xla"


def route(
    logits_TE: jax.Array,
    k: int,
    *,
    valid_T: jax.Array | None = None,
    implementation: str | None = None,
    interpret: Any = False,
) -> Routing:
    """Softmax over all experts, then the k largest, not renormalised (OLMoE, arXiv 2409.02060).

    Differentiable in the logits through `weights_Tk`, `probability_sum_E` and
    `squared_logsumexp_sum`; the integers carry no gradient. From the last two and `counts_E` come
    the auxiliary losses: load balancing is E / (T^2 k) * sum(counts * probability_sum), the z-loss
    squared_logsumexp_sum / T.

    Args:
      logits_TE: [T, E], float32, bfloat16 or float16; computed with in float32.
      k: experts per token, 1 .. E.
      valid_T: bool [T]; False excludes a token, for padding, from counts, sums and positions.
      implementation: `reference`, `xla`, `pallas_tpu` (float32 and bfloat16), or None for the best
        one here.
      interpret: for `pallas_tpu` without a TPU: True, or `pltpu.InterpretParams` to simulate one.

    Returns:
      A `Routing`, whose fields say what they are.

    Raises:
      ValueError: k beyond the experts, shapes or dtypes that do not fit, or an implementation that
        does not exist or cannot take them; `pallas_tpu` without `interpret` in a program that is
        not for TPUs.
    """
    if logits_TE.ndim != 2 or logits_TE.dtype not in FLOATS or not logits_TE.shape[1]:
        raise ValueError(
            f"route: logits_TE is {logits_TE.dtype} {logits_TE.shape}, expected [T, E] with at "
            f"least one expert, one of {FLOATS}"
        )
    if not 1 <= k <= logits_TE.shape[1]:
        raise ValueError(
            f"route: k = {k} experts per token, but logits_TE {logits_TE.shape} has "
            f"{logits_TE.shape[1]} experts; k must be 1 .. {logits_TE.shape[1]}"
        )
    if valid_T is not None and (valid_T.shape != logits_TE.shape[:1] or valid_T.dtype != jnp.bool_):
        raise ValueError(
            f"route: valid_T is {valid_T.dtype} {valid_T.shape}, "
            f"expected bool {logits_TE.shape[:1]}: one per token"
        )
    route, options = _pick("route", implementation, interpret)
    return route(logits_TE, k, valid_T, **options)


def dispatch(routing: Routing) -> Dispatch:
    """Where the rows of every token go when they are sorted by expert, and who stands there."""
    tokens, k = routing.experts_Tk.shape
    stop_E = jnp.cumsum(routing.counts_E)
    offsets_E1 = jnp.concatenate([jnp.zeros_like(stop_E[:1]), stop_E])
    destinations_Tk = offsets_E1[routing.experts_Tk] + routing.positions_Tk
    token_S = jnp.arange(tokens * k, dtype=jnp.int32) // k
    rows_M = jnp.zeros(tokens * k, jnp.int32)
    rows_M = rows_M.at[destinations_Tk.reshape(-1)].set(token_S, unique_indices=True)
    return Dispatch(destinations_Tk, rows_M)


def combine(
    y_MD: jax.Array,
    destinations_Tk: jax.Array,
    weights_Tk: jax.Array,
    *,
    implementation: str | None = None,
    interpret: Any = False,
) -> jax.Array:
    """out[t] = sum over slots of weights[t, slot] * y[destinations[t, slot]], slot after slot.

    Differentiable in y and the weights, without scattered additions in either direction.

    Args:
      y_MD: [M, D], float32, bfloat16 or float16; summed in float32.
      destinations_Tk: int32 [T, k], rows of y. No row may be named twice, or its gradient is that
        of one of the slots. A destination of M or more reads zeros. On TPUs, bfloat16 rows are
        repacked in memory before they are gathered; rows in float32 are gathered as they are.
      weights_Tk: [T, k], any of those dtypes.
      implementation, interpret: as in `route`.

    Returns:
      [T, D] in y's dtype.

    Raises:
      ValueError: shapes or dtypes that do not fit, or an implementation that does not exist.
    """
    if y_MD.ndim != 2 or y_MD.dtype not in FLOATS:
        raise ValueError(
            f"combine: y_MD is {y_MD.dtype} {y_MD.shape}, expected [M, D], one of {FLOATS}"
        )
    if destinations_Tk.ndim != 2 or destinations_Tk.dtype != jnp.int32:
        raise ValueError(
            f"combine: destinations_Tk is {destinations_Tk.dtype} {destinations_Tk.shape}, "
            "expected int32 [T, k]"
        )
    if weights_Tk.shape != destinations_Tk.shape or weights_Tk.dtype not in FLOATS:
        raise ValueError(
            f"combine: weights_Tk is {weights_Tk.dtype} {weights_Tk.shape}, expected "
            f"{destinations_Tk.shape} as destinations_Tk, one of {FLOATS}"
        )
    combine, options = _pick("combine", implementation, interpret)
    return combine(y_MD, destinations_Tk, weights_Tk, **options)


def _pick(op: str, implementation: str | None, interpret: Any) -> tuple[Any, dict[str, Any]]:
    """The implementation's function, and its options."""
    name = implementation or choose()
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"{op}: unknown implementation {name!r}; there are {sorted(IMPLEMENTATIONS)}"
        )
    if interpret and name != "pallas_tpu":
        raise ValueError(f"{op}: interpret is for implementation 'pallas_tpu', not {name!r}")
    return getattr(IMPLEMENTATIONS[name], op), {"interpret": interpret} if interpret else {}
