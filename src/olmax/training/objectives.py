"""Objectives: `(model, batch, rng) -> (Mean, dict[str, Mean])`.

An objective is a frozen dataclass with `__call__`, so that its settings are part of the stored
configuration. The trainer differentiates `Mean.total`, adds totals and weights over micro-batches
and divides once.
"""

import dataclasses
from typing import Literal, Protocol

import jax
import jax.numpy as jnp

from olmax.models.cross_entropy import cross_entropy
from olmax.models.decoder import Decoder
from olmax.training.metrics import Mean
from olmax.training.router_losses import RouterLosses, router_losses

Batch = dict[str, jax.Array]


class Objective(Protocol):
    """What the trainer needs: the loss to minimise and further metrics of one micro-batch."""

    def __call__(self, model, batch: Batch, rng: jax.Array) -> tuple[Mean, dict[str, Mean]]: ...


def next_token_targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Targets int32 [B, L] and which of them count, bool [B, L].

    The target of a position is the next token of the row. The last position has none; neither has
    one whose next token is excluded by `loss_mask`, lies in another segment or is padding.
    """
    tokens_BL = batch["tokens"]
    length = tokens_BL.shape[1]
    targets_BL = jnp.roll(tokens_BL, -1, axis=1)
    valid_BL = jnp.broadcast_to(jnp.arange(length) < length - 1, tokens_BL.shape)
    if "loss_mask" in batch:
        valid_BL &= jnp.roll(batch["loss_mask"], -1, axis=1).astype(bool)
    if "segment_ids" in batch:
        segments_BL = batch["segment_ids"]
        valid_BL &= (segments_BL == jnp.roll(segments_BL, -1, axis=1)) & (segments_BL != 0)
    return targets_BL, valid_BL


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the next token, in nats, plus z-loss, plus the auxiliary losses of routers.

    Released OLMo 2 models differ from their configurations (specs/olmo2.md sections 3 and 4): the
    1B, 7B and 13B configurations say 1e-5, but the trainer that made them never read the value and
    used 1e-4, and it divided by all tokens of the batch. The 32B used 1e-5 and the valid targets.
    """

    z_loss: float = 1e-5
    """Coefficient of the mean squared log-sum-exp of the logits."""
    denominator: Literal["targets", "tokens"] = "targets"
    """`targets`: mean over the tokens that count. `tokens`: the sum over those divided by all B * L
    tokens, masked ones and the missing last target included."""
    router: RouterLosses = RouterLosses()
    """Of models with experts."""

    def __call__(self, model: Decoder, batch: Batch, rng: jax.Array) -> tuple[Mean, dict]:
        """Loss, and the metrics `cross_entropy` (always per valid target), `z_loss` (as it enters
        the loss) and, with experts, those of `router_losses`.
        """
        del rng
        hidden_BLD, routing = model.hidden_and_routing(
            batch["tokens"],
            positions_BL=batch.get("positions"),
            segment_ids_BL=batch.get("segment_ids"),
        )
        targets_BL, valid_BL = next_token_targets(batch)
        ce_BL, lse_BL = cross_entropy(
            hidden_BLD,
            model.head_kernel(),
            targets_BL,
            implementation=model.execution.loss,
        )
        ce = Mean.of(ce_BL, valid_BL)
        z = Mean.of(self.z_loss * jnp.square(lse_BL), valid_BL)
        weight = ce.weight
        if self.denominator == "tokens":
            weight = jnp.full_like(weight, valid_BL.size)
        total = ce.total + z.total
        metrics = {"cross_entropy": ce, "z_loss": Mean(z.total, weight)}
        moe = model.config.moe
        if routing is not None and moe is not None:
            # Weighed like the loss, so that micro-batches count by their tokens.
            extra, found = router_losses(routing.statistics, moe, self.router)
            total += extra * weight
            metrics |= {name: Mean(value * weight, weight) for name, value in found.items()}
        return Mean(total, weight), metrics
