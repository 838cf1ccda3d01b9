"""Every implementation of the grouped products against the definition: values and gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import targets
from kernels_pallas.grouped_matmul import (
    choose,
    grouped_matmul,
    grouped_swiglu,
    pallas_tpu_kernels,
    rows,
)
from kernels_pallas.schedule import compile_for

OTHERS = ["tiled", "ragged"]
"""What runs here; the kernels for TPUs are slow to interpret and run fewer cases by default."""

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
    "ends in tiles of every size": (50, 900, (257, 129, 96, 65, 64, 32, 1), 8, 16, True),
}


KERNEL_CASES = {
    "ends inside tiles, one empty, rows past the last": (20, 50, (20, 0, 13), 256, 128, True),
    "without a gather": (50, 50, (20, 0, 13), 256, 128, False),
    "one row": (1, 1, (0, 1, 0), 256, 128, True),
    "one group takes all": (20, 100, (0, 100, 0, 0), 256, 128, True),
    "groups past the last row": (20, 70, (13, 7, 20, 5, 3, 0, 50), 256, 384, True),
    "all empty": (9, 40, (0, 0), 256, 128, True),
    "no rows": (9, 0, (0, 0), 256, 128, True),
}
"""The same for the TPU kernels, whose widths are whole lanes."""

SIMULATED_TPU = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(
        pallas_tpu_kernels, "tile_rows", lambda rows, groups: min(32, max(16, rows))
    )


def outputs_and_gradients(implementation, case, dtype, cases=None, interpret=False):
    """(h, y, z, dx, d gate_up, d down) as float32: both halves of an expert, and a product with a
    transposed matrix.
    """
    tokens, count, sizes, width, hidden, gathers = (cases or CASES)[case]
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    x = normal(tokens, width).astype(dtype)
    gate_up = normal(len(sizes), 2, width, hidden) / width**0.5
    down = normal(len(sizes), hidden, width) / hidden**0.5
    along_h, along_y = normal(count, hidden), normal(count, width)
    sizes = jnp.asarray(sizes, jnp.int32)
    picks = jnp.asarray(rng.integers(0, tokens, count), jnp.int32) if gathers else None

    how = dict(implementation=implementation, interpret=interpret)

    def run(x, gate_up, down):
        def total(x, gate_up, down):
            h = grouped_swiglu(x, gate_up, sizes, rows_M=picks, **how)
            y = grouped_matmul(h, down, sizes, **how)
            z = grouped_matmul(
                x,
                down,
                sizes,
                rows_M=picks,
                transpose_rhs=True,
                preferred_element_type=jnp.float32,
                **how,
            )
            return jnp.sum(y * along_y) + jnp.sum((h + z) * along_h), (h, y, z)

        gradient = jax.value_and_grad(total, (0, 1, 2), has_aux=True)
        (_, outputs), gradients = gradient(x, gate_up, down)
        return *outputs, *gradients

    return [np.asarray(a, np.float32) for a in jax.jit(run)(x, gate_up, down)]


def check(implementation, case, dtype, cases=None, interpret=False):
    """float32 to 1e-5; other dtypes to twice the reference's own error in them."""
    got = outputs_and_gradients(implementation, case, dtype, cases, interpret)
    exact = outputs_and_gradients("reference", case, "float32", cases)
    if dtype == "float32":
        for a, b in zip(got, exact, strict=True):
            scale = max(1, np.abs(b).max(initial=0))
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * scale)
        return
    plain = outputs_and_gradients("reference", case, dtype, cases)
    for a, b, c in zip(got, plain, exact, strict=True):
        assert np.linalg.norm(a - c) <= 2 * np.linalg.norm(b - c) + 1e-6 * np.linalg.norm(c)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", OTHERS)
def test_equals_the_reference_in_float32(implementation, case):
    check(implementation, case, "float32")


