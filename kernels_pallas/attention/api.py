"""Public attention function: argument checks and choice of implementation."""

import jax

from kernels_pallas.attention import blocked, reference, splash

IMPLEMENTATIONS = {
    "reference": reference.attention,
    "blocked": blocked.attention,
    "splash": splash.attention,
}

PER_DEVICE = frozenset({"splash"})
"""Implementations the compiler cannot cut over a mesh: sharded callers use `jax.shard_map`."""


def choose(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], *, causal: bool, q_offset: jax.Array | int
) -> str:
    """The best implementation for these arguments on the default backend."""
    if not isinstance(q_offset, int):
        return "reference"
    if jax.default_backend() == "tpu" and not splash.unsupported(
        q_shape, k_shape, causal=causal, q_offset=q_offset
    ):
        return "splash"
    return "blocked"


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = True,
    scale: float | None = None,
    q_offset: jax.Array | int = 0,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention of queries [B, L, Q, H] over keys and values [B, S, K, H]; Q is a multiple of K
    (grouped heads).

    Args:
      q, k, v: queries, keys, values of one dtype (float32, bfloat16 or float16). Scores and softmax
        are float32.
      causal: query i sees keys 0 .. i + q_offset.
      scale: multiplies the scores; 1 / sqrt(H) when None.
      q_offset: position of the first query among the keys, an int or an int32 scalar (a cache's
        length). q_segment_ids, kv_segment_ids: int32 [B, L] and [B, S], both or neither. A query
        sees keys of its own segment only;
        segment 0 is padding: it sees nothing and gives zeros.
      implementation: `reference`, `blocked`, `splash` (TPU), or None for the best one here.

    Returns:
      [B, L, Q, H] in q's dtype.

    Raises:
      ValueError: shapes or dtypes that do not fit, or an implementation that does not exist or
        cannot take them.
    """
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
    if (q_segment_ids is None) != (kv_segment_ids is None):
        raise ValueError("attention: give both q_segment_ids and kv_segment_ids, or neither")
    for name, ids, shape in (
        ("q_segment_ids", q_segment_ids, q.shape[:2]),
        ("kv_segment_ids", kv_segment_ids, k.shape[:2]),
    ):
        if ids is not None and ids.shape != shape:
            raise ValueError(f"attention: {name} has shape {ids.shape}, expected {shape}")
    static_offset = isinstance(q_offset, int)
    if implementation is None:
        implementation = choose(q.shape, k.shape, causal=causal, q_offset=q_offset)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention: unknown implementation {implementation!r}; "
            f"there are {sorted(IMPLEMENTATIONS)}"
        )
    if implementation == "blocked" and not static_offset:
        raise ValueError(
            "attention: implementation 'blocked' needs a Python int q_offset; "
            "'reference' takes an array"
        )
    return IMPLEMENTATIONS[implementation](
        q,
        k,
        v,
        causal=causal,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        q_offset=q_offset,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
    )
