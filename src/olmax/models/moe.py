"""Mixture of experts: a router and many SwiGLU blocks, of which every token passes through k.

Semantics of OLMoE (specs/olmoe.md section 1): a softmax over all experts, the k most likely ones
with those probabilities as weights, nothing dropped.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas.grouped_matmul import (
    choose,
    grouped_matmul,
    grouped_swiglu,
    take_rows,
    words,
)
from kernels_pallas.router import combine, dispatch, route
from olmax.models import parameters
from olmax.models.annotations import mesh_axes, on_mesh, per_device
from olmax.models.config import DecoderConfig, Execution
from olmax.models.expert_parallel import Exchange, exchange, exchange_plan
from olmax.models.expert_words import experts_by_words
from olmax.models.linear import project
from olmax.models.mlp import MLP


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterStatistics:
    """Sums over tokens that the auxiliary losses are made of, float32, for each group of tokens.

    A group (S) is what one device holds of the micro-batch, which is what the reference computes
    its losses from; without a mesh there is one. Layers may be stacked in front of all dimensions.
    """

    counts_SE: jax.Array
    """(token, slot) pairs sent to each expert."""
    probabilities_SE: jax.Array
    """Sum of the router's probabilities."""
    squared_logsumexp_S: jax.Array
    """Sum of log(sum(exp(logits)))^2."""
    tokens_S: jax.Array
    """Tokens, padding not counted."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingRecord:
    """What the router of one layer (or of all, stacked) did."""

    statistics: RouterStatistics
    experts_BLk: jax.Array | None
    """int32: experts of each token, the most likely first; None under expert choice."""


class MoE(nnx.Module):
    """Experts of every layer (parameters stacked on the leading `stack` dimensions)."""

    def __init__(self, config: DecoderConfig, execution: Execution, *, stack=(), rngs: nnx.Rngs):
        assert config.moe is not None
        self.config = config.moe
        self.execution = execution
        d, f, experts = config.d_model, config.d_ff, (config.moe.n_experts, "experts")
        normal = parameters.truncated_normal(config.init_std)
        dtype = execution.param_dtype
        self.router = parameters.param(
            rngs, normal, [*stack, (d, "embed"), (config.moe.n_experts, None)], dtype
        )
        self.gate_up = parameters.param(
            rngs, normal, [*stack, experts, (2, None), (d, "embed"), (f, "mlp")], dtype
        )
        self.down = parameters.param(
            rngs, normal, [*stack, experts, (f, "mlp"), (d, "embed")], dtype
        )
        if config.moe.shared_d_ff:
            dense = dataclasses.replace(config, d_ff=config.moe.shared_d_ff, moe=None)
            self.shared = MLP(dense, execution, stack=stack, rngs=rngs)

    def __call__(
        self, x_BLD: jax.Array, valid_BL: jax.Array | None = None
    ) -> tuple[jax.Array, RoutingRecord]:
        """Weighted sum of the experts' outputs, [B, L, D] in x's dtype, and what the router did.

        `valid_BL`, bool, marks tokens that are not padding: padding goes to no expert and counts
        in no statistic.
        """
        if valid_BL is None:
            valid_BL = jnp.ones(x_BLD.shape[:2], bool)
        token_choice = self.config.routing == "token_choice"
        tokens = ("batch", "length" if token_choice else None)
        outputs = [(*tokens, None)] * 4 if token_choice else [(*tokens, None)] * 3
        y_BLD, sums_11E, lse_tokens_112, *experts_BLk = per_device(
            self._token_choice if token_choice else self._expert_choice,
            [
                (*tokens, None),
                tokens,
                (None, None),
                ("experts", None, None, "mlp"),
                ("experts", "mlp", None),
            ],
            x_BLD,
            valid_BL,
            self.router[...],
            *(self._gathered(weight[...], x_BLD.dtype) for weight in (self.gate_up, self.down)),
            out_axes=outputs,
        )
        counts_SE, probabilities_SE = jnp.split(
            sums_11E.reshape(-1, 2 * self.config.n_experts), 2, axis=-1
        )
        lse_S, tokens_S = lse_tokens_112.reshape(-1, 2).T
        statistics = RouterStatistics(counts_SE, probabilities_SE, lse_S, tokens_S)
        if self.config.shared_d_ff:
            y_BLD = y_BLD + self.shared(x_BLD)
        return y_BLD, RoutingRecord(statistics, experts_BLk[0] if token_choice else None)

    @staticmethod
    def _gathered(weight: jax.Array, dtype) -> jax.Array:
        """What the devices exchange of a weight: in the dtype of the product where they do; else
        the float32 master, whose gradient then is not rounded.
        """
        return weight.astype(dtype) if on_mesh() else weight

    def _token_choice(self, x_BLD, valid_BL, router_DE, gate_up_ECDF, down_EFD):
        """One device's tokens: output, statistics and chosen experts."""
        config, execution = self.config, self.execution
        batch, length, d_model = x_BLD.shape
        x_TD = x_BLD.reshape(-1, d_model)
        logits_TE = project(x_TD.astype(jnp.float32), router_DE)
        routing = route(
            logits_TE,
            config.experts_per_token,
            valid_T=valid_BL.reshape(-1),
            implementation=execution.router,
        )
        weights_Tk = routing.weights_Tk
        if config.normalize_weights:
            weights_Tk = weights_Tk / jnp.maximum(
                jnp.sum(weights_Tk, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny
            )
        destinations_Tk, rows_M = dispatch(routing)
        axes = mesh_axes("experts", config.n_experts)
        if axes:
            # A token is sent to one device as often as it has experts there.
            most = x_TD.shape[0] * min(config.experts_per_token, gate_up_ECDF.shape[0])
            plan = exchange_plan(routing.counts_E, rows=rows_M.shape[0], most=most, axes=axes)
            # Padding has no expert: its rows stand behind the others, go nowhere, and what stands
            # in their place afterwards is undefined. So nobody reads it.
            sent = jnp.sum(routing.counts_E)
            destinations_Tk = jnp.where(destinations_Tk < sent, destinations_Tk, rows_M.shape[0])
            if self._takes_words(x_TD.dtype, gate_up_ECDF.shape):
                y_TD = experts_by_words(
                    *(x_TD, weights_Tk, gate_up_ECDF, down_EFD),
                    *(destinations_Tk, rows_M, plan, axes),
                )
            else:
                x_MD = take_rows(x_TD, rows_M, sent, destinations_Tk)
                y_MD = self._experts_elsewhere(x_MD, plan, gate_up_ECDF, down_EFD, axes)
                y_TD = self._combine(y_MD, destinations_Tk, weights_Tk)
        else:
            y_MD = self._experts(
                *(x_TD, routing.counts_E, rows_M, gate_up_ECDF, down_EFD),
                readers_Tk=destinations_Tk,
            )
            y_TD = self._combine(y_MD, destinations_Tk, weights_Tk)
        y_TD = _sum_over(y_TD, mesh_axes("mlp", self._d_ff))
        return (
            y_TD.reshape(x_BLD.shape),
            *_sums(
                routing.counts_E,
                routing.probability_sum_E,
                routing.squared_logsumexp_sum,
                valid_BL,
            ),
            routing.experts_Tk.reshape(batch, length, -1),
        )

    def _expert_choice(self, x_BLD, valid_BL, router_DE, gate_up_ECDF, down_EFD):
        """One device's sequences: output and statistics."""
        config = self.config
        batch, length, d_model = x_BLD.shape
        logits_BLE = project(x_BLD.astype(jnp.float32), router_DE)
        probabilities_BLE = jax.nn.softmax(logits_BLE, axis=-1) * valid_BL[..., None]
        taken = max(1, length * config.experts_per_token // config.n_experts)
        weights_BEM, places_BEM = jax.lax.top_k(jnp.swapaxes(probabilities_BLE, 1, 2), taken)
        rows_BEM = places_BEM + length * jnp.arange(batch)[:, None, None]
        rows_M = jnp.swapaxes(rows_BEM, 0, 1).reshape(-1)
        weights_M = jnp.swapaxes(weights_BEM, 0, 1).reshape(-1)
        counts_E = jnp.full((config.n_experts,), batch * taken, jnp.int32)
        axes = mesh_axes("experts", config.n_experts)
        x_TD = x_BLD.reshape(-1, d_model)
        if axes:
            most = gate_up_ECDF.shape[0] * batch * taken
            plan = exchange_plan(counts_E, rows=rows_M.shape[0], most=most, axes=axes)
            y_MD = self._experts_elsewhere(x_TD[rows_M], plan, gate_up_ECDF, down_EFD, axes)
        else:
            y_MD = self._experts(x_TD, counts_E, rows_M, gate_up_ECDF, down_EFD)
        y_MD = y_MD.astype(jnp.float32) * weights_M[:, None]
        y_TD = jnp.zeros(x_TD.shape, jnp.float32).at[rows_M].add(y_MD).astype(x_TD.dtype)
        y_TD = _sum_over(y_TD, mesh_axes("mlp", self._d_ff))
        squared_lse = jnp.sum(jnp.square(jax.nn.logsumexp(logits_BLE, axis=-1)), where=valid_BL)
        probability_E = jnp.sum(probabilities_BLE, axis=(0, 1))
        return y_TD.reshape(x_BLD.shape), *_sums(counts_E, probability_E, squared_lse, valid_BL)

    @property
    def _d_ff(self) -> int:
        return self.down.shape[-2]

    def _combine(self, y_MD, destinations_Tk, weights_Tk):
        return combine(y_MD, destinations_Tk, weights_Tk, implementation=self.execution.router)

    def _takes_words(self, dtype, gate_up_shape: tuple[int, ...]) -> bool:
        """Whether rows go to other devices and back as words: by our kernels, on TPUs."""
        widths = gate_up_shape[-2:]
        kernels = self.execution.experts or choose(dtype, widths, gathers=False)
        combined = self.execution.router or "xla"
        return (kernels, combined) == ("pallas_tpu", "xla") and words.suits(dtype, *widths)

    def _experts(
        self, x_TD, counts_E, rows_M, gate_up_ECDF, down_EFD, readers_Tk=None, expected_rows=None
    ):
        """Outputs of experts whose rows lie one expert after the other: [M, D]. `readers_Tk`:
        the rows of each token, where they are known; `expected_rows`: where M is a bound only.
        """
        how: dict[str, Any] = dict(
            expected_rows=expected_rows, implementation=self.execution.experts
        )
        h_MF = grouped_swiglu(
            x_TD, gate_up_ECDF, counts_E, rows_M=rows_M, readers_Tr=readers_Tk, **how
        )
        return grouped_matmul(h_MF, down_EFD, counts_E, **how)

    def _experts_elsewhere(self, x_MD, plan: Exchange, gate_up_ECDF, down_EFD, axes):
        """The same for rows sorted by expert, on the devices that hold the experts, and back."""
        x_RD = exchange(x_MD, plan, axes)
        # With balanced experts a device gets as many rows as it sent.
        y_RD = self._experts(
            *(x_RD, plan.counts_E, None, gate_up_ECDF, down_EFD), expected_rows=plan.rows_back
        )
        return exchange(y_RD, plan.reversed(), axes)


def _sums(counts_E, probability_E, squared_lse, valid_BL):
    """Statistics of one device with dimensions in front for its batch and its length."""
    tokens = jnp.sum(valid_BL)
    pairs = jnp.concatenate([counts_E, probability_E]).astype(jnp.float32)
    return pairs[None, None], jnp.stack([squared_lse, tokens]).astype(jnp.float32)[None, None]


def _sum_over(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.psum(x, axes) if axes else x
