"""Every implementation of paged attention against the definition, and against plain attention."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import attention
from kernels_pallas import paged_attention as package
from kernels_pallas.paged_attention import IMPLEMENTATIONS, blocked, choose, pallas_tpu
from kernels_pallas.schedule import compile_for, libtpu_version

OTHERS = sorted(set(IMPLEMENTATIONS) - {"reference"})

# query heads, key heads, head width, page size, pages a sequence, lengths
CASES = {
    "one token": (1, 1, 64, 16, 1, [1]),
    "equal heads, an empty sequence between": (4, 4, 32, 16, 5, [80, 0, 37]),
    "groups of 3, the first and the last empty": (6, 2, 80, 32, 3, [0, 96, 1, 64, 0]),
    "one key head": (5, 1, 256, 16, 4, [63, 64, 17, 33]),
    "all empty": (2, 1, 64, 16, 2, [0, 0]),
    "many blocks": (2, 2, 64, 16, 11, [176, 170, 16]),
}

SIMULATED = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise", random_seed=1
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    # Three pages of the narrowest case, one of the widest.
    monkeypatch.setattr(pallas_tpu, "BUFFER_BYTES", 3 * 16 * 128 * 4)
    monkeypatch.setattr(blocked, "BLOCK_TOKENS", 48)


@functools.cache
def inputs(case, dtype="float32"):
    """Arguments whose unused slots hold NaN and whose unused table entries are wild."""
    q_heads, kv_heads, head_dim, page, pages_each, lengths = CASES[case]
    batch, width = len(lengths), kv_heads * head_dim
    rng = np.random.default_rng(0)
    pages = batch * pages_each + 2
    table = rng.permutation(pages)[: batch * pages_each].reshape(batch, pages_each)
    used = np.zeros((pages, page), bool)
    wild = np.ones(table.shape, bool)
    for row, length in enumerate(lengths):
        token = np.arange(length)
        used[table[row, token // page], token % page] = True
        wild[row, token // page] = False
    k, v = (
        jnp.asarray(np.where(used[..., None], rng.normal(size=(pages, page, width)), np.nan), dtype)
        for _ in range(2)
    )
    q = jnp.asarray(rng.normal(size=(batch, q_heads, head_dim)), dtype)
    table = np.where(wild, 10**6, table)
    return q, k, v, jnp.asarray(lengths, jnp.int32), jnp.asarray(table, jnp.int32)


def run(implementation, case, dtype="float32", interpret: Any = True):
    options = dict(interpret=interpret) if implementation == "pallas_tpu" else {}
    out = package.paged_attention(
        *inputs(case, dtype), implementation=implementation, scale=0.3, **options
    )
    assert out.dtype == jnp.dtype(dtype)
    return np.asarray(out, np.float32)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", OTHERS)
def test_equals_the_reference_in_float32(implementation, case):
    np.testing.assert_allclose(run(implementation, case), run("reference", case), atol=1e-5)


@pytest.mark.parametrize("case", ["groups of 3, the first and the last empty", "many blocks"])
@pytest.mark.parametrize("implementation", OTHERS)
def test_bfloat16_error_is_at_most_twice_that_of_the_reference(implementation, case):
    low = [jnp.asarray(x, "bfloat16").astype("float32") for x in inputs(case)[:3]]
    exact = package.paged_attention(*low, *inputs(case)[3:], implementation="reference", scale=0.3)
    plain, got = run("reference", case, "bfloat16"), run(implementation, case, "bfloat16")
    assert np.linalg.norm(got - exact) <= 2 * np.linalg.norm(plain - exact)


@pytest.mark.parametrize(
    ("case", "cores"),
    [*((case, 1) for case in CASES), ("groups of 3, the first and the last empty", 2)],
)
def test_no_race_and_no_uninitialised_memory(case, cores, monkeypatch):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    monkeypatch.setattr(pallas_tpu, "_cores", lambda: cores)
    try:
        got = run("pallas_tpu", case, interpret=SIMULATED)
        np.testing.assert_allclose(got, run("reference", case), atol=1e-5)
        assert interpret_pallas_call.races is not None
        assert not interpret_pallas_call.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def test_reference_equals_attention_over_contiguous_keys():
    case = "groups of 3, the first and the last empty"
    q, k_pages, v_pages, lengths, table = inputs(case)
    kv_heads, head_dim = CASES[case][1:3]
    out = run("reference", case)
    for row, length in enumerate(map(int, lengths)):
        if not length:
            np.testing.assert_array_equal(out[row], 0)
            continue
        k, v = (
            x[table[row]].reshape(1, -1, kv_heads, head_dim)[:, :length] for x in (k_pages, v_pages)
        )
        alone = attention.attention(
            q[row][None, None], k, v, causal=False, scale=0.3, implementation="reference"
        )
        np.testing.assert_allclose(out[row], alone[0, 0], atol=1e-5)


def test_lengths_and_pages_out_of_range_are_cut():
    q, k, v, _, table = inputs("many blocks")
    same = functools.partial(package.paged_attention, q, k, v, implementation="reference")
    np.testing.assert_array_equal(
        same(jnp.array([10**6, 170, -5]), table), same(jnp.array([176, 170, 0]), table)
    )


def arguments(**change):
    given = dict(
        q=jnp.zeros((2, 4, 64)),
        k_pages=jnp.zeros((6, 16, 128)),
        v_pages=jnp.zeros((6, 16, 128)),
        lengths=jnp.zeros(2, jnp.int32),
        page_table=jnp.zeros((2, 3), jnp.int32),
    )
    return given | change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=jnp.zeros((2, 4))), r"expected q \[B,Q,H\]"),
        (dict(v_pages=jnp.zeros((6, 8, 128))), r"\(6, 8, 128\)"),
        (dict(q=jnp.zeros((2, 4, 48))), r"k_pages \(6, 16, 128\) .* must be K \* 48"),
        (dict(q=jnp.zeros((2, 3, 64))), r"K dividing 3"),
        (dict(lengths=jnp.zeros(3, jnp.int32)), r"lengths has shape \(3,\), expected \(2,\)"),
        (dict(page_table=jnp.zeros(2, jnp.int32)), r"page_table has shape \(2,\)"),
        (dict(page_table=jnp.zeros((2, 3))), r"page_table \(2, 3\) is float32; integers"),
        (dict(q=jnp.zeros((2, 4, 64), "bfloat16")), "k_pages .* float32 but q is bfloat16"),
        (dict(q=jnp.zeros((2, 4, 64), int)), "q .* is int32; float32, bfloat16"),
        (dict(implementation="fast"), "unknown implementation 'fast'"),
        (dict(implementation="blocked", interpret=True), "interpret is for implementation"),
        (dict(implementation="pallas_tpu"), "'pallas_tpu' cannot run on cpu; it needs a TPU"),
        (
            dict(
                implementation="pallas_tpu",
                interpret=True,
                k_pages=jnp.zeros((6, 4, 128)),
                v_pages=jnp.zeros((6, 4, 128)),
            ),
            r"needs pages of a multiple of 8 tokens in float32, got \(6, 4, 128\)",
        ),
        (
            dict(
                implementation="pallas_tpu",
                interpret=True,
                page_table=jnp.zeros((2, 2**17), jnp.int32),
            ),
            r"page_table of 131072 entries at most, got \(2, 131072\)",
        ),
    ],
)
def test_what_it_cannot_take_is_an_error_before_compilation(change, message):
    with pytest.raises(ValueError, match=message):
        package.paged_attention(**arguments(**change))


def test_the_choice_is_what_can_run(monkeypatch):
    def chosen(**change):
        given = arguments(**change)
        return choose(given["q"], given["k_pages"], given["page_table"])

    assert chosen() == "blocked"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert chosen() == "pallas_tpu"
    assert chosen(k_pages=jnp.zeros((6, 4, 128))) == "blocked"
    assert chosen(k_pages=jnp.zeros((6, 16, 64))) == "blocked"
    assert chosen(q=jnp.zeros((2, 4, 64), "float16")) == "blocked"


needs_libtpu = pytest.mark.skipif(libtpu_version() is None, reason="libtpu is not installed")
BUILDER = "kernels_pallas.paged_attention.benchmark:decode"


@needs_libtpu
def test_compiles_for_a_tpu_at_production_shapes():
    assert compile_for(BUILDER, "v5e", dump=False).temp_bytes < 2**20


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x"])
@pytest.mark.parametrize(
    "shape",
    [
        dict(),
        dict(page=128),
        dict(page=64, q_heads=32, kv_heads=8),
        dict(head_dim=64, q_heads=12, kv_heads=12),
        dict(head_dim=80, q_heads=6, kv_heads=2, batch=3),
        dict(head_dim=96, q_heads=8, kv_heads=1),
        dict(head_dim=256, q_heads=8, kv_heads=4, dtype="float32"),
    ],
    ids=str,
)
def test_compiles(chip, shape):
    program = compile_for(BUILDER, chip, dump=False, **shape)
    if shape.get("kv_heads", 16) * shape.get("head_dim", 128) % 128 == 0:
        # Nothing of the size of the cache.
        assert program.temp_bytes < 2**20
