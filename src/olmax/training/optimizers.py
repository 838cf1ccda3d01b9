"""AdamW as OLMo 2 uses it (specs/olmo2.md section 4), built from optax parts."""

import dataclasses
import fnmatch
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from olmax.errors import UserError
from olmax.training.names import map_named, named_leaves


@dataclasses.dataclass(frozen=True)
class SkipStepConfig:
    """Leaving out updates on spikes of the loss or the gradient norm, as OLMo 2 32B did."""

    enabled: bool = False
    window: int = 128
    """Steps whose loss and gradient norm a new value is compared with."""
    sigma: float = 6.0
    """Standard deviations above their mean from which a step is skipped."""


@dataclasses.dataclass(frozen=True)
class AdamWConfig:
    """AdamW with decoupled weight decay: p <- p * (1 - lr * weight_decay) - lr * adam."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    no_decay: tuple[str, ...] = ("embedder.embedding",)
    """Parameters without weight decay: patterns (`*`, `?`, `[...]`) over the dotted paths of
    docs/architecture.md. OLMo 2 decays everything but the input embedding: norms and head too. A
    tied embedding is one matrix, so it is not decayed as a head either."""
    clip_norm: float | None = 1.0
    """Largest global L2 norm of the gradient; None does not clip."""
    skip_step: SkipStepConfig = SkipStepConfig()


class SkipStepState(NamedTuple):
    """State of `skip_step`. The windows are rings in float32; `count` values were ever written."""

    inner: Any
    losses: jax.Array
    grad_norms: jax.Array
    count: jax.Array
    skipped: jax.Array
    """bool: whether the last update was left out."""


def make_optimizer(config: AdamWConfig, params: Any) -> optax.GradientTransformationExtraArgs:
    """The optimiser for a tree of parameters (arrays or their shapes).

    `update` takes the keyword arguments `learning_rate`, `loss` and `grad_norm`: scalars of this
    step, the last two from before clipping.

    Raises:
      UserError: a pattern of `no_decay` matches no parameter.
    """
    parts = []
    if config.clip_norm is not None:
        parts.append(("clip", optax.clip_by_global_norm(config.clip_norm)))
    parts.append(("adam", optax.scale_by_adam(config.beta1, config.beta2, config.eps)))
    if config.weight_decay:
        mask = decay_mask(config.no_decay, params)
        parts.append(("decay", optax.add_decayed_weights(config.weight_decay, mask)))
    parts.append(("rate", _descend()))
    optimizer = optax.named_chain(*parts)
    if config.skip_step.enabled:
        optimizer = skip_step(optimizer, config.skip_step)
    return optax.with_extra_args_support(optimizer)


def decay_mask(no_decay: tuple[str, ...], params: Any) -> Any:
    """A tree like `params` of bools: whether weight decay applies.

    Raises:
      UserError: a pattern matches no parameter.
    """
    names = list(named_leaves(params))
    for pattern in no_decay:
        if not fnmatch.filter(names, pattern):
            raise UserError(
                f"optimizer.no_decay: {pattern!r} matches no parameter; there are "
                f"{', '.join(names)}"
            )
    return map_named(
        lambda name, _: not any(fnmatch.fnmatchcase(name, pattern) for pattern in no_decay), params
    )


def _descend() -> optax.GradientTransformationExtraArgs:
    """Scales by minus the `learning_rate` given to `update`."""

    def init(params):
        del params
        return optax.EmptyState()

    def update(updates, state, params=None, *, learning_rate, **_):
        del params
        return jax.tree.map(lambda u: -learning_rate * u, updates), state

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def skip_step(
    inner: optax.GradientTransformation, config: SkipStepConfig
) -> optax.GradientTransformationExtraArgs:
    """Leaves a step out (parameters and moments unchanged) when it looks like a spike.

    That is when the loss or the gradient norm lies more than `sigma` standard deviations (n - 1 in
    the denominator) above its mean over the last `window` steps, once half a window is known, or is
    not finite. Finite values enter the window even when skipped, so a lasting rise is accepted
    after a while. The decision is made on the device. Source: SkipStepAdamW of OLMo-core.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params):
        window = jnp.zeros((config.window,), jnp.float32)
        return SkipStepState(
            inner.init(params), window, window, jnp.zeros((), jnp.int32), jnp.zeros((), bool)
        )

    def update(updates, state, params=None, *, loss, grad_norm, **extra):
        known = jnp.minimum(state.count, config.window)
        valid = jnp.arange(config.window) < known

        def spikes(value, window):
            mean = jnp.sum(window, where=valid) / jnp.maximum(known, 1)
            variance = jnp.sum(jnp.square(window - mean), where=valid) / jnp.maximum(known - 1, 1)
            return value - mean > config.sigma * jnp.sqrt(variance)

        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        spike = spikes(loss, state.losses) | spikes(grad_norm, state.grad_norms)
        skipped = ~finite | (spike & (known >= config.window // 2))
        new_updates, new_inner = inner.update(updates, state.inner, params, **extra)
        # Selected, not multiplied by zero: infinite gradients must not reach the parameters.
        new_updates = jax.tree.map(lambda u: jnp.where(skipped, 0, u), new_updates)
        new_inner = jax.tree.map(
            lambda new, old: jnp.where(skipped, old, new), new_inner, state.inner
        )
        slot = state.count % config.window
        return new_updates, SkipStepState(
            inner=new_inner,
            losses=jnp.where(finite, state.losses.at[slot].set(loss), state.losses),
            grad_norms=jnp.where(
                finite, state.grad_norms.at[slot].set(grad_norm), state.grad_norms
            ),
            count=state.count + finite,
            skipped=skipped,
        )

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
