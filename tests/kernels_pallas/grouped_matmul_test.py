"""Every implementation of the grouped products against the definition: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.grouped_matmul import IMPLEMENTATIONS, grouped_matmul, grouped_swiglu, rows

OTHERS = sorted(set(IMPLEMENTATIONS) - {"reference"})

# tokens, rows, sizes of the groups, K, N, whether rows are gathered
CASES = {
    "ends inside tiles, one empty, rows past the last": (50, 130, (40, 0, 60), 16, 24, True),
    "without a gather": (130, 130, (40, 0, 60), 16, 24, False),
    "one row": (1, 1, (0, 1, 0), 8, 8, True),
    "one group takes all": (40, 200, (0, 200, 0, 0), 8, 16, True),
    "groups past the last row": (30, 300, (100, 100, 50, 100, 3), 8, 8, True),
    "all empty": (9, 70, (0, 0), 8, 8, True),
    "no rows": (9, 0, (0, 0), 8, 8, True),
    "many small groups": (64, 300, tuple(i * 7 % 17 for i in range(40)), 16, 8, True),
}


def outputs_and_gradients(implementation, case, dtype):
    """(h, y, z, dx, d gate_up, d down) as float32: both halves of an expert, and a product with a
    transposed matrix.
    """
    tokens, count, sizes, width, hidden, gathers = CASES[case]
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    x = normal(tokens, width).astype(dtype)
    gate_up = normal(len(sizes), width, 2, hidden) / width**0.5
    down = normal(len(sizes), hidden, width) / hidden**0.5
    along_h, along_y = normal(count, hidden), normal(count, width)
    sizes = jnp.asarray(sizes, jnp.int32)
    picks = jnp.asarray(rng.integers(0, tokens, count), jnp.int32) if gathers else None

    def run(x, gate_up, down):
        def total(x, gate_up, down):
            h = grouped_swiglu(x, gate_up, sizes, rows_M=picks, implementation=implementation)
            y = grouped_matmul(h, down, sizes, implementation=implementation)
            z = grouped_matmul(
                x,
                down,
                sizes,
                rows_M=picks,
                transpose_rhs=True,
                preferred_element_type=jnp.float32,
                implementation=implementation,
            )
            return jnp.sum(y * along_y) + jnp.sum((h + z) * along_h), (h, y, z)

        gradient = jax.value_and_grad(total, (0, 1, 2), has_aux=True)
        (_, outputs), gradients = gradient(x, gate_up, down)
        return *outputs, *gradients

    return [np.asarray(a, np.float32) for a in jax.jit(run)(x, gate_up, down)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", OTHERS)
def test_equals_the_reference_in_float32(implementation, case):
    expected = outputs_and_gradients("reference", case, "float32")
    got = outputs_and_gradients(implementation, case, "float32")
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1, np.abs(b).max(initial=0)))


@pytest.mark.parametrize("case", list(CASES)[:2])
@pytest.mark.parametrize("implementation", OTHERS)
def test_bfloat16_error_is_at_most_twice_that_of_the_reference(implementation, case):
    exact = outputs_and_gradients("reference", case, "float32")
    plain = outputs_and_gradients("reference", case, "bfloat16")
    got = outputs_and_gradients(implementation, case, "bfloat16")
    for a, b, c in zip(got, plain, exact, strict=True):
        assert np.linalg.norm(a - c) <= 2 * np.linalg.norm(b - c) + 1e-6 * np.linalg.norm(c)


def test_reference_equals_a_loop_in_numpy():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(10, 4)), rng.normal(size=(3, 4, 5))
    expected = np.concatenate([x[:6] @ w[0], x[6:9] @ w[2], np.zeros((1, 5))])
    sizes = jnp.asarray([6, 0, 3], jnp.int32)
    got = grouped_matmul(
        jnp.asarray(x, "float32"), jnp.asarray(w, "float32"), sizes, implementation="reference"
    )
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dtypes_of_results_and_gradients(implementation):
    x, w = jnp.ones((6, 8), jnp.bfloat16), jnp.ones((2, 8, 4))
    sizes = jnp.asarray([2, 4], jnp.int32)

    def product(x, w):
        return grouped_matmul(x, w, sizes, implementation=implementation)

    out, pull = jax.vjp(product, x, w)
    dx, dw = pull(jnp.ones_like(out))
    assert (out.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_negative_sizes_count_as_zero(implementation):
    x, w = jnp.ones((4, 8)), jnp.stack([jnp.ones((8, 1)), 2 * jnp.ones((8, 1))])
    sizes = jnp.asarray([-3, 2], jnp.int32)
    got = grouped_matmul(x, w, sizes, implementation=implementation)
    np.testing.assert_array_equal(got[:, 0], [16, 16, 0, 0])


def test_rows_are_added_up_whatever_their_number():
    picks = jnp.asarray([3, 0, 3, 3, 1], jnp.int32)
    d = jnp.arange(10.0).reshape(5, 2)
    expected = jnp.zeros((5, 2)).at[picks].add(d)
    np.testing.assert_array_equal(jax.jit(rows.add_rows, static_argnums=2)(d, picks, 5), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(lhs=jnp.ones((2, 3, 4))), r"lhs has shape \(2, 3, 4\), expected \[M, K\]"),
        (dict(rhs=jnp.ones((2, 5, 3))), "rhs .* has K = 5, lhs .* has K = 8"),
        (dict(rhs=jnp.ones((2, 8, 3), jnp.int32)), "rhs .* has dtype int32, expected one of"),
        (dict(group_sizes_G=jnp.ones(3, jnp.int32)), r"group_sizes_G is int32 \(3,\), expected"),
        (dict(group_sizes_G=jnp.ones(2)), "group_sizes_G is float32"),
        (dict(rows_M=jnp.ones((2, 2), jnp.int32)), r"rows_M is int32 \(2, 2\)"),
        (dict(implementation="fast"), "unknown implementation 'fast'"),
    ],
)
def test_what_does_not_fit_is_an_error(change, message):
    arguments = dict(
        lhs=jnp.ones((6, 8)), rhs=jnp.ones((2, 8, 3)), group_sizes_G=jnp.ones(2, jnp.int32)
    )
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**(arguments | change))


def test_what_does_not_fit_swiglu_is_an_error():
    sizes = jnp.ones(2, jnp.int32)
    with pytest.raises(ValueError, match=r"expected \[G, K, 2, F\] with K = 8"):
        grouped_swiglu(jnp.ones((6, 8)), jnp.ones((2, 8, 3, 4)), sizes)
    with pytest.raises(ValueError, match="gate_up_GKCF has shape"):
        grouped_swiglu(jnp.ones((6, 8)), jnp.ones((2, 8, 8)), sizes)
