"""Every implementation of attention against the definition: values and gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import targets
from kernels_pallas.attention import attention, choose, masks, reference, splash
from kernels_pallas.attention.blocked import BLOCK

# What runs here: splash and cudnn need their hardware; splash is interpreted in a test of its own.
OTHERS = ["blocked", "pallas_tpu"]

# Interpreted kernels are large programs; optimising them would take most of the test's time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

# batch, queries, keys, query heads, key heads, head width, options; what ids there are is said by
# the names of the options
CASES = {
    "one block": (2, 24, 24, 2, 2, 16, dict()),
    "length 1": (2, 1, 1, 2, 1, 16, dict()),
    "grouped heads, a block and a bit": (1, BLOCK + 5, BLOCK + 5, 6, 2, 16, dict()),
    "many blocks": (1, 2 * BLOCK + 1, 2 * BLOCK + 1, 2, 2, 16, dict(segments=True)),
    "not causal": (2, 20, BLOCK + 9, 4, 2, 16, dict(causal=False)),
    "behind a cache": (1, 7, BLOCK + 40, 2, 1, 16, dict(q_offset=BLOCK + 33)),
    "fewer keys than a block of queries ends": (1, 12, 9, 2, 2, 16, dict(q_offset=3)),
    "segments and padding": (2, BLOCK + 30, BLOCK + 30, 4, 2, 16, dict(segments=True)),
    "segments, not causal": (2, 33, 33, 2, 2, 16, dict(causal=False, segments=True)),
    "window": (1, 3 * BLOCK, 3 * BLOCK, 1, 1, 16, dict(window=BLOCK - 30)),
    "window both ways": (1, 2 * BLOCK + 9, 2 * BLOCK, 1, 1, 16, dict(window=50, causal=False)),
    "window behind a cache": (1, 9, BLOCK + 9, 1, 1, 16, dict(window=5, q_offset=BLOCK)),
    "annotations of an image": (2, 2 * BLOCK + 9, 2 * BLOCK + 9, 2, 1, 16, dict(subsegments=True)),
    "any mask": (2, BLOCK + 9, 2 * BLOCK + 9, 2, 1, 16, dict(causal=False, mask=True)),
    "all masks": (
        2,
        290,
        290,
        2,
        1,
        80,
        dict(mask=True, segments=True, subsegments=True, window=99),
    ),
    "MQA of width 96": (1, 40, 40, 3, 1, 96, dict(segments=True)),
}


def inputs(case, dtype):
    batch, q_len, kv_len, q_heads, kv_heads, width, options = CASES[case]
    keys = jax.random.split(jax.random.key(0), 5)
    q, d_out = (jax.random.normal(key, (batch, q_len, q_heads, width), dtype) for key in keys[:2])
    k, v = (jax.random.normal(key, (batch, kv_len, kv_heads, width), dtype) for key in keys[2:4])
    options = dict(options)
    if options.pop("segments", False):
        # Two documents, then padding; the last row is padding alone.
        ids = np.minimum(np.arange(q_len) // (q_len // 3) + 1, 3) % 3
        ids = np.broadcast_to(ids, (batch, q_len)).copy()
        ids[1:] = 0
        options |= dict(q_segment_ids=jnp.asarray(ids), kv_segment_ids=jnp.asarray(ids))
    if options.pop("subsegments", False):
        # An image, then four annotations of it.
        ids = np.arange(q_len) // (q_len // 5)
        ids = jnp.broadcast_to(np.where(ids == 0, 10_000, ids), (batch, q_len))
        options |= dict(q_subsegment_ids=ids, kv_subsegment_ids=ids)
    if options.pop("mask", False):
        # The last 30 queries see nothing.
        mask = jax.random.bernoulli(keys[4], 0.4, (batch, q_len, kv_len))
        options |= dict(mask=mask.at[:, -30:].set(False))
    return (q, k, v), d_out, options


def implementation_options(implementation, interpret: Any = True):
    """pallas_tpu needs to be told that there is no TPU."""
    interpreted = dict(interpret=interpret) if implementation == "pallas_tpu" else {}
    return dict(implementation=implementation, **interpreted)


def run(arrays, d_out, **options):
    """(out, lse, dq, dk, dv) as float32, with a gradient through the log-sum-exp too."""

    def both(q, k, v, d_out):
        (out, lse), pull = jax.vjp(lambda *x: attention(*x, return_lse=True, **options), q, k, v)
        d_lse = jnp.where(jnp.isneginf(lse), 0.0, jnp.sin(lse))
        return out, lse, *pull((d_out, d_lse))

    out, lse, *gradients = jax.jit(both, compiler_options=QUICK)(*arrays, d_out)
    assert all(x.dtype == arrays[0].dtype for x in (out, *gradients))
    assert lse.dtype == jnp.float32
    return [np.asarray(x, np.float32) for x in (out, lse, *gradients)]


@functools.cache
def value_and_gradients(implementation, case, dtype):
    """(out, lse, dq, dk, dv), and the segment ids of the queries."""
    arrays, d_out, options = inputs(case, dtype)
    results = run(arrays, d_out, **options, **implementation_options(implementation))
    ids = options.get("q_segment_ids")
    return results, None if ids is None else np.asarray(ids)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", OTHERS)
def test_equals_the_reference_in_float32(implementation, case):
    expected, _ = value_and_gradients("reference", case, "float32")
    got, _ = value_and_gradients(implementation, case, "float32")
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        assert not np.isnan(a).any()


BFLOAT16_CASES = ["grouped heads, a block and a bit", "segments and padding"]


@pytest.mark.parametrize(
    "case",
    [
        case if case in BFLOAT16_CASES else pytest.param(case, marks=pytest.mark.slow)
        for case in CASES
    ],
)
@pytest.mark.parametrize("implementation", OTHERS)
def test_bfloat16_error_is_at_most_twice_that_of_the_reference(implementation, case):
    exact, _ = value_and_gradients("reference", case, "float32")
    plain, _ = value_and_gradients("reference", case, "bfloat16")
    got, _ = value_and_gradients(implementation, case, "bfloat16")
    for a, b, c in zip(got, plain, exact, strict=True):
        seen = np.isfinite(c)
        assert np.linalg.norm(a[seen] - c[seen]) <= 2 * np.linalg.norm(b[seen] - c[seen])


@pytest.mark.parametrize("case", ["segments and padding", "segments, not causal"])
@pytest.mark.parametrize("implementation", ["reference", *OTHERS])
def test_padding_gives_zeros_and_no_gradient(implementation, case):
    (out, lse, *gradients), ids = value_and_gradients(implementation, case, "float32")
    assert (ids == 0).any() and (ids != 0).any()
    assert np.all(out[ids == 0] == 0)
    np.testing.assert_array_equal(np.isneginf(lse), np.broadcast_to(ids[:, None] == 0, lse.shape))
    for gradient in gradients:
        assert np.all(gradient[ids == 0] == 0)
        assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("implementation", ["reference", *OTHERS])
def test_scores_too_large_for_exp_stay_finite(implementation):
    q = 100.0 * jax.random.normal(jax.random.key(0), (1, 40, 2, 16))

    def total(q):
        return jnp.sum(attention(q, q, q, **implementation_options(implementation)) ** 2)

    value, gradient = jax.jit(jax.value_and_grad(total))(q)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


@pytest.mark.parametrize("implementation", ["reference", *OTHERS])
def test_a_segment_gets_what_it_gets_alone(implementation):
    (q, k, v), _, options = inputs("segments and padding", "float32")
    ids = options["q_segment_ids"][0]
    first = int(jnp.argmax(ids == 2))
    last = int(first + jnp.sum(ids == 2))
    chosen = implementation_options(implementation)
    out = attention(q, k, v, **chosen, **options)
    alone = attention(*(x[:1, first:last] for x in (q, k, v)), **chosen)
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
        (dict(window=0), "window is 0, expected at least 1"),
        (dict(q_subsegment_ids=jnp.ones((2, 8), jnp.int32)), "both q_subsegment_ids and kv_sub"),
        (
            dict(mask=jnp.ones((2, 8, 9), bool)),
            r"mask is bool \(2, 8, 9\), expected bool \(2, 8, 8\)",
        ),
        (dict(mask=jnp.ones((2, 8, 8))), "mask is float32"),
        (
            dict(q_segment_ids=jnp.ones((2, 8)), kv_segment_ids=jnp.ones((2, 8))),
            "q_segment_ids is float32, expected int32",
        ),
        (
            dict(v=jnp.zeros((2, 8, 2, 16), jnp.bfloat16)),
            "one dtype of .*; got float32, float32, bf",
        ),
        (dict(q=jnp.zeros((2, 0, 4, 16))), "must not be empty"),
        (dict(implementation="pallas_tpu"), "cannot run on cpu; it needs a TPU or interpret=True"),
        (dict(implementation="blocked", interpret=True), "interpret is for implementation 'pallas"),
        (dict(implementation="splash", window=2), "takes no window"),
        (dict(implementation="cudnn"), "takes q, k and v of bfloat16 or float16, not float32"),
    ],
)
def test_what_it_cannot_take_is_an_error_before_compilation(change, message):
    arguments = dict(q=jnp.zeros((2, 8, 4, 16)), k=jnp.zeros((2, 8, 2, 16)))
    arguments |= dict(v=jnp.zeros((2, 8, 2, 16))) | change
    with pytest.raises(ValueError, match=message):
        attention(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dtype=jnp.float16), "takes q, k and v of float32 or bfloat16, not float16"),
        (dict(width=24), r"multiples of 16 up to 256, not 24 \(q has shape \(1, 8, 2, 24\)\)"),
        (dict(width=272), "multiples of 16 up to 256, not 272"),
    ],
)
def test_what_the_tpu_kernel_cannot_take_is_an_error_before_compilation(change, message):
    x = jnp.zeros((1, 8, 2, change.get("width", 16)), change.get("dtype", jnp.float32))
    with pytest.raises(ValueError, match=message):
        attention(x, x, x, implementation="pallas_tpu", interpret=True)


def test_choice_by_platform():
    shape = (4, 4096, 16, 128)
    assert choose(shape, shape, causal=True, q_offset=0) == "blocked"
    with targets.compiling_for("tpu"):
        assert choose(shape, shape, causal=True, q_offset=0) == "pallas_tpu"
        assert choose(shape, shape, causal=False, q_offset=0) == "pallas_tpu"
        one = (4, 1, 16, 128)
        assert choose(one, shape, causal=True, q_offset=jnp.int32(7)) == "reference"
        odd = (4, 4096, 16, 100)
        assert choose(odd, odd, causal=True, q_offset=0) == "blocked"
    with targets.compiling_for("gpu"):
        assert choose(shape, shape, causal=True, q_offset=0) == "blocked"


@pytest.mark.parametrize("options", [dict(), dict(window=9), dict(window=9, causal=False)])
def test_cudnn_is_asked_for_the_right_thing(options, monkeypatch):
    # By XLA in its place: cuDNN cannot even be traced without the library.
    asked = jax.nn.dot_product_attention

    def by_xla(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        return asked(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    (q, k, v), _, _ = inputs("not causal", "bfloat16")
    q = jnp.tile(q, (1, 3, 1, 1))[:, : k.shape[1]]
    k, v = k[:, : q.shape[1]], v[:, : q.shape[1]]
    with targets.compiling_for("gpu"):
        got = attention(q, k, v, implementation="cudnn", **options)
    expected = attention(q, k, v, implementation="reference", **options)
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(expected, np.float32), atol=0.02
    )


def test_splash_equals_the_reference():
    (q, k, v), _, _ = inputs("one block", "float32")
    q, k, v = (jnp.tile(x, (1, 11, 1, 8))[:, :256] for x in (q, k, v))
    ids = jnp.asarray(np.arange(256) // 100 % 3)[None].repeat(2, 0)
    shape = masks.Shape(True, None, 256, 256)
    options = dict(shape=shape, ids=masks.Ids((ids, ids)), scale=0.1)
    got, _ = splash.attention(q, k, v, interpret=True, **options)
    expected, _ = reference.attention(q, k, v, **options)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
