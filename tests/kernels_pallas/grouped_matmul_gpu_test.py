"""Grouped products on a simulated GPU, which finds races, reads of memory that nothing was written
to, and copies that leave their array; and the kernel compiled for an H100.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import gpu_compiler, hopper, targets
from kernels_pallas.grouped_matmul import choose, grouped_matmul, grouped_swiglu
from kernels_pallas.grouped_matmul.pallas_gpu_outer import outer
from kernels_pallas.grouped_matmul.pallas_gpu_product import product

SIMULATED = plgpu.InterpretGPUParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)

# rows, sizes of the groups, K, N
CASES = {
    "ends inside tiles, one empty, rows past the last": (301, (70, 0, 130, 3), 320, 192),
    "one row": (1, (0, 1, 0), 64, 64),
    "one group takes all": (200, (0, 200, 0, 0), 64, 128),
    "groups past the last row": (70, (13, 7, 20, -4, 3, 0, 50), 64, 64),
    "whole tiles": (256, (128, 64, 64), 256, 128),
    "all empty": (40, (0, 0), 64, 64),
}


@pytest.fixture(autouse=True)
def few_multiprocessors(monkeypatch):
    """A block has several tiles."""
    monkeypatch.setattr(hopper, "multiprocessors", lambda: 2)


@pytest.mark.parametrize(
    ("case", "dtype"), [(case, "bfloat16") for case in CASES] + [("whole tiles", "float16")]
)
def test_outer_products_are_exact_and_take_nothing_from_other_rows(case, dtype):
    rows, sizes, width, columns = CASES[case]
    rng = np.random.default_rng(0)
    ends = np.minimum(np.cumsum(np.maximum(sizes, 0)), rows)
    starts = np.concatenate([[0], ends[:-1]])
    lhs, d = (
        jnp.asarray(rng.normal(size=(rows, size)), dtype).at[ends[-1] :].set(jnp.nan)
        for size in (width, columns)
    )
    out = outer(lhs, d, jnp.asarray(sizes, jnp.int32), out_dtype=jnp.float32, interpret=SIMULATED)
    assert not gpu_callbacks.get_races().races_found
    lhs, d = np.asarray(lhs, np.float64), np.asarray(d, np.float64)
    for group, (start, end) in enumerate(zip(starts, ends, strict=True)):
        expected = lhs[start:end].T @ d[start:end]
        np.testing.assert_allclose(out[group], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "transpose_rhs", "out_dtype"),
    [(case, False, "bfloat16") for case in CASES]
    + [(next(iter(CASES)), True, "bfloat16"), ("groups past the last row", True, "float32")],
)
def test_products_are_exact_and_take_nothing_from_other_rows(case, transpose_rhs, out_dtype):
    rows, sizes, width, columns = CASES[case]
    rng = np.random.default_rng(0)
    ends = np.minimum(np.cumsum(np.maximum(sizes, 0)), rows)
    starts = np.concatenate([[0], ends[:-1]])
    lhs = jnp.asarray(rng.normal(size=(rows, width)), "bfloat16").at[ends[-1] :].set(jnp.nan)
    rhs = jnp.asarray(rng.normal(size=(len(sizes), width, columns)), "bfloat16")
    out = product(
        lhs,
        jnp.swapaxes(rhs, 1, 2) if transpose_rhs else rhs,
        jnp.asarray(sizes, jnp.int32),
        transpose_rhs=transpose_rhs,
        out_dtype=jnp.dtype(out_dtype),
        interpret=SIMULATED,
    )
    assert not gpu_callbacks.get_races().races_found
    assert out.dtype == out_dtype
    expected = np.zeros((rows, columns))
    for group, (start, end) in enumerate(zip(starts, ends, strict=True)):
        expected[start:end] = np.asarray(lhs[start:end], np.float64) @ np.asarray(
            rhs[group], np.float64
        )
    expected = jnp.asarray(expected, out_dtype).astype(np.float32)
    # The last bit of a rounded sum may differ.
    rtol = 1e-5 if out_dtype == "float32" else 2**-7
    np.testing.assert_allclose(out.astype(np.float32), expected, rtol=rtol, atol=1e-4)


@pytest.mark.parametrize("gathers", [False, True])
def test_error_of_an_expert_is_at_most_twice_that_of_the_reference(gathers):
    rng = np.random.default_rng(0)
    tokens, rows, width, hidden = (30 if gathers else 70), 70, 64, 64
    sizes = jnp.asarray((20, 0, 30), jnp.int32)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    x, along_y, along_z = normal(tokens, width), normal(rows, width), normal(rows, hidden)
    gate_up, down = normal(3, 2, width, hidden) / 8, normal(3, hidden, width) / 11
    rows_M = jnp.asarray(rng.integers(0, tokens, rows), jnp.int32) if gathers else None

    def values_and_gradients(implementation, dtype):
        how = dict(implementation=implementation, interpret=implementation == "pallas_gpu")

        def total(x, gate_up, down):
            h = grouped_swiglu(x, gate_up, sizes, rows_M=rows_M, **how)
            y = grouped_matmul(h, down, sizes, **how)
            z = grouped_matmul(x, down, sizes, rows_M=rows_M, transpose_rhs=True, **how)
            return jnp.sum(y * along_y) + jnp.sum(z * along_z), (h, y, z)

        run = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))
        (_, values), gradients = run(x.astype(dtype), gate_up, down)
        return [np.asarray(a, np.float32) for a in (*values, *gradients)]

    exact = values_and_gradients("reference", "float32")
    plain = values_and_gradients("reference", "bfloat16")
    got = values_and_gradients("pallas_gpu", "bfloat16")
    for a, b, c in zip(got, plain, exact, strict=True):
        assert np.linalg.norm(a - c) <= 2 * np.linalg.norm(b - c) + 1e-6 * np.linalg.norm(c)


@pytest.mark.skipif(
    not gpu_compiler.available(), reason="the GPU compiler is not installed (make gpu-compiler)"
)
def test_the_layer_compiles_for_an_h100_at_the_size_of_olmoe():
    builder = "kernels_pallas.grouped_matmul.benchmark:layer_for_gpus"
    program = gpu_compiler.compile_for(builder, implementation="pallas_gpu")
    # Gathered rows, their gradient (512 MiB each), the two halves in float32 (1,024), and less.
    assert program.temp_bytes < 2000 * 2**20
    assert {kernel.name for kernel in program.kernels} == {"grouped_product", "grouped_outer"}
    for kernel in program.kernels:
        assert not kernel.spill_bytes and not kernel.serialized


def test_no_rows_give_no_gradient():
    x, w = jnp.ones((0, 64), jnp.bfloat16), jnp.ones((2, 64, 64))
    run = functools.partial(grouped_matmul, implementation="pallas_gpu", interpret=True)
    sizes = jnp.zeros(2, jnp.int32)
    dw = jax.grad(lambda w: run(x, w, sizes).sum().astype(jnp.float32))(w)
    np.testing.assert_array_equal(dw, 0)


def test_it_is_for_gpus_sixteen_bits_and_some_widths_and_not_the_default():
    run = functools.partial(grouped_matmul, implementation="pallas_gpu")
    x, w, sizes = jnp.ones((8, 64), "bfloat16"), jnp.ones((2, 64, 64)), jnp.ones(2, jnp.int32)
    with pytest.raises(ValueError, match="'pallas_gpu' cannot run on cpu; it needs a GPU"):
        run(x, w, sizes)
    with pytest.raises(ValueError, match=r"'pallas_gpu' takes rows of .*, got float32"):
        run(x.astype("float32"), w, sizes, interpret=True)
    with pytest.raises(ValueError, match=r"'pallas_gpu' needs widths in multiples of 64, got \(64"):
        run(x, w[..., :40], sizes, interpret=True)
    with targets.compiling_for("gpu"):
        gradient = jax.jit(jax.grad(lambda w: run(x, w, sizes).sum().astype("float32")))
        lowered = gradient.trace(w).lower(lowering_platforms=("cuda",))
        assert choose("bfloat16", (64, 64), gathers=False) == "tiled"
    assert "mosaic_gpu" in lowered.as_text()


def test_other_gpus_are_told_before_anything_is_compiled(monkeypatch):
    ampere = types.SimpleNamespace(compute_capability="8.0")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [ampere])
    with pytest.raises(ValueError, match=r"capability 9\.0 \(Hopper\), this one has 8\.0"):
        hopper.check("grouped_matmul", interpret=False)
    ampere.compute_capability = "9.0"
    hopper.check("grouped_matmul", interpret=False)
