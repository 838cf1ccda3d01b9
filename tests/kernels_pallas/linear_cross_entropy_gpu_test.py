"""Linear cross-entropy on a simulated GPU, which finds races, reads of memory that nothing was
written to, and copies that leave their array; and its kernels compiled for an H100.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import gpu_compiler, hopper, targets
from kernels_pallas.linear_cross_entropy import linear_cross_entropy, pallas_gpu
from kernels_pallas.linear_cross_entropy.api import choose

SIMULATED = plgpu.InterpretGPUParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)

# tokens, width, vocabulary, scale of the logits, soft cap
CASES = {
    "whole tiles": (128, 128, 512, 1.0, None),
    "one token, seven columns": (1, 8, 7, 1.0, None),
    "a bit of a tile": (150, 72, 330, 1.0, None),
    "sure of itself": (130, 64, 300, 30.0, None),
    "soft cap": (140, 64, 390, 10.0, 5.0),
    "several parts of the vocabulary": (300, 64, 1100, 1.0, None),
}


@pytest.fixture(autouse=True)
def few_multiprocessors_and_small_parts(monkeypatch):
    """A block has several tiles, and the backward pass several parts."""
    monkeypatch.setattr(hopper, "multiprocessors", lambda: 2)
    monkeypatch.setattr(pallas_gpu, "PART_BYTES", 384 * 512 * 2)


@functools.cache
def values_and_gradients(implementation, case, dtype):
    """(loss, lse, dx, dw) as float32 for a weighted loss with z-loss."""
    tokens, width, vocab, scale, soft_cap = CASES[case]
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (tokens, width)).astype("bfloat16").astype(dtype)
    w = (scale / width**0.5) * jax.random.normal(keys[1], (width, vocab))
    targets_T = jnp.where(
        jnp.arange(tokens) % 2 == 0,
        jnp.argmax(x.astype(jnp.float32) @ w, axis=-1),
        jax.random.randint(keys[2], (tokens,), 0, vocab),
    ).astype(jnp.int32)
    weights_T = jnp.arange(1, tokens + 1) % 3 / tokens

    def total(x, w):
        loss, lse = linear_cross_entropy(
            x,
            w,
            targets_T,
            soft_cap=soft_cap,
            implementation=implementation,
            interpret=SIMULATED if implementation == "pallas_gpu" else False,
        )
        return jnp.sum(weights_T * (loss + 1e-2 * lse**2)), (loss, lse)

    run = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    (_, outputs), gradients = run(x, w)
    return [np.asarray(y, np.float32) for y in (*outputs, *gradients)]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, "bfloat16") for case in CASES] + [("one token, seven columns", "float16")],
)
def test_error_is_at_most_twice_that_of_the_reference(case, dtype):
    exact = values_and_gradients("reference", case, "float32")
    plain = values_and_gradients("reference", case, dtype)
    got = values_and_gradients("pallas_gpu", case, dtype)
    assert not gpu_callbacks.get_races().races_found
    for a, b, c in zip(got, plain, exact, strict=True):
        assert np.linalg.norm(a - c) <= 2 * np.linalg.norm(b - c) + 1e-6 * np.linalg.norm(c)


def test_z_loss_and_ignored_tokens():
    run = functools.partial(linear_cross_entropy, implementation="pallas_gpu", interpret=SIMULATED)
    x = jax.random.normal(jax.random.key(0), (6, 16), "bfloat16")
    w = jax.random.normal(jax.random.key(1), (16, 40))
    targets_T = jnp.array([3, -100, 39, -100, 0, 7])
    counts_T = np.asarray(targets_T) >= 0

    def total(x, targets_T, **options):
        loss, lse = run(x, w, targets_T, z_loss=0.1, **options)
        return loss.sum(), (loss, lse)

    grad = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnames="ignore_index")
    (_, (loss, lse)), dx = grad(x, targets_T, ignore_index=-100)
    (_, (alone, alone_lse)), dx_alone = grad(x[counts_T], targets_T[counts_T])
    np.testing.assert_array_equal(loss[~counts_T], 0)
    np.testing.assert_array_equal(np.asarray(dx, np.float32)[~counts_T], 0)
    np.testing.assert_array_equal(loss[counts_T], alone)
    np.testing.assert_array_equal(lse[counts_T], alone_lse)
    np.testing.assert_array_equal(dx[counts_T], dx_alone)
    plain, _ = run(x[counts_T], w, targets_T[counts_T])
    np.testing.assert_allclose(alone, plain + 0.1 * alone_lse**2, rtol=1e-5)


def test_logits_too_large_for_exp_stay_finite():
    x = 100.0 * jnp.eye(4, dtype="bfloat16")
    run = functools.partial(linear_cross_entropy, implementation="pallas_gpu", interpret=SIMULATED)
    loss, lse = jax.jit(run)(x, x, jnp.zeros(4, jnp.int32))
    np.testing.assert_allclose(loss, [0, 1e4, 1e4, 1e4], rtol=1e-5)
    np.testing.assert_allclose(lse, np.full(4, 1e4), rtol=1e-5)


def test_parts_of_a_vocabulary_make_up_the_whole():
    """What each device computes where the vocabulary is cut; the simulator takes one device."""
    x = jax.random.normal(jax.random.key(0), (40, 16), "bfloat16")
    w = jax.random.normal(jax.random.key(1), (16, 2 * 72), "bfloat16")
    targets_T = jax.random.randint(jax.random.key(2), (40,), 0, w.shape[1])

    def cut(x, w):
        lse, target = zip(
            *(
                pallas_gpu._part(None, SIMULATED, x, w[:, first : first + 72], targets_T - first)
                for first in (0, 72)
            ),
            strict=True,
        )
        lse_T = jnp.logaddexp(*lse)
        return lse_T - sum(target), lse_T

    def whole(x, w):
        return linear_cross_entropy(x, w, targets_T, implementation="reference")

    got, pull = jax.vjp(jax.jit(cut), x, w)
    expected, pull_expected = jax.vjp(jax.jit(whole), x, w)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    along = (jnp.arange(40.0), jnp.ones(40))
    for a, b in zip(pull(along), pull_expected(along), strict=True):
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(*(y.astype("float32") for y in (a, b)), atol=1e-2 * scale)


def test_it_is_for_gpus_and_sixteen_bits_and_not_the_default(monkeypatch):
    run = functools.partial(linear_cross_entropy, implementation="pallas_gpu")
    x, w, targets_T = jnp.ones((8, 64)), jnp.ones((64, 128)), jnp.zeros(8, jnp.int32)
    with pytest.raises(ValueError, match="'pallas_gpu' cannot run on cpu; it needs a GPU"):
        run(x.astype("bfloat16"), w, targets_T)
    with pytest.raises(ValueError, match=r"'pallas_gpu' takes x of .*; x \(8, 64\) is float32"):
        run(x, w, targets_T, interpret=True)
    with targets.compiling_for("gpu"):
        traced = jax.jit(run).trace(x.astype("bfloat16"), w, targets_T)
        assert choose(2048, 1024, dtype="bfloat16") == "chunked"
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.skipif(
    not gpu_compiler.available(), reason="the GPU compiler is not installed (make gpu-compiler)"
)
@pytest.mark.parametrize("soft_cap", [None, 30.0])
def test_kernels_compile_for_an_h100_in_little_memory(soft_cap):
    builder = "kernels_pallas.linear_cross_entropy.benchmark:forward_backward"
    program = gpu_compiler.compile_for(builder, implementation="pallas_gpu", soft_cap=soft_cap)
    tokens, vocab = 16_384, 100_352
    assert program.temp_bytes < 4 * tokens * vocab / 10
    for kernel in program.kernels:
        assert not kernel.spill_bytes and not kernel.serialized
