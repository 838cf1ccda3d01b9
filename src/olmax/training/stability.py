"""Tools of the stability study: spike score and growth exponent (OLMo 2 paper section 3;
specs/olmo2.md section 7).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from olmax.models.cross_entropy import cross_entropy
from olmax.models.decoder import Decoder
from olmax.training.objectives import next_token_targets


def spikes(
    values: Sequence[float] | np.ndarray, *, window: int = 1000, sigma: float = 7.0
) -> np.ndarray:
    """Which points are spikes, bool [n]: at least `sigma` standard deviations away from the mean of
    up to `window` values before them.

    Statistics in float64; the standard deviation has n in the denominator. A point with fewer than
    two values before it is no spike. OLMo-core's monitor uses window 128 and sigma 6.
    """
    x = np.asarray(values, np.float64)
    result = np.zeros(x.shape, bool)
    for i in range(2, len(x)):
        before = x[max(0, i - window) : i]
        deviation = abs(x[i] - before.mean())
        result[i] = deviation > 0 and deviation >= sigma * before.std()
    return result


def spike_score(
    values: Sequence[float] | np.ndarray, *, window: int = 1000, sigma: float = 7.0
) -> float:
    """Percentage of a series (losses or gradient norms, one value a step) that are `spikes`."""
    if len(values) == 0:
        return 0.0
    return 100 * float(spikes(values, window=window, sigma=sigma).mean())


def running_spike_score(
    values: Sequence[float] | np.ndarray,
    *,
    window: int = 128,
    sigma: float = 6.0,
    over: int = 10_000,
) -> np.ndarray:
    """The spike score of the last `over` steps at every step, in percent, float64 [n].

    With these defaults it is what OLMo-core's stability monitor shows.
    """
    flags = np.concatenate([[0], np.cumsum(spikes(values, window=window, sigma=sigma))])
    ends = np.arange(1, len(flags))
    starts = np.maximum(0, ends - over)
    return 100 * (flags[ends] - flags[starts]) / (ends - starts)


class GrowthExponents(NamedTuple):
    """ln(|v'| / |v|) / layers; 0 means that the magnitude stays over depth."""

    activations: float
    gradients: float


def growth_exponents(
    model: Decoder, tokens_BL: jax.Array, *, average: Literal["norms", "vectors"] = "norms"
) -> GrowthExponents:
    """How activations grow from the first layer's output to the last one's, and gradients of the
    loss with respect to them, per layer.

    Args:
      model: usually freshly initialised.
      tokens_BL: int32 documents (the paper: 50 random ones).
      average: what is averaged over documents and positions before |v'| and |v| are compared:
        the vectors' norms, or the vectors. The paper's text allows both readings.
    """

    @jax.jit
    def first_and_last(model, tokens_BL):
        x_BLD = model.embedder(tokens_BL)

        def loss(offsets_NBLD):
            outputs_NBLD = model.layer_outputs(x_BLD, offsets_NBLD)
            hidden_BLD = model.final_norm(outputs_NBLD[-1])
            targets_BL, valid_BL = next_token_targets({"tokens": tokens_BL})
            loss_BL, _ = cross_entropy(hidden_BLD, model.head_kernel(), targets_BL)
            return jnp.mean(loss_BL, where=valid_BL), outputs_NBLD

        zeros = jnp.zeros((model.config.n_layers, *x_BLD.shape), x_BLD.dtype)
        gradients, activations = jax.grad(loss, has_aux=True)(zeros)
        return activations[jnp.array([0, -1])], gradients[jnp.array([0, -1])]

    def exponent(pair_2BLD):
        pair_2BLD = pair_2BLD.astype(jnp.float32)
        if average == "norms":
            sizes = jnp.mean(jnp.linalg.norm(pair_2BLD, axis=-1), axis=(1, 2))
        else:
            sizes = jnp.linalg.norm(jnp.mean(pair_2BLD, axis=(1, 2)), axis=-1)
        return float(jnp.log(sizes[1] / sizes[0])) / model.config.n_layers

    activations, gradients = first_and_last(model, jnp.asarray(tokens_BL))
    return GrowthExponents(exponent(activations), exponent(gradients))
