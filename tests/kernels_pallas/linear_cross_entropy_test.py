"""Every implementation of linear cross-entropy against the definition: values and gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from kernels_pallas import linear_cross_entropy as package
from kernels_pallas import targets as platforms
from kernels_pallas.linear_cross_entropy import IMPLEMENTATIONS, chunked, pallas_tpu, saved
from kernels_pallas.linear_cross_entropy.api import choose
from kernels_pallas.schedule import compile_for, libtpu_version

HERE = [name for name in IMPLEMENTATIONS if name != "pallas_gpu"]
"""`pallas_gpu` takes no float32; it is tested in linear_cross_entropy_gpu_test.py."""
OTHERS = sorted(set(HERE) - {"reference"})

# tokens, width, vocabulary, scale of the logits, soft cap
CASES = {
    "one chunk": (48, 16, 100, 1.0, None),
    "length 1": (1, 8, 7, 1.0, None),
    "chunks and a bit": (300, 16, 257, 1.0, None),
    "sure of itself": (200, 32, 64, 30.0, None),
    "soft cap": (130, 24, 390, 10.0, 5.0),
    "several rows of tiles": (530, 16, 1300, 1.0, None),
}

SIMULATED = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise", random_seed=1
)


def linear_cross_entropy(*args, implementation, interpret: Any = True, **kwargs):
    """The op; `pallas_tpu` is interpreted."""
    if implementation == "pallas_tpu":
        kwargs["interpret"] = interpret
    return package.linear_cross_entropy(*args, implementation=implementation, **kwargs)


def taken(cases):
    """(implementation, case) for all that the implementation takes: `saved` has no soft cap."""
    return [
        (implementation, case)
        for implementation in OTHERS
        for case in cases
        if implementation != "saved" or CASES[case][4] is None
    ]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 128)
    monkeypatch.setattr(saved, "CHUNK_VALUES", 128 * 128)
    tiles = pallas_tpu.tiles
    small = pallas_tpu.Tiles(forward=(192, 256), backward=(256, 128), rows=64)
    monkeypatch.setattr(
        pallas_tpu, "tiles", lambda *sizes: small if sizes[0] > 400 else tiles(*sizes)
    )


@functools.cache
def value_and_gradients(implementation, case, dtype, interpret=True):
    """(loss, lse, dx, dw) as float32 for a weighted loss with z-loss."""
    tokens, width, vocab, scale, soft_cap = CASES[case]
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (tokens, width), dtype)
    w = (scale / width**0.5) * jax.random.normal(keys[1], (width, vocab))
    # Half of the targets are the likeliest token, so that some probabilities are near 1.
    targets = jnp.where(
        jnp.arange(tokens) % 2 == 0,
        jnp.argmax(x.astype(jnp.float32) @ w, axis=-1),
        jax.random.randint(keys[2], (tokens,), 0, vocab),
    ).astype(jnp.int32)
    weights = jnp.arange(tokens) % 3 / tokens

    def run(x, w):
        def total(x, w):
            loss, lse = linear_cross_entropy(
                x,
                w,
                targets,
                implementation=implementation,
                soft_cap=soft_cap,
                interpret=interpret,
            )
            return jnp.sum(weights * (loss + 1e-2 * lse**2)), (loss, lse)

        (_, outputs), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(x, w)
        return *outputs, *gradients

    return [np.asarray(y, np.float32) for y in jax.jit(run)(x, w)]


@pytest.mark.parametrize(("implementation", "case"), taken(CASES))
def test_equals_the_reference_in_float32(implementation, case):
    expected = value_and_gradients("reference", case, "float32")
    got = value_and_gradients(implementation, case, "float32")
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("implementation", "case"), taken(["chunks and a bit", "sure of itself", "soft cap"])
)
def test_bfloat16_error_is_at_most_twice_that_of_the_reference(implementation, case):
    exact = value_and_gradients("reference", case, "float32")
    plain = value_and_gradients("reference", case, "bfloat16")
    got = value_and_gradients(implementation, case, "bfloat16")
    for a, b, c in zip(got, plain, exact, strict=True):
        assert np.linalg.norm(a - c) <= 2 * np.linalg.norm(b - c) + 1e-6 * np.linalg.norm(c)


def test_reference_equals_numpy():
    x = jax.random.normal(jax.random.key(0), (7, 16))
    w = jax.random.normal(jax.random.key(1), (16, 33))
    targets = np.arange(7)
    logits = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    expected = np.log(np.exp(logits).sum(axis=-1))
    loss, lse = linear_cross_entropy(x, w, jnp.asarray(targets), implementation="reference")
    np.testing.assert_allclose(lse, expected, rtol=1e-5)
    np.testing.assert_allclose(loss, expected - logits[targets, targets], rtol=1e-4)


@pytest.mark.parametrize("implementation", HERE)
def test_a_certain_prediction_has_a_small_exact_loss_and_no_gradient(implementation):
    x, w = 30.0 * jnp.eye(4), jnp.eye(4)
    fn = functools.partial(linear_cross_entropy, w=w, implementation=implementation)
    (loss, lse), pull = jax.vjp(lambda x: fn(x, targets=jnp.arange(4)), x)
    np.testing.assert_allclose(loss, np.log1p(3 * np.exp(-30.0)), atol=1e-5)
    np.testing.assert_allclose(lse, 30, rtol=1e-6)
    np.testing.assert_allclose(pull((jnp.ones(4), jnp.zeros(4)))[0], 0, atol=1e-5)


def test_what_does_not_fit_is_an_error():
    x, w, targets = jnp.ones((7, 16)), jnp.ones((16, 33)), jnp.zeros(7, jnp.int32)
    with pytest.raises(ValueError, match="expected x"):
        package.linear_cross_entropy(x, w.T, targets)
    with pytest.raises(ValueError, match="unknown implementation 'fast'"):
        package.linear_cross_entropy(x, w, targets, implementation="fast")
    with pytest.raises(ValueError, match=r"x \(7, 16\) is int32; float32, bfloat16"):
        package.linear_cross_entropy(x.astype(int), w, targets)
    with pytest.raises(ValueError, match=r"targets \(7,\) is float32; integers"):
        package.linear_cross_entropy(x, w, targets.astype(float))
    with pytest.raises(ValueError, match=r"x \(0, 16\) is empty"):
        package.linear_cross_entropy(x[:0], w, targets[:0])
    with pytest.raises(ValueError, match="soft_cap is 0"):
        package.linear_cross_entropy(x, w, targets, soft_cap=0)
    with pytest.raises(ValueError, match="implementation 'saved' takes no soft_cap"):
        package.linear_cross_entropy(x, w, targets, implementation="saved", soft_cap=30.0)
    with pytest.raises(ValueError, match="interpret is for implementations 'pallas_tpu'"):
        package.linear_cross_entropy(x, w, targets, implementation="chunked", interpret=True)
    with pytest.raises(ValueError, match=r"takes x in float32 or bfloat16, got float16 \(7, 16\)"):
        linear_cross_entropy(x.astype("float16"), w, targets, implementation="pallas_tpu")


def test_a_kernel_for_tpus_says_so_elsewhere_but_can_be_lowered_for_them():
    run = functools.partial(package.linear_cross_entropy, implementation="pallas_tpu")
    x, w, targets = jnp.ones((8, 16)), jnp.ones((16, 128)), jnp.zeros(8, jnp.int32)
    with pytest.raises(ValueError, match="'pallas_tpu' cannot run on cpu; it needs a TPU"):
        run(x, w, targets)
    with pytest.raises(ValueError, match="cannot run on cpu"):
        jax.jit(jax.grad(lambda x: run(x, w, targets)[0].sum()))(x)
    with platforms.compiling_for("tpu"):
        traced = jax.jit(run).trace(x, w, targets)
    lowered = traced.lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()


@pytest.mark.parametrize("case", [name for name in CASES if name != "sure of itself"])
def test_no_race_and_no_uninitialised_memory(case, monkeypatch):
    if CASES[case][0] > 400:
        # Two cores share the work.
        monkeypatch.setattr(pallas_tpu, "_cores", lambda: 2)
    expected = value_and_gradients("reference", case, "float32")
    try:
        got = value_and_gradients("pallas_tpu", case, "float32", SIMULATED)
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        assert not races_found()
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def races_found() -> bool:
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert interpret_pallas_call.races is not None
    return interpret_pallas_call.races.races_found


@pytest.mark.parametrize("implementation", HERE)
def test_z_loss_and_ignored_tokens(implementation):
    x = jax.random.normal(jax.random.key(0), (6, 16))
    w = jax.random.normal(jax.random.key(1), (16, 40))
    targets = jnp.array([3, -100, 39, -100, 0, 7])
    counts = np.asarray(targets) >= 0

    def total(x, targets, **options):
        loss, lse = linear_cross_entropy(
            x, w, targets, z_loss=0.1, implementation=implementation, **options
        )
        return loss.sum(), (loss, lse)

    grad = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnames="ignore_index")
    (_, (loss, lse)), dx = grad(x, targets, ignore_index=-100)
    (_, (alone, alone_lse)), dx_alone = grad(x[counts], targets[counts])
    np.testing.assert_array_equal(loss[~counts], 0)
    np.testing.assert_array_equal(dx[~counts], 0)
    np.testing.assert_allclose(loss[counts], alone, rtol=1e-5)
    np.testing.assert_allclose(lse[counts], alone_lse, rtol=1e-5)
    np.testing.assert_allclose(dx[counts], dx_alone, atol=1e-5)
    plain, _ = package.linear_cross_entropy(x[counts], w, targets[counts])
    np.testing.assert_allclose(alone, plain + 0.1 * alone_lse**2, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "chunked", "pallas_tpu"])
def test_a_vocabulary_cut_over_devices_gives_the_same(implementation):
    mesh = Mesh(np.array(jax.devices()[:4]), ("v",))
    x = jax.random.normal(jax.random.key(0), (40, 16))
    w = jax.random.normal(jax.random.key(1), (16, 4 * 33))
    targets = jax.random.randint(jax.random.key(2), (40,), 0, w.shape[1])

    def total(x, w, axes, implementation):
        loss, lse = linear_cross_entropy(
            x, w, targets, vocab_axes=axes, z_loss=0.01, implementation=implementation
        )
        return loss * jnp.arange(40) + lse

    cut = jax.shard_map(
        functools.partial(total, axes=("v",), implementation=implementation),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(None, "v")),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    whole = functools.partial(total, axes=(), implementation="reference")
    got, pull = jax.vjp(jax.jit(cut), x, w)
    expected, pull_expected = jax.vjp(jax.jit(whole), x, w)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(pull(jnp.ones(40)), pull_expected(jnp.ones(40)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


needs_libtpu = pytest.mark.skipif(libtpu_version() is None, reason="libtpu is not installed")
BUILDER = "kernels_pallas.linear_cross_entropy.benchmark:forward_backward"


@needs_libtpu
def test_compiles_for_a_tpu_at_an_odd_shape():
    compile_for(BUILDER, "v5e", dump=False, tokens=300, width=256, vocab=1000, soft_cap=30.0)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x"])
def test_compiles_at_production_shapes_without_logits_in_hbm(chip):
    program = compile_for(BUILDER, chip, dump=False)
    tokens, width, vocab = 16_384, 2048, 100_352
    # dw in float32 before it is rounded, the transposed hidden states, and columns of tokens.
    assert program.temp_bytes < 4 * width * vocab + 2 * tokens * width + 40e6
    assert program.temp_bytes < 4 * tokens * vocab / 6


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    "shape",
    [
        dict(dtype="float32", tokens=4096, vocab=50_304),
        dict(tokens=16_384, width=8192, vocab=128_256),
        dict(tokens=5000, width=80, vocab=50_257),
    ],
    ids=["float32", "wide", "narrow and uneven"],
)
def test_compiles_at_other_shapes(shape):
    for chip in ("v5e", "v5p", "v6e"):
        compile_for(BUILDER, chip, dump=False, **shape)


@pytest.mark.parametrize("implementation", ["reference", *OTHERS])
def test_logits_too_large_for_exp_stay_finite(implementation):
    x = 100.0 * jnp.eye(4)
    targets = jnp.zeros(4, jnp.int32)
    fn = functools.partial(linear_cross_entropy, implementation=implementation)
    loss, lse = jax.jit(fn)(x, x, targets)
    np.testing.assert_allclose(loss, [0, 1e4, 1e4, 1e4], rtol=1e-5)
    np.testing.assert_allclose(lse, np.full(4, 1e4), rtol=1e-5)


def test_the_choice_bounds_the_memory_and_the_saved_form_needs_all_columns():
    assert choose(2048, 1024) == "saved"
    assert choose(2**20, 100352) == "chunked"
    assert choose(2048, 1024, vocab_axes=("tensor",)) == "chunked"
    assert choose(2048, 1024, soft_cap=30.0) == "chunked"
    with pytest.raises(ValueError, match="whole vocabulary"):
        saved.linear_cross_entropy(jnp.ones((2, 4)), jnp.ones((4, 8)), jnp.zeros(2, int), ("t",))


def test_the_choice_on_other_backends(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert choose(2048, 1024, dtype="bfloat16", vocab_axes=("tensor",)) == "pallas_tpu"
    assert choose(2048, 1024, dtype="float16") == "chunked"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choose(2048, 1024, dtype="bfloat16") == "chunked"
