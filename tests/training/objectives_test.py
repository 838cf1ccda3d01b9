"""The next-token objective against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from olmax.models import Decoder
from olmax.training.metrics import Mean
from olmax.training.objectives import NextToken, next_token_targets
from tests.training.tiny_training import MODEL

TOKENS = np.random.default_rng(0).integers(0, MODEL.vocab_size, (3, 16)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    return Decoder(MODEL, rngs=nnx.Rngs(0))


def numpy_losses(model, batch):
    """Per position: cross-entropy and log-sum-exp in float64, targets shifted by one."""
    logits = np.asarray(model(batch["tokens"], segment_ids_BL=batch.get("segment_ids")), np.float64)
    lse = np.log(np.exp(logits).sum(-1))
    targets = np.concatenate([batch["tokens"][:, 1:], batch["tokens"][:, :1]], axis=1)
    return lse - np.take_along_axis(logits, targets[..., None], -1)[..., 0], lse


def some_mask():
    mask = np.random.default_rng(1).random(TOKENS.shape) < 0.6
    mask[1] = False  # A whole instance masked out, as by the repetition filter.
    return mask


@pytest.mark.parametrize("denominator", ["targets", "tokens"])
@pytest.mark.parametrize("coefficient", [1e-5, 1e-4, 0.1])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_equals_numpy(model, denominator, coefficient, masked):
    batch = {"tokens": TOKENS} | ({"loss_mask": some_mask()} if masked else {})
    loss, metrics = NextToken(coefficient, denominator)(model, batch, jax.random.key(0))
    ce, lse = numpy_losses(model, batch)
    counts = np.ones(TOKENS.shape) if not masked else some_mask().astype(float)
    weights = np.concatenate([counts[:, 1:], np.zeros((3, 1))], axis=1)
    divisor = weights.sum() if denominator == "targets" else TOKENS.size
    z = coefficient * (weights * lse**2).sum() / divisor
    np.testing.assert_allclose(loss.value, (weights * ce).sum() / divisor + z, rtol=1e-5)
    np.testing.assert_allclose(metrics["z_loss"].value, z, rtol=1e-5)
    np.testing.assert_allclose(
        metrics["cross_entropy"].value, (weights * ce).sum() / weights.sum(), rtol=1e-5
    )


def test_gradient_of_z_loss_equals_numpy(model):
    batch = {"tokens": TOKENS}
    hidden = np.asarray(model.hidden(TOKENS), np.float64)

    def loss(kernel, coefficient):
        changed = nnx.clone(model)
        changed.head.kernel[...] = kernel
        return NextToken(coefficient)(changed, batch, jax.random.key(0))[0].value

    kernel = model.head.kernel[...]
    gradient = jax.grad(loss)(kernel, 0.5) - jax.grad(loss)(kernel, 0.0)
    logits = hidden[:, :-1].reshape(-1, 16) @ np.asarray(kernel, np.float64)
    lse = np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = hidden[:, :-1].reshape(-1, 16).T @ (2 * 0.5 * lse * np.exp(logits - lse)) / len(lse)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_targets_respect_the_end_of_a_row_segments_padding_and_mask():
    tokens = jnp.arange(8)[None]
    segments = jnp.array([[1, 1, 1, 2, 2, 3, 0, 0]])
    mask = jnp.array([[1, 1, 0, 1, 1, 1, 1, 1]], bool)
    targets, valid = next_token_targets({"tokens": tokens})
    assert targets[0, :7].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert valid[0].tolist() == [True] * 7 + [False]
    _, valid = next_token_targets({"tokens": tokens, "segment_ids": segments})
    assert valid[0].tolist() == [True, True, False, True, False, False, False, False]
    _, valid = next_token_targets({"tokens": tokens, "segment_ids": segments, "loss_mask": mask})
    assert valid[0].tolist() == [True, False, False, True, False, False, False, False]


def test_masked_targets_contribute_nothing(model):
    mask = np.ones(TOKENS.shape, bool)
    mask[:, -1] = False
    changed = TOKENS.copy()
    changed[:, -1] = (changed[:, -1] + 1) % MODEL.vocab_size
    objective = NextToken(0.1)
    losses = [
        objective(model, {"tokens": tokens, "loss_mask": mask}, jax.random.key(0))[0]
        for tokens in (TOKENS, changed)
    ]
    assert losses[0].total == losses[1].total
    assert losses[0].weight == 3 * 14


def test_means_add_up_by_weight():
    left = Mean.of(jnp.array([1.0, 2.0, 9.0]), jnp.array([True, True, False]))
    right = Mean.of(jnp.array([6.0]), jnp.array([1.0]))
    assert (left + right).value == 3.0
    assert Mean.of(jnp.ones((2,)), jnp.zeros((2,))).value == 0.0
