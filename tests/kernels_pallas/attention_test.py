"""Every implementation of attention against the definition: values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import IMPLEMENTATIONS, attention
from kernels_pallas.attention.blocked import BLOCK

# splash runs on TPUs alone; its own test interprets it.
OTHERS = sorted(set(IMPLEMENTATIONS) - {"reference", "splash"})

# batch, queries, keys, query heads, key heads, causal, q_offset, segments
CASES = {
    "one block": (2, 24, 24, 2, 2, True, 0, False),
    "length 1": (2, 1, 1, 2, 1, True, 0, False),
    "grouped heads, a block and a bit": (1, BLOCK + 5, BLOCK + 5, 6, 2, True, 0, False),
    "many blocks": (1, 2 * BLOCK + 1, 2 * BLOCK + 1, 2, 2, True, 0, True),
    "not causal": (2, 20, BLOCK + 9, 4, 2, False, 0, False),
    "behind a cache": (1, 7, BLOCK + 40, 2, 1, True, BLOCK + 33, False),
    "fewer keys than a block of queries ends": (1, 12, 9, 2, 2, True, 3, False),
    "segments and padding": (2, BLOCK + 30, BLOCK + 30, 4, 2, True, 0, True),
    "segments, not causal": (2, 33, 33, 2, 2, False, 0, True),
}


def inputs(case, dtype):
    batch, q_len, kv_len, q_heads, kv_heads, causal, q_offset, segments = CASES[case]
    keys = jax.random.split(jax.random.key(0), 4)
    q, d_out = (jax.random.normal(key, (batch, q_len, q_heads, 16), dtype) for key in keys[:2])
    k, v = (jax.random.normal(key, (batch, kv_len, kv_heads, 16), dtype) for key in keys[2:])
    options = dict(causal=causal, q_offset=q_offset)
    if segments:
        # Two documents, then padding; the last row is padding alone.
        ids = np.minimum(np.arange(q_len) // (q_len // 3) + 1, 3) % 3
        ids = np.broadcast_to(ids, (batch, q_len)).copy()
        ids[-1] = 0
        options |= dict(q_segment_ids=jnp.asarray(ids), kv_segment_ids=jnp.asarray(ids))
    return (q, k, v), d_out, options


@functools.cache
def value_and_gradients(implementation, case, dtype):
    """(out, dq, dk, dv) as float32, and the segment ids of the queries."""
    arrays, d_out, options = inputs(case, dtype)

    def run(q, k, v, d_out):
        fn = functools.partial(attention, implementation=implementation, **options)
        out, pull = jax.vjp(fn, q, k, v)
        return out, *pull(d_out)

    results = jax.jit(run)(*arrays, d_out)
    assert all(x.dtype == jnp.dtype(dtype) for x in results)
    ids = options.get("q_segment_ids")
    return [np.asarray(x, np.float32) for x in results], None if ids is None else np.asarray(ids)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", OTHERS)
def test_equals_the_reference_in_float32(implementation, case):
    expected, _ = value_and_gradients("reference", case, "float32")
    got, _ = value_and_gradients(implementation, case, "float32")
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["grouped heads, a block and a bit", "segments and padding"])
@pytest.mark.parametrize("implementation", OTHERS)
def test_bfloat16_error_is_at_most_twice_that_of_the_reference(implementation, case):
    exact, _ = value_and_gradients("reference", case, "float32")
    plain, _ = value_and_gradients("reference", case, "bfloat16")
    got, _ = value_and_gradients(implementation, case, "bfloat16")
    for a, b, c in zip(got, plain, exact, strict=True):
        assert np.linalg.norm(a - c) <= 2 * np.linalg.norm(b - c)


@pytest.mark.parametrize("case", ["segments and padding", "segments, not causal"])
@pytest.mark.parametrize("implementation", ["reference", *OTHERS])
def test_padding_gives_zeros_and_no_gradient(implementation, case):
    (out, *gradients), ids = value_and_gradients(implementation, case, "float32")
    assert (ids == 0).any() and (ids != 0).any()
    assert np.all(out[ids == 0] == 0)
    for gradient in gradients:
        assert np.all(gradient[ids == 0] == 0)
        assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("implementation", ["reference", *OTHERS])
def test_scores_too_large_for_exp_stay_finite(implementation):
    q = 100.0 * jax.random.normal(jax.random.key(0), (1, 40, 2, 16))

    def total(q):
        return jnp.sum(attention(q, q, q, implementation=implementation) ** 2)

    value, gradient = jax.jit(jax.value_and_grad(total))(q)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


@pytest.mark.parametrize("implementation", ["reference", *OTHERS])
def test_a_segment_gets_what_it_gets_alone(implementation):
    (q, k, v), _, options = inputs("segments and padding", "float32")
    ids = options["q_segment_ids"][0]
    first = int(jnp.argmax(ids == 2))
    last = int(first + jnp.sum(ids == 2))
    out = attention(q, k, v, implementation=implementation, **options)
    alone = attention(*(x[:1, first:last] for x in (q, k, v)), implementation=implementation)
    np.testing.assert_allclose(out[:1, first:last], alone, atol=1e-5)


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
