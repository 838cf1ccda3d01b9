"""Auxiliary losses of routers: load balancing and router z-loss (specs/olmoe.md section 1)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from olmax.models.config import MoEConfig
from olmax.models.moe import RouterStatistics


@dataclasses.dataclass(frozen=True)
class RouterLosses:
    """Weights and normalisation of the auxiliary losses. The defaults are what trained OLMoE.

    The paper writes the z-loss without the division by k: `divide_z_by_top_k=False`.
    """

    load_balance: float = 0.01
    """Weight of E * sum_e f_e P_e (mean over layers), f the share of (token, slot) pairs that an
    expert gets and P its mean probability. Perfect balance costs this weight; under expert choice
    it is a constant."""
    z: float = 0.001
    """Weight of the mean over layers and tokens of log(sum(exp(logits)))^2."""
    divide_z_by_top_k: bool = True
    """Whether that mean is also divided by k, as the training code did (the effective weight of
    OLMoE is 0.001 / 8)."""
    statistics: Literal["device", "global"] = "device"
    """Tokens that f and P are taken over: those of one device's micro-batch, as the reference, or
    those of the micro-batch on all devices, which asks for balance over all of them only."""


def router_losses(
    statistics: RouterStatistics, moe: MoEConfig, weights: RouterLosses
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted auxiliary loss of one micro-batch and its metrics, float32 scalars.

    Metrics: `load_balance_loss` and `router_z_loss` as they enter the loss; `max_violation`, how
    much more than its share the fullest expert gets (0: balance); `min_load`, the share of the
    emptiest (1: balance, 0: dead). The last two are means over layers, of all devices together.

    Args:
      statistics: of all layers (stacked in front).
      moe: of the model.
      weights: see `RouterLosses`.
    """
    counts_NSE, sums_NSE = statistics.counts_SE, statistics.probabilities_SE
    tokens_NS = statistics.tokens_S
    whole_NE = jnp.sum(counts_NSE, axis=1)
    if weights.statistics == "global":
        counts_NSE, sums_NSE, tokens_NS = (
            jnp.sum(x, axis=1, keepdims=True) for x in (counts_NSE, sums_NSE, tokens_NS)
        )
    some_NS = jnp.maximum(tokens_NS, 1)
    total = jnp.maximum(jnp.sum(tokens_NS[0]), 1)
    f_NSE = jax.lax.stop_gradient(counts_NSE) / (some_NS * moe.experts_per_token)[..., None]
    p_NSE = sums_NSE / some_NS[..., None]
    balance_NS = moe.n_experts * jnp.sum(f_NSE * p_NSE, axis=-1)
    balance = jnp.mean(jnp.sum(balance_NS * tokens_NS, axis=-1)) / total
    z = jnp.mean(jnp.sum(statistics.squared_logsumexp_S, axis=-1)) / total
    if weights.divide_z_by_top_k:
        z = z / moe.experts_per_token
    balance, z = weights.load_balance * balance, weights.z * z
    mean_N1 = jnp.maximum(jnp.mean(whole_NE, axis=-1, keepdims=True), 1e-9)
    return balance + z, {
        "load_balance_loss": balance,
        "router_z_loss": z,
        "max_violation": jnp.mean(jnp.max(whole_NE / mean_N1, axis=-1)) - 1,
        "min_load": jnp.mean(jnp.min(whole_NE / mean_N1, axis=-1)),
    }
