"""Experts on rows as words: the layout, and the products and derivatives against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import targets
from kernels_pallas.grouped_matmul import (
    grouped_matmul,
    grouped_swiglu,
    pallas_tpu_kernels,
    words,
)
from kernels_pallas.row_words import from_words, halves, joined, to_words
from kernels_pallas.schedule import compile_for

SIMULATED_TPU = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)

# rows, sizes of the groups, K, F
CASES = {
    "ends inside tiles, one empty, rows past the last": (50, (20, 0, 13), 512, 128),
    "one row": (1, (0, 1, 0), 512, 128),
    "groups past the last row": (70, (13, 7, 20, 5, 3, 0, 50), 512, 384),
    "all empty": (40, (0, 0), 512, 128),
    "wide": (40, (11, 20), 4096, 128),
}


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(
        pallas_tpu_kernels, "tile_rows", lambda rows, groups: min(32, max(16, rows))
    )


def test_a_word_holds_a_column_of_each_half():
    x_MK = jnp.asarray(np.random.default_rng(0).normal(size=(3, 1024)), jnp.bfloat16)
    words_MSL = to_words(x_MK)
    assert words_MSL.shape == (3, 4, 128) and words_MSL.dtype == jnp.uint32
    low, high = halves(words_MSL)
    assert low[2, 1, 7] == x_MK[2, 128 + 7] and high[2, 1, 7] == x_MK[2, 512 + 128 + 7]
    np.testing.assert_array_equal(from_words(words_MSL), x_MK)
    np.testing.assert_array_equal(joined(low, high), words_MSL)


def expert(case, interpret):
    """(y, dx, d gate_up, d down) as float32: by the kernels, in bfloat16 by the reference, and so
    in float32. Rows behind all groups are NaN for the kernels.
    """
    rows, sizes, width, hidden = CASES[case]
    rng = np.random.default_rng(1)

    def normal(*shape, scale=1.0):
        return jnp.asarray(rng.normal(size=shape) * scale, jnp.bfloat16)

    x, d_y = normal(rows, width), normal(rows, width)
    gate_up = normal(len(sizes), 2, width, hidden, scale=width**-0.5)
    down = normal(len(sizes), hidden, width, scale=hidden**-0.5)
    groups = jnp.asarray(sizes, jnp.int32)
    behind_M1 = (jnp.arange(rows) >= sum(sizes))[:, None]

    def kernels(x, gate_up, down, d_y):
        x, d_y = (to_words(jnp.where(behind_M1, jnp.nan, rows)) for rows in (x, d_y))
        h = words.up(x, gate_up, groups, interpret=interpret)
        y = words.down(h, down, groups, interpret=interpret)
        d_h, d_down = words.down_backward(h, down, groups, d_y, interpret=interpret)
        d_x, d_gate_up = words.up_backward(x, gate_up, groups, d_h, interpret=interpret)
        return from_words(y), from_words(d_x), d_gate_up, d_down

    def reference(x, gate_up, down, d_y):
        def both(x, gate_up, down):
            h = grouped_swiglu(x, gate_up, groups, implementation="reference")
            return grouped_matmul(h, down, groups, implementation="reference")

        y, pull = jax.vjp(both, x, gate_up, down)
        return y, *pull(d_y)

    arrays = (x, gate_up, down, d_y)
    exact = jax.jit(reference)(*(array.astype(jnp.float32) for array in arrays))
    return [
        [np.asarray(array, np.float32) for array in results]
        for results in (jax.jit(kernels)(*arrays), jax.jit(reference)(*arrays), exact)
    ]


def check(case, interpret):
    for got, plain, exact in zip(*expert(case, interpret), strict=True):
        error, usual = np.abs(got - exact).max(), np.abs(plain - exact).max()
        assert error <= 2 * usual + 1e-6


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if i == 0 else pytest.mark.slow) for i, case in enumerate(CASES)],
)
def test_both_halves_of_an_expert_equal_the_reference(small_tiles, case):
    check(case, True)


def test_matrices_in_several_blocks(small_tiles, monkeypatch):
    """Words are then written, and read by the outer product, in a pass of their own."""
    whole = pallas_tpu_kernels.choose_tiles

    def narrow(rows, groups, columns, vmem):
        return pallas_tpu_kernels.Tiles(whole(rows, groups, columns, vmem).rows, 128)

    monkeypatch.setattr(pallas_tpu_kernels, "choose_tiles", narrow)
    check("ends inside tiles, one empty, rows past the last", True)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_on_a_simulated_tpu(small_tiles, case):
    """No races, no use of what was never written, nothing read out of bounds."""
    check(case, SIMULATED_TPU)
    assert not interpret_pallas_call.races.races_found


def program(which: str, *, rows: int, groups: int, width: int, hidden: int):
    """One of the four functions and its arguments, for `compile_for`."""

    def bf16(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    row_words = jax.ShapeDtypeStruct((rows, width // 256, 128), jnp.uint32)
    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
    gate_up, down, h = (
        bf16(groups, 2, width, hidden),
        bf16(groups, hidden, width),
        bf16(rows, hidden),
    )
    arguments = {
        "up": (row_words, gate_up, sizes),
        "down": (h, down, sizes),
        "up_backward": (row_words, gate_up, sizes, h),
        "down_backward": (h, down, sizes, row_words),
    }
    return getattr(words, which), arguments[which]


@pytest.mark.parametrize(
    ("chip", "which"),
    [
        pytest.param(
            chip, which, marks=[] if (chip, which) == ("v6e", "down") else pytest.mark.slow
        )
        for chip in ("v5e", "v5p", "v6e", "tpu7x")
        for which in ("up", "down", "up_backward", "down_backward")
    ],
)
def test_compiles_without_another_layout(chip, which):
    """At OLMoE's size: a copy of the rows would take 512 MiB, as gradients of gate and up do."""
    pytest.importorskip("libtpu")
    compiled = compile_for(
        f"{__name__}:program",
        chip,
        dump=False,
        which=which,
        rows=131072,
        groups=64,
        width=2048,
        hidden=1024,
    )
    assert compiled.temp_bytes <= (514 if which == "up_backward" else 2) * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("which", ["down", "down_backward"])
def test_wide_rows_compile(which):
    """Mixtral 8x7B: a matrix of 14,336 x 4,096 takes several blocks."""
    pytest.importorskip("libtpu")
    target = f"{__name__}:program"
    sizes = dict(rows=16384, groups=8, width=4096, hidden=14336)
    assert compile_for(target, "v5p", dump=False, which=which, **sizes).temp_bytes


def test_which_rows_can_be_words():
    assert words.suits("bfloat16", 2048, 1024) and words.suits("bfloat16", 4096, 14336)
    assert not words.suits("float32", 2048, 1024)
    assert not words.suits("bfloat16", 1024, 1024)
    assert not words.suits("bfloat16", 2048, 1000)
    rows, sizes = jnp.zeros((4, 8, 128), jnp.uint32), jnp.ones(1, jnp.int32)
    with pytest.raises(ValueError, match="cannot run on cpu"):
        words.up(rows, jnp.zeros((1, 2, 2048, 128), jnp.bfloat16), sizes)
    with targets.compiling_for("tpu"):
        out = jax.eval_shape(words.up, rows, jnp.zeros((1, 2, 2048, 128), jnp.bfloat16), sizes)
    assert out.shape == (4, 128) and out.dtype == jnp.bfloat16
