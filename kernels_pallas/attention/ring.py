"""Context parallelism: attention over a sequence that is cut along a mesh axis.

Called inside `jax.shard_map`. Every device keeps its queries; keys and values travel once around
the ring of devices (arXiv 2310.01889), and the parts of the softmax are joined by their
log-sum-exp. The backward pass sends them around once more, with the gradients they collect, so
that no device ever holds more than its own part and a neighbour's. Parts that no query can see are
passed on and not computed; the wait for the device with the most visible parts stays (a causal mask
leaves the last device twice the average work).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.attention import masks, pallas_tpu, reference
from kernels_pallas.attention.masks import Ids

IMPLEMENTATIONS = ("pallas_tpu", "reference")


class _Options(NamedTuple):
    axis_name: str
    axis_size: int
    causal: bool
    window: int | None
    scale: float
    implementation: str
    interpret: Any


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: str,
    axis_size: int,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    subsegment_ids: jax.Array | None = None,
    implementation: str = "pallas_tpu",
    interpret: Any = False,
) -> jax.Array:
    """Self-attention of a sequence of which every device along a mesh axis holds an equal part, in
    the axis's order. As `kernels_pallas.attention.attention` of the whole sequence.

    Args:
      q, k, v: this device's part: [B, L, Q, H] and [B, L, K, H].
      axis_name, axis_size: the mesh axis and how many devices it has.
      segment_ids, subsegment_ids: int32 [B, L], this device's part.
      implementation: what computes one part against another: `pallas_tpu`, or `reference` (its
        scores [B, Q, L, L] are materialised, one part at a time).

    Raises:
      ValueError: as `attention`, or an implementation that is not for rings.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"ring_attention: implementation {implementation!r}; there are {IMPLEMENTATIONS}"
        )
    if q.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[2] % k.shape[2]:
        raise ValueError(
            "ring_attention: expected q [B,L,Q,H] and k, v [B,L,K,H] with Q a multiple of K; "
            f"got {q.shape}, {k.shape}, {v.shape}"
        )
    for name, ids in (("segment_ids", segment_ids), ("subsegment_ids", subsegment_ids)):
        if ids is not None and ids.shape != q.shape[:2]:
            raise ValueError(
                f"ring_attention: {name} has shape {ids.shape}, expected {q.shape[:2]}"
            )
    options = _Options(
        axis_name,
        axis_size,
        causal,
        window,
        q.shape[-1] ** -0.5 if scale is None else scale,
        implementation,
        interpret,
    )
    return _ring(q, k, v, (segment_ids, subsegment_ids), options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ring(q_BLQH, k_BLKH, v_BLKH, ids, options):
    return _forward(q_BLQH, k_BLKH, v_BLKH, ids, options)[0]


def _forward(q_BLQH, k_BLKH, v_BLKH, ids, options: _Options):
    batch, length, heads, _ = q_BLQH.shape
    shape = masks.Shape(options.causal, options.window, length, length, None)

    def turn(carry, step):
        out_BLQH, lse_BQL, travelling = carry
        k_BLKH, v_BLKH, kv_ids = travelling
        distance = _distance(step, options)

        def attend():
            arguments: dict[str, Any] = dict(
                shape=shape, ids=_ids(ids, kv_ids, distance * length), scale=options.scale
            )
            if options.implementation == "reference":
                return reference.attention(q_BLQH, k_BLKH, v_BLKH, **arguments)
            return pallas_tpu.attention(
                q_BLQH, k_BLKH, v_BLKH, **arguments, interpret=options.interpret
            )

        def skip():
            return jnp.zeros_like(q_BLQH), jnp.full_like(lse_BQL, -jnp.inf)

        part_BLQH, part_lse_BQL = jax.lax.cond(
            _any_visible(distance, length, options), attend, skip
        )
        joined_BQL = jnp.logaddexp(lse_BQL, part_lse_BQL)
        safe_BQL = jnp.where(jnp.isneginf(joined_BQL), 0.0, joined_BQL)
        old, new = (
            jnp.swapaxes(jnp.exp(x - safe_BQL), 1, 2)[..., None] for x in (lse_BQL, part_lse_BQL)
        )
        out_BLQH = out_BLQH * old + part_BLQH.astype(jnp.float32) * new
        return (out_BLQH, joined_BQL, _pass_on(travelling, options)), None

    start = (
        jnp.zeros(q_BLQH.shape, jnp.float32),
        jnp.full((batch, heads, length), -jnp.inf, jnp.float32),
        (k_BLKH, v_BLKH, ids),
    )
    (out_BLQH, lse_BQL, _), _ = jax.lax.scan(turn, start, jnp.arange(options.axis_size))
    out_BLQH = out_BLQH.astype(q_BLQH.dtype)
    return out_BLQH, (q_BLQH, k_BLKH, v_BLKH, ids, out_BLQH, lse_BQL)


def _backward(options: _Options, residuals, d_out_BLQH):
    q_BLQH, k_BLKH, v_BLKH, ids, out_BLQH, lse_BQL = residuals
    length = q_BLQH.shape[1]
    shape = masks.Shape(options.causal, options.window, length, length, None)

    def turn(carry, step):
        dq_BLQH, travelling = carry
        k_BLKH, v_BLKH, kv_ids, dk_BLKH, dv_BLKH = travelling
        distance = _distance(step, options)

        def pull():
            arguments: dict[str, Any] = dict(
                shape=shape, ids=_ids(ids, kv_ids, distance * length), scale=options.scale
            )
            if options.implementation == "pallas_tpu":
                arguments["interpret"] = options.interpret
                gradients = pallas_tpu.gradients
            else:
                gradients = reference.gradients
            found = gradients(q_BLQH, k_BLKH, v_BLKH, out_BLQH, lse_BQL, d_out_BLQH, **arguments)
            return tuple(x.astype(jnp.float32) for x in found)

        def skip():
            return jax.tree.map(jnp.zeros_like, (dq_BLQH, dk_BLKH, dv_BLKH))

        dq, dk, dv = jax.lax.cond(_any_visible(distance, length, options), pull, skip)
        travelling = (k_BLKH, v_BLKH, kv_ids, dk_BLKH + dk, dv_BLKH + dv)
        return (dq_BLQH + dq, _pass_on(travelling, options)), None

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (q_BLQH, k_BLKH, v_BLKH)]
    start = zeros[0], (k_BLKH, v_BLKH, ids, *zeros[1:])
    # After a whole turn the gradients are home again.
    (dq, (*_, dk, dv)), _ = jax.lax.scan(turn, start, jnp.arange(options.axis_size))
    return (
        dq.astype(q_BLQH.dtype),
        dk.astype(k_BLKH.dtype),
        dv.astype(v_BLKH.dtype),
        masks.no_gradient(ids),
    )


_ring.defvjp(_forward, _backward)


def _distance(step: jax.Array, options: _Options) -> jax.Array:
    """How many parts before the queries the keys of this step come from; negative: behind."""
    mine = jax.lax.axis_index(options.axis_name)
    return mine - (mine - step) % options.axis_size


def _any_visible(distance: jax.Array, length: int, options: _Options) -> jax.Array:
    """Whether positions let any query of a part see any key of one that many parts before."""
    visible = distance >= 0 if options.causal else jnp.bool_(True)
    if options.window is not None:
        visible &= (distance - 1) * length + 1 < options.window
        if not options.causal:
            visible &= (-distance - 1) * length + 1 < options.window
    return visible


def _ids(q_ids, kv_ids, q_offset: jax.Array) -> Ids:
    segments, subsegments = (
        None if q is None else (q, kv) for q, kv in zip(q_ids, kv_ids, strict=True)
    )
    return Ids(segments, subsegments, None, q_offset.astype(jnp.int32))


def _pass_on(tree, options: _Options):
    """To the next device of the ring."""
    n = options.axis_size
    to = [(i, (i + 1) % n) for i in range(n)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, options.axis_name, to), tree)
