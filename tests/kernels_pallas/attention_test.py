"""Every implementation of attention against the reference: values and gradients, odd shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import attention

# The TPU kernel runs on TPUs only; it is compiled for them by the planner's tests.
IMPLEMENTATIONS = ["blocked"]

# batch, queries, keys, query heads, key heads, head width, offset of the queries
SHAPES = {
    "one block": (2, 64, 64, 4, 4, 32, 0),
    "grouped, ragged last block": (2, 200, 200, 6, 2, 16, 0),
    "many blocks": (1, 300, 300, 2, 1, 8, 0),
    "one token": (1, 1, 1, 2, 2, 8, 0),
    "queries at the end of a cache": (2, 5, 150, 4, 2, 16, 145),
    "keys behind the queries": (1, 40, 200, 2, 2, 8, 10),
}


def inputs(shape, dtype=jnp.float32, seed=0):
    batch, q_len, kv_len, q_heads, kv_heads, width, offset = shape
    keys = jax.random.split(jax.random.key(seed), 4)
    q = jax.random.normal(keys[0], (batch, q_len, q_heads, width), dtype)
    k = jax.random.normal(keys[1], (batch, kv_len, kv_heads, width), dtype)
    v = jax.random.normal(keys[2], (batch, kv_len, kv_heads, width), dtype)
    d_out = jax.random.normal(keys[3], q.shape, dtype)
    return q, k, v, d_out, offset


def outcome(implementation, q, k, v, d_out, **kwargs):
    """Output and the gradients of q, k and v."""

    def run(q, k, v, d_out):
        out, vjp = jax.vjp(
            lambda q, k, v: attention(q, k, v, implementation=implementation, **kwargs), q, k, v
        )
        return (out, *vjp(d_out))

    return jax.jit(run)(q, k, v, d_out)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_reference(implementation, causal, shape):
    q, k, v, d_out, offset = inputs(shape)
    arguments = dict(causal=causal, q_offset=offset)
    expected = outcome("reference", q, k, v, d_out, **arguments)
    got = outcome(implementation, q, k, v, d_out, **arguments)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "reference"])
def test_segments_keep_apart_and_padding_gives_zeros(implementation):
    q, k, v, d_out, _ = inputs((2, 150, 150, 4, 2, 16, 0))
    position = jnp.arange(150)
    ids = jnp.stack([jnp.where(position < 70, 1, 2), jnp.where(position < 140, 3, 0)])
    segments = dict(q_segment_ids=ids, kv_segment_ids=ids)
    got = outcome(implementation, q, k, v, d_out, **segments)
    for a, b in zip(got, outcome("reference", q, k, v, d_out, **segments), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    out, dq, dk, dv = got
    assert all(np.isfinite(x).all() for x in got)
    for x in (out[1, 140:], dq[1, 140:], dk[1, 140:], dv[1, 140:]):
        np.testing.assert_array_equal(x, 0)
    alone = attention(
        q[:1, 70:], k[:1, 70:], v[:1, 70:], implementation=implementation, causal=True
    )
    np.testing.assert_allclose(out[:1, 70:], alone, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_errs_at_most_twice_as_much_as_the_reference(implementation):
    q, k, v, d_out, _ = inputs(SHAPES["grouped, ragged last block"], jnp.bfloat16)
    exact = outcome("reference", *(x.astype(jnp.float32) for x in (q, k, v, d_out)))
    plain = outcome("reference", q, k, v, d_out)
    got = outcome(implementation, q, k, v, d_out)
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), got, plain, exact, strict=True):
        error, allowed = (np.linalg.norm(np.asarray(x, np.float32) - c) for x in (a, b))
        assert error <= 2 * allowed, name


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "reference"])
def test_large_scores_neither_overflow_nor_vanish(implementation):
    q, k, v, _, _ = inputs((1, 140, 140, 2, 2, 16, 0))
    out = attention(q * 100, k * 100, v, implementation=implementation)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[:, 0], v[:, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=jnp.zeros((2, 8, 3, 16)), v=jnp.zeros((2, 8, 3, 16))), "multiple of the key heads"),
        (dict(v=jnp.zeros((2, 8, 2, 8))), "expected q"),
        (dict(q_segment_ids=jnp.ones((2, 8), jnp.int32)), "both"),
        (
            dict(
                q_segment_ids=jnp.ones((2, 8), jnp.int32),
                kv_segment_ids=jnp.ones((2, 9), jnp.int32),
            ),
            r"kv_segment_ids has shape \(2, 9\), expected \(2, 8\)",
        ),
        (dict(implementation="fast"), "unknown implementation 'fast'"),
        (dict(implementation="blocked", q_offset=jnp.int32(0)), "needs a Python int"),
    ],
)
def test_what_it_cannot_take_is_an_error_before_compilation(change, message):
    arguments = dict(q=jnp.zeros((2, 8, 4, 16)), k=jnp.zeros((2, 8, 2, 16)))
    arguments |= dict(v=jnp.zeros((2, 8, 2, 16))) | change
    with pytest.raises(ValueError, match=message):
        attention(**arguments)
