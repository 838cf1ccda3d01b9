"""Sparse upcycling: experts out of the feed-forward blocks of a dense model (specs/olmoe.md section
3; Komatsuzaki et al., arXiv 2212.05055).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from olmax.errors import UserError
from olmax.models.config import MoEConfig
from olmax.models.decoder import Decoder

ROUTER_STD = 0.02


def upcycle(
    dense: Decoder, moe: MoEConfig, *, noise: float = 0.0, noise_std: float = 0.02, seed: int = 0
) -> Decoder:
    """A model whose experts all are the dense model's feed-forward block.

    Everything else is taken over; the router is drawn from N(0, 0.02), not truncated. With
    `moe.normalize_weights` the result computes what the dense model does; without, each
    feed-forward output is scaled by the sum of the chosen probabilities.

    Args:
      dense: stays as it is (its other parameters are shared).
      moe: a shared expert must be as wide as the block, of which it is another copy.
      noise: share of the experts' entries replaced by N(0, noise_std), drawn for each (the paper
        tried 0.5).
      noise_std: see `noise`.
      seed: of router and noise.

    Raises:
      UserError: the model has experts already, or a shared expert of another width.
    """
    if dense.config.moe is not None:
        raise UserError("upcycling starts from a dense model; this one has experts already")
    if moe.shared_d_ff not in (0, dense.config.d_ff):
        raise UserError(
            f"upcycling: moe.shared_d_ff={moe.shared_d_ff} must be 0 or the width of the dense "
            f"block, {dense.config.d_ff}"
        )
    if not 0 <= noise <= 1:
        raise UserError(f"upcycling: noise={noise} must lie between 0 and 1")
    config = dataclasses.replace(dense.config, moe=moe, init="normal")
    params = {
        ".".join(map(str, path)): leaf.get_value()
        for path, leaf in nnx.to_flat_state(nnx.state(dense, nnx.Param))
    }
    keys = jax.random.split(jax.random.key(seed), 3)
    gate_up_NDCF = params.pop("blocks.mlp.gate_up")
    gate_up_NCDF = jnp.swapaxes(gate_up_NDCF, 1, 2)
    down_NFD = params.pop("blocks.mlp.down")

    shape = (config.n_layers, config.d_model, moe.n_experts)
    router_NDE = ROUTER_STD * jax.random.normal(keys[0], shape)
    params |= {
        "blocks.moe.router": router_NDE.astype(down_NFD.dtype),
        "blocks.moe.gate_up": _copies(gate_up_NCDF, keys[1], noise_std, moe.n_experts, noise),
        "blocks.moe.down": _copies(down_NFD, keys[2], noise_std, moe.n_experts, noise),
    }
    if moe.shared_d_ff:
        params |= {
            "blocks.moe.shared.gate_up": gate_up_NDCF,
            "blocks.moe.shared.down": down_NFD,
        }
    graphdef, abstract = nnx.split(
        nnx.eval_shape(lambda: Decoder(config, dense.execution, rngs=nnx.Rngs(0)))
    )
    leaves = [
        (path, leaf.replace(params[".".join(map(str, path))]))
        for path, leaf in nnx.to_flat_state(abstract)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


@functools.partial(jax.jit, static_argnums=(3, 4))
def _copies(block, key, noise_std, n_experts: int, noise: float) -> jax.Array:
    """The block of every layer [N, ...] as experts [N, E, ...], a share `noise` drawn anew."""
    copies = jnp.repeat(block[:, None], n_experts, axis=1)
    if not noise:
        return copies
    which, what = jax.random.split(key)
    replaced = jax.random.uniform(which, copies.shape) < noise
    drawn = noise_std * jax.random.normal(what, copies.shape)
    return jnp.where(replaced, drawn.astype(copies.dtype), copies)
