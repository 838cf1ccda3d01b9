"""Attention on TPUs by our own Pallas kernels: `forward` and a `backward` that makes dq, dk and dv
in one pass over the blocks of scores.

Both kernels keep scores transposed, [keys, queries]: statistics of a query are then narrow rows
that broadcast for free, every product has its operands as they lie, and a head width below 128
costs what it is. Both walk a list of the blocks in which anything is seen (`masks.visits`) and are
pipelined over it by hand: a grid step multiplies queries and keys of one block while it takes
exponentials of the block before and multiplies those of the one before that. README.md says what
this is worth.

It is a per-device program: sharded callers use `jax.shard_map`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import targets
from kernels_pallas.attention import masks
from kernels_pallas.attention.masks import Ids

LANES = 128
SUBLANES = 16
MAX_HEAD_DIM = 256
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of a block of scores; multiples of 128 that need not divide the lengths."""

    q: int = 512
    kv: int = 512

    def fitted(self, q_len: int, kv_len: int) -> "Blocks":
        """As many blocks, but no larger than the lengths need: little is padded."""
        return Blocks(_even(self.q, q_len), _even(self.kv, kv_len))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What both kernels know at compile time."""

    shape: masks.Shape
    scale: float
    forward_blocks: Blocks
    backward_blocks: Blocks
    interpret: Any
    """False, True or `pltpu.InterpretParams`."""


FORWARD_BLOCKS = Blocks(1024, 512)
BACKWARD_BLOCKS = Blocks(512, 512)


def unsupported(q_shape: tuple[int, ...], dtype) -> str | None:
    """Why these arguments cannot be taken, or None."""
    if jnp.dtype(dtype).name not in DTYPES:
        return f"takes q, k and v of {' or '.join(DTYPES)}, not {jnp.dtype(dtype).name}"
    head_dim = q_shape[3]
    if head_dim % SUBLANES or not 0 < head_dim <= MAX_HEAD_DIM:
        return (
            f"takes head widths in multiples of {SUBLANES} up to {MAX_HEAD_DIM}, "
            f"not {head_dim} (q has shape {tuple(q_shape)})"
        )
    return None


def attention(
    q_BLQH,
    k_BSKH,
    v_BSKH,
    *,
    shape: masks.Shape,
    ids: Ids,
    scale: float,
    interpret: Any = False,
    forward_blocks: Blocks | None = None,
    backward_blocks: Blocks | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels_pallas.attention.attention`. Returns the output and the log-sum-exp [B, Q, L],
    both differentiable.

    Args:
      interpret: False compiles for a TPU. True, or `pltpu.InterpretParams`, runs on any platform.
    """
    settings = _settings(q_BLQH, k_BSKH, shape, scale, interpret, forward_blocks, backward_blocks)
    return _attention(q_BLQH, k_BSKH, v_BSKH, ids, settings)


def gradients(
    q_BLQH,
    k_BSKH,
    v_BSKH,
    out_BLQH,
    lse_BQL,
    d_out_BLQH,
    *,
    shape: masks.Shape,
    ids: Ids,
    scale: float,
    interpret: Any = False,
    backward_blocks: Blocks | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk, dv, where the softmax may run over more keys than these: `out_BLQH` and `lse_BQL` are
    those of all of them.
    """
    from kernels_pallas.attention.pallas_tpu_backward import backward

    settings = _settings(q_BLQH, k_BSKH, shape, scale, interpret, None, backward_blocks)
    no_d_lse = jnp.zeros_like(lse_BQL)
    return backward(q_BLQH, k_BSKH, v_BSKH, ids, out_BLQH, lse_BQL, d_out_BLQH, no_d_lse, settings)


def _settings(
    q_BLQH,
    k_BSKH,
    shape,
    scale,
    interpret,
    forward_blocks: Blocks | None,
    backward_blocks: Blocks | None,
) -> Settings:
    """Checks what the kernels can take and where they can run."""
    reason = unsupported(q_BLQH.shape, q_BLQH.dtype)
    if reason:
        raise ValueError(f"attention: implementation 'pallas_tpu' {reason}")
    targets.check_tpu("attention", interpret)
    lengths = q_BLQH.shape[1], k_BSKH.shape[1]
    return Settings(
        shape,
        float(scale),
        (forward_blocks or FORWARD_BLOCKS).fitted(*lengths),
        (backward_blocks or BACKWARD_BLOCKS).fitted(*lengths),
        interpret,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q_BLQH, k_BSKH, v_BSKH, ids, settings):
    return _forward(q_BLQH, k_BSKH, v_BSKH, ids, settings)[0]


def _forward(q_BLQH, k_BSKH, v_BSKH, ids, settings):
    from kernels_pallas.attention import pallas_tpu_forward

    out_BLQH, lse_BQL = pallas_tpu_forward.forward(q_BLQH, k_BSKH, v_BSKH, ids, settings)
    return (out_BLQH, lse_BQL), (q_BLQH, k_BSKH, v_BSKH, ids, out_BLQH, lse_BQL)


def _backward(settings, residuals, cotangents):
    from kernels_pallas.attention import pallas_tpu_backward

    q_BLQH, k_BSKH, v_BSKH, ids, out_BLQH, lse_BQL = residuals
    d_out_BLQH, d_lse_BQL = cotangents
    found = pallas_tpu_backward.backward(
        q_BLQH, k_BSKH, v_BSKH, ids, out_BLQH, lse_BQL, d_out_BLQH, d_lse_BQL, settings
    )
    return *found, masks.no_gradient(ids)


_attention.defvjp(_forward, _backward)


def _even(block: int, length: int) -> int:
    count = -(-length // block)
    return -(-length // (count * LANES)) * LANES
