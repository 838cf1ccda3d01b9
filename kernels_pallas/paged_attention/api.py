"""Public paged attention: argument checks and choice of implementation."""

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import targets
from kernels_pallas.paged_attention import blocked, pallas_tpu, reference

IMPLEMENTATIONS = {
    "reference": reference.paged_attention,
    "blocked": blocked.paged_attention,
    "pallas_tpu": pallas_tpu.paged_attention,
}


def choose(q: jax.Array, k_pages: jax.Array, page_table: jax.Array) -> str:
    """The best implementation for these arguments on the platform that is compiled for:
    `pallas_tpu` on TPUs where it takes them as they lie in HBM, else `blocked`.
    """
    if targets.platform() != "tpu" or pallas_tpu.unsupported(q, k_pages, page_table):
        return "blocked"
    # Pages of another width would be copied into whole lanes at every call.
    return "blocked" if k_pages.shape[2] % pallas_tpu.LANES else "pallas_tpu"


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    lengths: jax.Array,
    page_table: jax.Array,
    *,
    scale: float | None = None,
    implementation: str | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Attention of one query a sequence over the sequence's first `lengths` tokens.

    Args:
      q: queries [B, Q, H], float32, bfloat16 or float16. Scores and softmax are float32.
      k_pages, v_pages: [P, S, K * H]: P pages of S tokens, all heads of a token side by side; Q is
        a multiple of K (grouped heads; K = 1 is multi-query). A page may be anywhere, and a
        sequence's pages need not be neighbours. Slots behind a sequence's end may hold anything,
        NaN too.
      lengths: int32 [B], 0 .. T * S, cut to that range. A sequence of length 0 gives zeros.
      page_table: int32 [B, T]: where the tokens 0 .. S - 1, S .. 2 S - 1, ... of a sequence lie,
        each in 0 .. P - 1, cut to that range. Entries behind a sequence's end are not read.
      scale: multiplies the scores; 1 / sqrt(H) when None.
      implementation: `reference` (gathers all pages), `blocked` (a few pages of every sequence at
        one time, up to the longest length; XLA), `pallas_tpu` (copies the pages first where K * H
        is no multiple of 128), or None for the best one here.
      interpret: `pallas_tpu` without a TPU: True, or `pltpu.InterpretParams(...)` to simulate its
        memories.

    Returns:
      [B, Q, H] in q's dtype. There is no gradient: decoding needs none.

    Raises:
      ValueError: shapes or dtypes that are not as above, an unknown implementation, or `pallas_tpu`
        in a program that is not for TPUs, without `interpret`.
    """
    _check(q, k_pages, v_pages, lengths, page_table)
    implementation = implementation or choose(q, k_pages, page_table)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"paged_attention: unknown implementation {implementation!r}; "
            f"there are {sorted(IMPLEMENTATIONS)}"
        )
    options = {}
    if interpret:
        if implementation != "pallas_tpu":
            raise ValueError(
                "paged_attention: interpret is for implementation 'pallas_tpu', "
                f"not {implementation!r}"
            )
        options["interpret"] = interpret
    pages, page_size, _ = k_pages.shape
    lengths = jnp.clip(lengths.astype(jnp.int32), 0, page_table.shape[1] * page_size)
    page_table = jnp.clip(page_table.astype(jnp.int32), 0, pages - 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return IMPLEMENTATIONS[implementation](
        q, k_pages, v_pages, lengths, page_table, scale=scale, **options
    )


def _check(q, k_pages, v_pages, lengths, page_table) -> None:
    if q.ndim != 3 or k_pages.ndim != 3 or k_pages.shape != v_pages.shape:
        raise ValueError(
            "paged_attention: expected q [B,Q,H] and k_pages, v_pages [P,S,K*H]; "
            f"got {q.shape}, {k_pages.shape}, {v_pages.shape}"
        )
    batch, q_heads, head_dim = q.shape
    width = k_pages.shape[2]
    if 0 in (*q.shape, *k_pages.shape):
        raise ValueError(
            f"paged_attention: q {q.shape} and k_pages {k_pages.shape} must not be empty"
        )
    if width % head_dim or q_heads % (width // head_dim):
        raise ValueError(
            f"paged_attention: k_pages {k_pages.shape} does not go with q {q.shape}: the last "
            f"dimension must be K * {head_dim} with K dividing {q_heads}"
        )
    if lengths.shape != (batch,):
        raise ValueError(f"paged_attention: lengths has shape {lengths.shape}, expected {(batch,)}")
    if page_table.ndim != 2 or page_table.shape[0] != batch or not page_table.shape[1]:
        raise ValueError(
            f"paged_attention: page_table has shape {page_table.shape}, expected ({batch}, T)"
        )
    for name, array in (("q", q), ("k_pages", k_pages), ("v_pages", v_pages)):
        if array.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise ValueError(
                f"paged_attention: {name} {array.shape} is {array.dtype}; float32, bfloat16 and "
                "float16 are accepted"
            )
        if array.dtype != q.dtype:
            raise ValueError(
                f"paged_attention: {name} {array.shape} is {array.dtype} but q is {q.dtype}"
            )
    for name, array in (("lengths", lengths), ("page_table", page_table)):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(
                f"paged_attention: {name} {array.shape} is {array.dtype}; integers are accepted"
            )
