"""Which tokens can be drawn, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmax.generation.sampling import keep_likely, row_key, sample

PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.3, 0.15])


def draw(n=20_000, *, temperature=1.0, top_k=0, top_p=1.0):
    logits_BV = jnp.broadcast_to(jnp.log(PROBABILITIES), (n, 5)).astype(jnp.float32)
    keys = jax.vmap(row_key)(
        jnp.stack([jnp.zeros(n, jnp.uint32), jnp.arange(n, dtype=jnp.uint32)], 1)
    )
    tokens = sample(
        logits_BV,
        keys,
        greedy=temperature == 0,
        filters=top_k > 0 or top_p < 1,
        temperature=jnp.float32(temperature),
        top_k=jnp.int32(top_k),
        top_p=jnp.float32(top_p),
    )
    return np.bincount(np.asarray(tokens), minlength=5) / n


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (dict(), [0, 1, 2, 3, 4]),
        (dict(top_k=2), [1, 3]),
        (dict(top_p=0.69), [1, 3]),
        (dict(top_p=0.71), [1, 3, 4]),
        (dict(top_p=0.01), [1]),
        # top_p counts what top_k left: 4/7 of the mass is on the first of two.
        (dict(top_k=2, top_p=0.55), [1]),
        (dict(top_k=2, top_p=0.6), [1, 3]),
    ],
)
def test_frequencies_are_the_renormalised_probabilities(settings, kept):
    wanted = np.zeros(5)
    wanted[kept] = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
    np.testing.assert_allclose(draw(**settings), wanted, atol=0.015)


def test_temperature():
    np.testing.assert_array_equal(draw(10, temperature=0), [0, 1, 0, 0, 0])
    sharp = PROBABILITIES**2 / (PROBABILITIES**2).sum()
    np.testing.assert_allclose(draw(temperature=0.5), sharp, atol=0.015)


def test_the_first_token_always_stays():
    logits = jnp.array([[3.0, 2.0, 1.0]])
    kept = keep_likely(logits, jnp.int32(0), jnp.float32(1e-9))
    np.testing.assert_array_equal(jnp.isfinite(kept), [[True, False, False]])
