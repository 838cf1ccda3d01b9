"""Attention on GPUs by cuDNN's flash attention, through jax's documented function.

Never run here, for want of a GPU: it can be asked for by name and is nobody's default. Lowering for
CUDA is all that is tested.
"""

import jax
import jax.numpy as jnp

from kernels_pallas import targets
from kernels_pallas.attention import masks

MAX_HEAD_DIM = 128


def unsupported(q_shape: tuple[int, ...], dtype, shape: masks.Shape, ids: masks.Ids) -> str | None:
    """Why these arguments cannot be taken, or None."""
    if jnp.dtype(dtype).name not in ("bfloat16", "float16"):
        return f"takes q, k and v of bfloat16 or float16, not {jnp.dtype(dtype).name}"
    if q_shape[3] % 8 or q_shape[3] > MAX_HEAD_DIM:
        return f"takes head widths in multiples of 8 up to {MAX_HEAD_DIM}, not {q_shape[3]}"
    if shape.q_offset != 0 or (shape.causal and shape.q_len != shape.kv_len):
        return "takes whole sequences: q_offset 0 and as many keys as queries"
    if any(x is not None for x in (ids.segments, ids.subsegments, ids.mask)):
        return "takes causal and window alone: a dense mask would be slower than 'blocked'"
    return None


def attention(
    q_BLQH,
    k_BSKH,
    v_BSKH,
    *,
    shape: masks.Shape,
    ids: masks.Ids,
    scale: float,
    need_lse: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels_pallas.attention.attention`. The log-sum-exp is empty unless `need_lse`."""
    reason = unsupported(q_BLQH.shape, q_BLQH.dtype, shape, ids)
    if reason is None and need_lse:
        reason = "has no differentiable log-sum-exp: return_lse is not for it"
    if reason:
        raise ValueError(f"attention: implementation 'cudnn' {reason}")
    if targets.platform() not in ("gpu", "cuda"):
        raise ValueError(
            f"attention: implementation 'cudnn' cannot run on {targets.platform()}; it needs a GPU"
        )
    window = None
    if shape.window is not None:
        window = (shape.window - 1, 0 if shape.causal else shape.window - 1)
    out_BLQH = jax.nn.dot_product_attention(
        q_BLQH,
        k_BSKH,
        v_BSKH,
        scale=scale,
        is_causal=shape.causal,
        local_window_size=window,
        implementation="cudnn",
    )
    return out_BLQH, jnp.zeros((0,), jnp.float32)