@pytest.mark.parametrize("case", list(CASES)[:2])
@pytest.mark.parametrize("implementation", OTHERS)
def test_bfloat16_error_is_at_most_twice_that_of_the_reference(implementation, case):
    check(implementation, case, "bfloat16")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(
            case,
            dtype,
            marks=[] if (index, dtype) in ((0, "bfloat16"), (1, "float32")) else pytest.mark.slow,
        )
        for index, case in enumerate(KERNEL_CASES)
        for dtype in ("float32", "bfloat16")
    ],
)
def test_tpu_kernels_equal_the_reference(small_tiles, case, dtype):
    check("pallas_tpu", case, dtype, KERNEL_CASES, interpret=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", KERNEL_CASES)
def test_tpu_kernels_on_a_simulated_tpu(small_tiles, case, dtype):
    """No races, no use of what was never written, nothing read out of bounds."""
    check("pallas_tpu", case, dtype, KERNEL_CASES, interpret=SIMULATED_TPU)
    races = interpret_pallas_call.races
    assert races is None or not races.races_found


def test_one_tpu_kernel_on_a_simulated_tpu(small_tiles):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(9, 256)), jnp.bfloat16)
    w = jnp.asarray(rng.normal(size=(3, 256, 128)), jnp.bfloat16)
    sizes, picks = jnp.asarray([20, 0, 13], jnp.int32), jnp.arange(40, dtype=jnp.int32) % 9
    product = functools.partial(grouped_matmul, x, w, sizes, rows_M=picks)
    got = product(implementation="pallas_tpu", interpret=SIMULATED_TPU)
    expected = product(implementation="reference")
    np.testing.assert_allclose(
        got.astype(np.float32), expected.astype(np.float32), rtol=1e-2, atol=1e-2
    )
    assert not interpret_pallas_call.races.races_found


def test_tpu_kernels_are_for_tpus():
    x, w, sizes = jnp.ones((6, 128)), jnp.ones((2, 128, 128)), jnp.ones(2, jnp.int32)
    with pytest.raises(ValueError, match="'pallas_tpu' cannot run on cpu; it needs a TPU"):
        grouped_matmul(x, w, sizes, implementation="pallas_tpu")
    with pytest.raises(ValueError, match="interpret is for implementations 'pallas_tpu'"):
        grouped_matmul(x, w, sizes, implementation="tiled", interpret=True)
    with pytest.raises(ValueError, match=r"widths in multiples of 128, got \(64, 128\)"):
        grouped_matmul(x[:, :64], w[:, :64], sizes, implementation="pallas_tpu", interpret=True)


def test_the_choice_is_what_can_run(monkeypatch):
    assert choose("float32", (64, 64), gathers=True) == "tiled"
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    with targets.compiling_for("tpu"):
        assert choose("bfloat16", (2048, 1024), gathers=True) == "ragged"
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with targets.compiling_for("tpu"):
        assert choose("bfloat16", (2048, 1024), gathers=True) == "pallas_tpu"
        assert choose("bfloat16", (128, 1024), gathers=True) == "ragged"
        assert choose("float16", (2048, 1024), gathers=False) == "ragged"
    with targets.compiling_for("gpu"):
        assert choose("bfloat16", (2048, 1024), gathers=True) == "tiled"


@pytest.mark.parametrize(
    ("chip", "which", "mebibytes"),
    [
        ("v6e", "product", 1),
        *[
            pytest.param(chip, which, mebibytes, marks=pytest.mark.slow)
            for chip in ("v5e", "v5p", "v6e", "tpu7x")
            for which, mebibytes in (
                ("product", 1),
                ("gathered", 65),
                ("dlhs", 1),
                ("drhs", 1),
                ("swiglu", 65),
                ("swiglu_backward", 1300),
            )
        ],
    ],
)
def test_tpu_kernels_compile_at_the_size_of_olmoe(chip, which, mebibytes):
    """`gathered` and `swiglu` pack their tokens; nothing is as large as the gathered rows or the
    matrices but, going backward, the gradients of the gathered rows and of gate and up.
    """
    pytest.importorskip("libtpu")
    program = compile_for(
        "kernels_pallas.grouped_matmul.benchmark:ours", chip, dump=False, which=which
    )
    assert program.temp_bytes <= mebibytes * 2**20


def layer_gradients(*, rows: int, groups: int, width: int, hidden: int):
    """Gradients of a layer of experts by the TPU kernels, for `compile_for`."""

    def loss(x, gate_up, down, sizes):
        h = grouped_swiglu(x, gate_up, sizes, implementation="pallas_tpu")
        y = grouped_matmul(h, down, sizes, implementation="pallas_tpu")
        return jnp.sum(y.astype(jnp.float32))

    shapes = (rows, width), (groups, 2, width, hidden), (groups, hidden, width)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
    return jax.grad(loss, argnums=(0, 1, 2)), (*arrays, sizes)


@pytest.mark.parametrize("chip", [pytest.param("v5e", marks=pytest.mark.slow), "v5p"])
def test_wide_experts_compile(chip):
    """Mixtral 8x7B: tiles of 512 whole rows of 14,336 would not fit the vector memory."""
    pytest.importorskip("libtpu")
    target = f"{__name__}:layer_gradients"
    assert compile_for(
        target, chip, dump=False, rows=16384, groups=8, width=4096, hidden=14336
    ).temp_bytes


