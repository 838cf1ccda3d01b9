"""Public attention function: argument checks and choice of implementation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import targets
from kernels_pallas.attention import blocked, cudnn, masks, pallas_tpu, reference, splash

IMPLEMENTATIONS: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "reference": reference.attention,
    "blocked": blocked.attention,
    "pallas_tpu": pallas_tpu.attention,
    "splash": splash.attention,
    "cudnn": cudnn.attention,
}

PER_DEVICE = frozenset({"pallas_tpu", "splash"})
"""Implementations the compiler cannot cut over a mesh: sharded callers use `jax.shard_map`."""

DTYPES = ("float32", "bfloat16", "float16")


def choose(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    *,
    causal: bool,
    q_offset: jax.Array | int,
    dtype: Any = jnp.bfloat16,
) -> str:
    """The best implementation for these arguments on the platform that is compiled for.

    A few queries against a cache are no work for the TPU kernel, which would fill its block of 128.
    """
    static_offset = isinstance(q_offset, int)
    if (
        targets.platform() == "tpu"
        and q_shape[1] >= pallas_tpu.LANES
        and not pallas_tpu.unsupported(q_shape, dtype)
    ):
        return "pallas_tpu"
    return "blocked" if static_offset else "reference"


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    q_offset: jax.Array | int = 0,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    q_subsegment_ids: jax.Array | None = None,
    kv_subsegment_ids: jax.Array | None = None,
    mask: jax.Array | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    interpret: Any = False,
) -> Any:
    """Attention of queries [B, L, Q, H] over keys and values [B, S, K, H]; Q is a multiple of K
    (grouped heads).

    A query sees a key where all masks that are given allow it; a query that sees nothing gives
    zeros and passes no gradient. Blocks of scores in which nothing is seen are not computed by
    `pallas_tpu`, whichever mask it is; `blocked` skips by `causal` and `window`.

    Args:
      q, k, v: queries, keys, values of one dtype (float32, bfloat16 or float16). Scores and softmax
        are float32.
      causal: query i sees keys 0 .. i + q_offset.
      window: query i sees the `window` keys that end at i + q_offset; without `causal` as many on
        the other side too (|i + q_offset - key| < window).
      scale: multiplies the scores; 1 / sqrt(H) when None.
      q_offset: position of the first query among the keys, an int or an int32 scalar (a cache's
        length).
      q_segment_ids, kv_segment_ids: int32 [B, L] and [B, S], both or neither. A query sees keys of
        its own segment only; segment 0 is padding: it sees nothing and gives zeros.
      q_subsegment_ids, kv_subsegment_ids: int32 [B, L] and [B, S], both or neither. A query sees
        keys whose subsegment is at least its own. Branches behind a common prefix that may not see
        each other (annotations of an image) are numbered 1, 2, ... and the prefix gets a larger
        number than all of them; used with `causal`, as in Molmo's data format.
      mask: bool [B, L, S] or [1, L, S], any pattern: True where a query may see a key.
      return_lse: return (output, lse) with the log-sum-exp of a query's scores, float32 [B, Q, L],
        -inf where it sees nothing. Both are differentiable.
      implementation: `reference`, `blocked`, `pallas_tpu`, `splash` (TPU; causal whole sequences
        only), `cudnn` (GPU), or None for the best one here.
      interpret: True, or `pltpu.InterpretParams`, runs `pallas_tpu` on any platform.

    Returns:
      [B, L, Q, H] in q's dtype, or that and the log-sum-exp.

    Raises:
      ValueError: shapes or dtypes that do not fit, or an implementation that does not exist or
        cannot take them or cannot run here.
    """
    _check(q, k, v, window)
    batch, q_len, kv_len = q.shape[0], q.shape[1], k.shape[1]
    segments = _pair("segment_ids", q_segment_ids, kv_segment_ids, q.shape[:2], k.shape[:2])
    subsegments = _pair(
        "subsegment_ids", q_subsegment_ids, kv_subsegment_ids, q.shape[:2], k.shape[:2]
    )
    if mask is not None and (
        mask.shape not in ((batch, q_len, kv_len), (1, q_len, kv_len)) or mask.dtype != jnp.bool_
    ):
        raise ValueError(
            f"attention: mask is {mask.dtype} {mask.shape}, expected bool "
            f"{(batch, q_len, kv_len)} or {(1, q_len, kv_len)}"
        )
    static_offset = isinstance(q_offset, int)
    if implementation is None:
        implementation = choose(q.shape, k.shape, causal=causal, q_offset=q_offset, dtype=q.dtype)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention: unknown implementation {implementation!r}; "
            f"there are {sorted(IMPLEMENTATIONS)}"
        )
    if interpret and implementation != "pallas_tpu":
        raise ValueError(
            f"attention: interpret is for implementation 'pallas_tpu', not {implementation!r}"
        )
    if implementation not in ("pallas_tpu", "reference") and not static_offset:
        raise ValueError(
            f"attention: implementation {implementation!r} needs a Python int q_offset; "
            "'reference' and 'pallas_tpu' take an array"
        )
    options: dict[str, Any] = dict(
        shape=masks.Shape(causal, window, q_len, kv_len, q_offset if static_offset else None),
        ids=masks.Ids(segments, subsegments, mask, None if static_offset else q_offset),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )
    if implementation == "pallas_tpu":
        options["interpret"] = interpret
    if implementation in ("splash", "cudnn"):
        options["need_lse"] = return_lse
    out, lse = IMPLEMENTATIONS[implementation](q, k, v, **options)
    return (out, lse) if return_lse else out


def _check(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            "attention: expected q [B,L,Q,H] and k, v [B,S,K,H]; "
            f"got {q.shape}, {k.shape}, {v.shape}"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"attention: q {q.shape} does not go with k {k.shape}: batch and head width must be "
            "equal and the query heads a multiple of the key heads"
        )
    if not q.size or not k.size:
        raise ValueError(f"attention: q {q.shape} and k {k.shape} must not be empty")
    dtypes = [x.dtype.name for x in (q, k, v)]
    if len(set(dtypes)) > 1 or dtypes[0] not in DTYPES:
        raise ValueError(
            f"attention: q, k and v must have one dtype of {', '.join(DTYPES)}; "
            f"got {', '.join(dtypes)}"
        )
    if window is not None and window < 1:
        raise ValueError(f"attention: window is {window}, expected at least 1")


def _pair(name: str, q_ids, kv_ids, q_shape, kv_shape):
    """Both arrays as int32, or None."""
    if (q_ids is None) != (kv_ids is None):
        raise ValueError(f"attention: give both q_{name} and kv_{name}, or neither")
    if q_ids is None:
        return None
    for side, ids, shape in (("q", q_ids, q_shape), ("kv", kv_ids, kv_shape)):
        if ids.shape != shape:
            raise ValueError(f"attention: {side}_{name} has shape {ids.shape}, expected {shape}")
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"attention: {side}_{name} is {ids.dtype}, expected int32")
    return q_ids.astype(jnp.int32), kv_ids.astype(jnp.int32)
