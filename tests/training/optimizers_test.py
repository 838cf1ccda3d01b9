"""Decay masks, one AdamW step against numpy, clipping, skipped steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from olmax.errors import UserError
from olmax.models import Decoder, get_preset
from olmax.training.names import named_leaves
from olmax.training.optimizers import AdamWConfig, SkipStepConfig, decay_mask, make_optimizer
from tests.training.tiny_training import MODEL


def abstract_params(config):
    return jax.eval_shape(lambda: nnx.state(Decoder(config, rngs=nnx.Rngs(0))))


def test_everything_but_the_embedding_is_decayed():
    mask = named_leaves(decay_mask(AdamWConfig().no_decay, abstract_params(MODEL)))
    assert {name for name, decayed in mask.items() if not decayed} == {"embedder.embedding"}
    assert {"final_norm.scale", "head.kernel", "blocks.attention.q_norm.scale"} <= set(mask)


def test_patterns_choose_parameters():
    mask = named_leaves(decay_mask(("*norm*", "head.kernel"), abstract_params(MODEL)))
    kept = {name for name, decayed in mask.items() if decayed}
    assert kept == {
        "embedder.embedding",
        "blocks.attention.qkv",
        "blocks.attention.out",
        "blocks.mlp.gate_up",
        "blocks.mlp.down",
    }


def test_a_tied_embedding_is_not_decayed_as_a_head():
    params = abstract_params(get_preset("llama3.1-tiny"))
    mask = named_leaves(decay_mask(AdamWConfig().no_decay, params))
    assert "head.kernel" not in mask and mask["embedder.embedding"] is False


def test_a_pattern_without_a_match_is_an_error():
    with pytest.raises(UserError, match=r"'embedding' matches no parameter.*embedder\.embedding"):
        make_optimizer(AdamWConfig(no_decay=("embedding",)), abstract_params(MODEL))


def numpy_adamw(p, g, m, v, count, lr, config, decayed):
    m = config.beta1 * m + (1 - config.beta1) * g
    v = config.beta2 * v + (1 - config.beta2) * g * g
    p = p * (1 - lr * config.weight_decay * decayed)
    m_hat, v_hat = m / (1 - config.beta1**count), v / (1 - config.beta2**count)
    return p - lr * m_hat / (np.sqrt(v_hat) + config.eps), m, v


@pytest.mark.parametrize("scale", [0.01, 10.0], ids=["unclipped", "clipped"])
def test_steps_equal_numpy(scale):
    config = AdamWConfig(no_decay=("a",))
    rng = np.random.default_rng(0)
    expected = {name: rng.normal(size=(3, 4)) for name in "ab"}
    params = jax.tree.map(jnp.float32, expected)
    tx = make_optimizer(config, params)
    state = tx.init(params)
    moments = dict.fromkeys("ab", (0.0, 0.0))
    for count, lr in ((1, 1e-2), (2, 3e-3)):
        grads = {name: scale * rng.normal(size=(3, 4)) for name in "ab"}
        updates, state = tx.update(
            jax.tree.map(jnp.float32, grads),
            state,
            params,
            learning_rate=lr,
            loss=1.0,
            grad_norm=1.0,
        )
        params = optax.apply_updates(params, updates)
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        assert (norm > 1) == (scale == 10.0)
        for name in "ab":
            clipped = grads[name] / max(norm, 1.0)
            expected[name], *moments[name] = numpy_adamw(
                expected[name], clipped, *moments[name], count, lr, config, name == "b"
            )
            np.testing.assert_allclose(params[name], expected[name], rtol=1e-5)


def test_eps_is_outside_the_root():
    # With a gradient as small as eps the two placements differ by orders of magnitude.
    params = {"a": jnp.zeros((1,))}
    tx = make_optimizer(AdamWConfig(no_decay=()), params)
    update, _ = tx.update(
        {"a": jnp.array([1e-8])}, tx.init(params), params, learning_rate=1.0, loss=0, grad_norm=0
    )
    np.testing.assert_allclose(update["a"], -0.5, rtol=1e-5)


class Skipper:
    """An optimiser with skipping, fed with losses and gradient norms."""

    def __init__(self, **changes):
        self.params = {"a": jnp.ones((2,))}
        config = AdamWConfig(no_decay=(), skip_step=SkipStepConfig(enabled=True, **changes))
        tx = make_optimizer(config, self.params)
        self.state = tx.init(self.params)

        @jax.jit
        def step(params, state, grads, loss, grad_norm):
            updates, state = tx.update(
                grads, state, params, learning_rate=0.1, loss=loss, grad_norm=grad_norm
            )
            return optax.apply_updates(params, updates), state

        self._step = step

    def feed(self, loss, grad_norm=1.0, gradient=0.1):
        """Whether the step was skipped; skipped steps must change nothing."""
        before = (self.params, self.state.inner)
        grads = {"a": jnp.full((2,), gradient)}
        self.params, self.state = self._step(
            self.params, self.state, grads, jnp.float32(loss), jnp.float32(grad_norm)
        )
        same = jax.tree.all(
            jax.tree.map(lambda x, y: bool((x == y).all()), before, (self.params, self.state.inner))
        )
        skipped = bool(self.state.skipped)
        assert same == skipped
        return skipped


def noise(n, seed=0):
    return 3 + 0.1 * np.random.default_rng(seed).normal(size=n)


def test_nothing_is_skipped_before_half_a_window_is_known():
    skipper = Skipper()
    assert not any(skipper.feed(loss) for loss in noise(63))
    assert not skipper.feed(100.0)


@pytest.mark.parametrize("which", ["loss", "grad_norm"])
def test_spikes_are_skipped_and_small_deviations_are_not(which):
    skipper = Skipper()
    values = noise(64)
    for value in values:
        assert not skipper.feed(**{"loss": 3.0, "grad_norm": 1.0} | {which: value})
    mean, std = values.mean(), values.std(ddof=1)
    spike = {"loss": 3.0, "grad_norm": 1.0} | {which: mean + 6.1 * std}
    assert skipper.feed(**spike)
    fine = {"loss": 3.0, "grad_norm": 1.0} | {which: mean + 5.0 * std}
    assert not skipper.feed(**fine)
    low = {"loss": 3.0, "grad_norm": 1.0} | {which: mean - 20 * std}
    assert not skipper.feed(**low)


def test_the_window_forgets_and_a_lasting_rise_is_accepted():
    skipper = Skipper(window=16)
    for value in noise(40):
        skipper.feed(value)
    rise = [skipper.feed(value) for value in noise(40, seed=1) + 5]
    assert rise[0] and not any(rise[16:])


def test_values_that_are_not_finite_are_skipped_and_not_remembered():
    skipper = Skipper()
    for value in noise(70):
        skipper.feed(value)
    assert skipper.feed(float("nan"), gradient=float("nan"))
    assert skipper.feed(3.0, grad_norm=float("inf"), gradient=float("inf"))
    assert not skipper.feed(3.0)
    assert np.isfinite(skipper.params["a"]).all()
