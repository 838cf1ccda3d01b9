"""Every implementation of routing and of the way back against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.router import IMPLEMENTATIONS, combine, dispatch, pallas_tpu, route
from kernels_pallas.schedule import compile_for

OTHERS = sorted(set(IMPLEMENTATIONS) - {"reference"})
SIMULATED_TPU = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "ROUTE_BLOCK", 64)
    monkeypatch.setattr(pallas_tpu, "COMBINE_ROWS", 48)


def how(implementation, interpret=True):
    """Arguments that choose an implementation and run it here."""
    return dict(
        implementation=implementation, interpret=implementation == "pallas_tpu" and interpret
    )


# tokens, experts, k, whether some tokens are padding
CASES = {
    "blocks and a bit": (300, 16, 4, False),
    "padding": (200, 16, 3, True),
    "one token": (1, 8, 2, False),
    "every expert": (33, 8, 8, True),
    "256 experts": (260, 256, 8, False),
    "3 experts, 1 each": (129, 3, 1, False),
}


def inputs(case):
    tokens, experts, k, padded = CASES[case]
    rng = np.random.default_rng(0)
    # One decimal, so that some experts of a token are equally good.
    logits_TE = jnp.asarray(rng.normal(size=(tokens, experts)).round(1), jnp.float32)
    valid_T = jnp.asarray(rng.random(tokens) < 0.7) if padded else None
    return logits_TE, k, valid_T, rng


def routing_and_gradient(case, dtype, **how):
    logits_TE, k, valid_T, rng = inputs(case)
    tokens, experts = logits_TE.shape
    along_Tk, along_E = rng.normal(size=(tokens, k)), rng.normal(size=experts)

    def run(logits_TE):
        def total(logits_TE):
            routing = route(logits_TE, k, valid_T=valid_T, **how)
            loss = jnp.sum(routing.weights_Tk * along_Tk) + 0.1 * routing.squared_logsumexp_sum
            return loss + jnp.sum(routing.probability_sum_E * along_E), routing

        (_, routing), d_logits_TE = jax.value_and_grad(total, has_aux=True)(logits_TE)
        return routing, d_logits_TE

    return jax.tree.map(np.asarray, jax.jit(run)(logits_TE.astype(dtype)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", OTHERS)
def test_route_equals_the_reference(implementation, case, dtype):
    expected, d_expected = routing_and_gradient(case, dtype, **how("reference"))
    got, d_got = routing_and_gradient(case, dtype, **how(implementation))
    for name in ("experts_Tk", "positions_Tk", "counts_E"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)
    for name in ("weights_Tk", "probability_sum_E", "squared_logsumexp_sum"):
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=1e-5)
    assert d_got.dtype == dtype
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(
        d_got.astype(np.float32), d_expected.astype(np.float32), rtol=tolerance, atol=tolerance
    )


def test_reference_equals_a_loop_in_numpy():
    logits_TE, k, valid_T, _ = inputs("padding")
    routing = route(logits_TE, k, valid_T=valid_T, implementation="reference")
    assert valid_T is not None
    seen = dict.fromkeys(range(logits_TE.shape[1]), 0)
    sums, squares = np.zeros(logits_TE.shape[1]), 0.0
    for token in np.flatnonzero(valid_T):
        values = np.asarray(logits_TE[token], np.float64)
        order = np.argsort(-values, kind="stable")[:k]
        probabilities = np.exp(values) / np.exp(values).sum()
        np.testing.assert_array_equal(routing.experts_Tk[token], order)
        np.testing.assert_allclose(routing.weights_Tk[token], probabilities[order], rtol=1e-5)
        for slot, expert in enumerate(order):
            assert routing.positions_Tk[token, slot] == seen[expert]
            seen[expert] += 1
        sums += probabilities
        squares += np.log(np.exp(values).sum()) ** 2
    np.testing.assert_array_equal(routing.counts_E, list(seen.values()))
    np.testing.assert_allclose(routing.probability_sum_E, sums, rtol=1e-5)
    np.testing.assert_allclose(routing.squared_logsumexp_sum, squares, rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_rows_are_sorted_by_expert_and_by_token_within_it(implementation, case):
    logits_TE, k, valid_T, _ = inputs(case)
    routing = route(logits_TE, k, valid_T=valid_T, **how(implementation))
    destinations_Tk, rows_M = dispatch(routing)
    order = np.argsort(np.asarray(routing.experts_Tk).reshape(-1), kind="stable")
    np.testing.assert_array_equal(rows_M, order // k)
    np.testing.assert_array_equal(destinations_Tk.reshape(-1)[order], np.arange(len(order)))


def combined_and_gradients(dtype, **how):
    rng = np.random.default_rng(1)
    tokens, k, rows, width = 37, 3, 120, 256
    destinations_Tk = rng.permutation(rows)[: tokens * k].reshape(tokens, k)
    destinations_Tk[5, 1] = rows  # reads zeros
    y_MD = jnp.asarray(rng.normal(size=(rows, width)), dtype)
    weights_Tk = jnp.asarray(rng.random((tokens, k)), jnp.float32)
    along_TD = rng.normal(size=(tokens, width))
    indices = jnp.asarray(destinations_Tk, jnp.int32)

    def run(y_MD, weights_Tk):
        def total(y_MD, weights_Tk):
            out_TD = combine(y_MD, indices, weights_Tk, **how)
            return jnp.sum(out_TD * along_TD), out_TD

        (_, out_TD), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(y_MD, weights_Tk)
        return out_TD, *gradients

    return [np.asarray(a, np.float32) for a in jax.jit(run)(y_MD, weights_Tk)]


@pytest.mark.parametrize("implementation", OTHERS)
def test_combine_equals_the_reference_in_float32(implementation):
    expected = combined_and_gradients("float32", **how("reference"))
    got = combined_and_gradients("float32", **how(implementation))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", OTHERS)
def test_combine_in_bfloat16_errs_at_most_twice_as_much_as_the_reference(implementation):
    exact = combined_and_gradients("float32", **how("reference"))
    plain = combined_and_gradients("bfloat16", **how("reference"))
    got = combined_and_gradients("bfloat16", **how(implementation))
    for a, b, c in zip(got, plain, exact, strict=True):
        assert np.linalg.norm(a - c) <= 2 * np.linalg.norm(b - c) + 1e-6 * np.linalg.norm(c)


@pytest.mark.parametrize(
    "case",
    [case if case == "padding" else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)
def test_route_on_a_simulated_tpu(case):
    logits_TE, k, valid_T, _ = inputs(case)
    got = route(logits_TE, k, valid_T=valid_T, **how("pallas_tpu", SIMULATED_TPU))
    expected = route(logits_TE, k, valid_T=valid_T, implementation="reference")
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_combine_on_a_simulated_tpu(dtype):
    got = combined_and_gradients(dtype, **how("pallas_tpu", SIMULATED_TPU))
    expected = combined_and_gradients(dtype, **how("reference"))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-2)
    assert not interpret_pallas_call.races.races_found


def test_an_expert_of_no_probability_is_chosen_once():
    logits_TE = jnp.asarray([[0.0, -jnp.inf, -jnp.inf, -jnp.inf]])
    for implementation in IMPLEMENTATIONS:
        routing = route(logits_TE, 3, **how(implementation))
        np.testing.assert_array_equal(routing.experts_Tk, [[0, 1, 2]])
        np.testing.assert_array_equal(routing.weights_Tk, [[1, 0, 0]])


def test_tpu_kernels_are_for_tpus():
    with pytest.raises(ValueError, match="route: implementation 'pallas_tpu' cannot run on cpu"):
        route(jnp.ones((5, 4)), 2, implementation="pallas_tpu")
    with pytest.raises(ValueError, match="interpret is for implementation 'pallas_tpu', not 'xla'"):
        route(jnp.ones((5, 4)), 2, interpret=True)
    y, destinations, weights = jnp.ones((6, 4)), jnp.zeros((3, 2), jnp.int32), jnp.ones((3, 2))
    with pytest.raises(ValueError, match=r"multiples of 128 .* y_MD is float32 \(6, 4\)"):
        combine(y, destinations, weights, **how("pallas_tpu"))


@pytest.mark.parametrize(
    ("chip", "which", "mebibytes"),
    [
        ("v6e", "route", 20),
        *[
            pytest.param(chip, which, mebibytes, marks=pytest.mark.slow)
            for chip in ("v5e", "v5p", "v6e", "tpu7x")
            for which, mebibytes in (("route", 33), ("combine", 523), ("combine_float32", 20))
        ],
    ],
)
def test_tpu_kernels_compile_at_the_size_of_olmoe(chip, which, mebibytes):
    """`combine` packs its bfloat16 rows (512 MiB) before it gathers them. Arrays of one number a
    slot have rows of 128 (8 MiB each), which v5p and tpu7x keep in HBM.
    """
    pytest.importorskip("libtpu")
    program = compile_for("kernels_pallas.router.benchmark:ours", chip, dump=False, which=which)
    assert program.temp_bytes <= mebibytes * 2**20


def test_what_does_not_fit_route_is_an_error():
    logits = jnp.ones((5, 4))
    with pytest.raises(ValueError, match=r"k = 5 experts per token, but logits_TE \(5, 4\) has 4"):
        route(logits, 5)
    with pytest.raises(ValueError, match="k = 0"):
        route(logits, 0)
    with pytest.raises(ValueError, match=r"logits_TE is float32 \(5,\)"):
        route(logits[:, 0], 1)
    with pytest.raises(ValueError, match=r"valid_T is bool \(4,\), expected bool \(5,\)"):
        route(logits, 2, valid_T=jnp.ones(4, bool))
    with pytest.raises(ValueError, match="unknown implementation 'fast'"):
        route(logits, 2, implementation="fast")


def test_what_does_not_fit_combine_is_an_error():
    y, destinations, weights = jnp.ones((6, 4)), jnp.zeros((3, 2), jnp.int32), jnp.ones((3, 2))
    with pytest.raises(ValueError, match=r"y_MD is float32 \(6,\)"):
        combine(y[:, 0], destinations, weights)
    with pytest.raises(ValueError, match="destinations_Tk is float32"):
        combine(y, weights, weights)
    with pytest.raises(ValueError, match=r"weights_Tk is float32 \(2, 2\), expected \(3, 2\)"):
        combine(y, destinations, weights[:2])