@pytest.mark.parametrize("item", [2, 4])
@pytest.mark.parametrize("width", [128, 2048, 14336, pallas_tpu_kernels.WIDEST])
def test_tiles_of_every_width_fit(width, item):
    def vmem(size):
        return 6 * size * width * item, 4 * width * 4 + 4 * size * item

    tiles = pallas_tpu_kernels.choose_tiles(10**6, 8, 14336, vmem)
    fixed, per_column = vmem(tiles.rows)
    assert fixed + tiles.columns * per_column <= pallas_tpu_kernels.VMEM_BUDGET
    assert tiles.rows >= 16 and 14336 % tiles.columns == 0


def test_wider_rows_go_elsewhere():
    with targets.compiling_for("tpu"):
        assert choose("bfloat16", (pallas_tpu_kernels.WIDEST + 128, 256), gathers=False) == "ragged"
    x, w, sizes = jnp.ones((2, 16512)), jnp.ones((1, 16512, 128)), jnp.ones(1, jnp.int32)
    with pytest.raises(ValueError, match="widths of at most 16384, got"):
        grouped_matmul(x, w, sizes, implementation="pallas_tpu", interpret=True)


def test_reference_equals_a_loop_in_numpy():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(10, 4)), rng.normal(size=(3, 4, 5))
    expected = np.concatenate([x[:6] @ w[0], x[6:9] @ w[2], np.zeros((1, 5))])
    sizes = jnp.asarray([6, 0, 3], jnp.int32)
    got = grouped_matmul(
        jnp.asarray(x, "float32"), jnp.asarray(w, "float32"), sizes, implementation="reference"
    )
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", *OTHERS])
def test_dtypes_of_results_and_gradients(implementation):
    x, w = jnp.ones((6, 8), jnp.bfloat16), jnp.ones((2, 8, 4))
    sizes = jnp.asarray([2, 4], jnp.int32)

    def product(x, w):
        return grouped_matmul(x, w, sizes, implementation=implementation)

    out, pull = jax.vjp(product, x, w)
    dx, dw = pull(jnp.ones_like(out))
    assert (out.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("implementation", ["reference", *OTHERS])
def test_negative_sizes_count_as_zero(implementation):
    x, w = jnp.ones((4, 8)), jnp.stack([jnp.ones((8, 1)), 2 * jnp.ones((8, 1))])
    sizes = jnp.asarray([-3, 2], jnp.int32)
    got = grouped_matmul(x, w, sizes, implementation=implementation)
    np.testing.assert_array_equal(got[:, 0], [16, 16, 0, 0])


# Numbers outside the groups are nobody: too small, behind the groups, behind all rows.
@pytest.mark.parametrize("readers", [None, [[1, -1, 5], [7, 4, 9], [6] * 3, [0, 2, 3], [8] * 3]])
def test_rows_are_added_up_whatever_their_number(readers):
    # The last two lie behind all groups.
    picks = jnp.asarray([3, 0, 3, 3, 1, 3, 4], jnp.int32)
    d = jnp.arange(14.0).reshape(7, 2)
    expected = jnp.zeros((5, 2)).at[picks[:5]].add(d[:5])
    readers = readers and jnp.asarray(readers, jnp.int32)
    add = jax.jit(rows.add_rows, static_argnums=2)
    np.testing.assert_array_equal(add(d, picks, 5, jnp.int32(5), readers), expected)


@pytest.mark.parametrize("implementation", ["reference", *OTHERS])
def test_known_readers_change_nothing(implementation):
    x, w = jnp.arange(24.0).reshape(3, 8), jnp.ones((2, 8, 4))
    picks, sizes = jnp.asarray([2, 0, 2, 1, 1, 1], jnp.int32), jnp.asarray([1, 2], jnp.int32)

    def gradient(readers):
        return jax.grad(
            lambda x: grouped_matmul(
                *(x, w, sizes),
                rows_M=picks,
                readers_Tr=readers,
                implementation=implementation,
            ).sum()
        )(x)

    readers = jnp.asarray([[1, 9], [5, 3], [2, 0]], jnp.int32)
    np.testing.assert_array_equal(gradient(readers), gradient(None))
    np.testing.assert_array_equal(gradient(readers)[:, 0], [4.0, 0.0, 8.0])


@pytest.mark.parametrize("implementation", ["reference", *OTHERS])
def test_fewer_rows_than_the_bound_may_be_expected(implementation):
    x = jnp.arange(200 * 8.0).reshape(200, 8) / 800
    gate_up = jnp.cos(jnp.arange(2 * 8 * 2 * 4.0)).reshape(2, 2, 8, 4)
    sizes = jnp.asarray([70, 5], jnp.int32)

    def gradients(expected_rows):
        return jax.grad(
            lambda x, w: grouped_swiglu(
                x, w, sizes, expected_rows=expected_rows, implementation=implementation
            ).sum(),
            (0, 1),
        )(x, gate_up)

    for one, other in zip(gradients(None), gradients(64), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", *OTHERS, "pallas_tpu"])
def test_nothing_of_the_rows_behind_all_groups_gets_anywhere(implementation):
    how = dict(implementation=implementation, interpret=implementation == "pallas_tpu")
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(40, 128)), jnp.float32)
    gate_up = jnp.asarray(rng.normal(size=(2, 2, 128, 128)), jnp.float32) / 12
    down = jnp.asarray(rng.normal(size=(2, 128, 128)), jnp.float32) / 12
    sizes = jnp.asarray([9, 12], jnp.int32)

    def run(x, along):
        def total(x, gate_up, down):
            h = grouped_swiglu(x, gate_up, sizes, **how)
            y = grouped_matmul(h, down, sizes, **how)
            return jnp.sum(y * along), y

        gradient = jax.value_and_grad(total, (0, 1, 2), has_aux=True)
        (_, y), gradients = gradient(x, gate_up, down)
        return y, *gradients

    behind = jnp.arange(40)[:, None] >= 21
    along = jnp.asarray(rng.normal(size=(40, 128)), jnp.float32)
    expected = run(jnp.where(behind, 0, x), along)
    got = run(jnp.where(behind, jnp.nan, x), jnp.where(behind, jnp.nan, along))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_tiles_and_the_declared_work_are_those_of_the_expected_rows():
    """256 rows may come, 8,192 could."""
    x, w = jnp.ones((8192, 256), jnp.bfloat16), jnp.ones((2, 256, 128), jnp.bfloat16)
    sizes = jnp.full(2, 128, jnp.int32)

    def calls(expected_rows):
        def loss(x, w):
            out = grouped_matmul(
                *(x, w, sizes), expected_rows=expected_rows, implementation="pallas_tpu"
            )
            return out.sum().astype(jnp.float32)

        with targets.compiling_for("tpu"):
            jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, w)
        return re.findall(r"flops=(\d+)", str(jaxpr))

    # 128 rows a tile: two tiles and one more that two groups share; without it 512 a tile.
    few, all_rows = 2 * 3 * 128 * 256 * 128, 2 * 17 * 512 * 256 * 128
    assert calls(256) == [str(few)] * 3
    assert calls(None) == [str(all_rows)] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(expected_rows=0), "expected_rows is 0, expected at least 1"),
        (dict(lhs=jnp.ones((2, 3, 4))), r"lhs has shape \(2, 3, 4\), expected \[M, K\]"),
        (dict(rhs=jnp.ones((2, 5, 3))), "rhs .* has K = 5, lhs .* has K = 8"),
        (dict(rhs=jnp.ones((2, 8, 3), jnp.int32)), "rhs .* has dtype int32, expected one of"),
        (dict(group_sizes_G=jnp.ones(3, jnp.int32)), r"group_sizes_G is int32 \(3,\), expected"),
        (dict(group_sizes_G=jnp.ones(2)), "group_sizes_G is float32"),
        (dict(rows_M=jnp.ones((2, 2), jnp.int32)), r"rows_M is int32 \(2, 2\)"),
        (dict(readers_Tr=jnp.ones((6, 1), jnp.int32)), "readers_Tr goes with rows_M"),
        (
            dict(rows_M=jnp.ones(4, jnp.int32), readers_Tr=jnp.ones((4, 1), jnp.int32)),
            r"readers_Tr is int32 \(4, 1\), expected int32 \[6, r\]",
        ),
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
    with pytest.raises(ValueError, match=r"expected \[G, 2, K, F\] with K = 8"):
        grouped_swiglu(jnp.ones((6, 8)), jnp.ones((2, 2, 3, 4)), sizes)
    with pytest.raises(ValueError, match="gate_up_GCKF has shape"):
        grouped_swiglu(jnp.ones((6, 8)), jnp.ones((2, 8, 8)), sizes)
