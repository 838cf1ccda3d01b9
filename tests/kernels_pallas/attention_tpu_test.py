"""The TPU kernels in the interpreter that simulates a TPU's memory, and through the real compiler.

Their numbers are tested with those of the other implementations in attention_test.py.
"""

import jax
import numpy as np
import pytest
from attention_test import CASES, implementation_options, inputs, run, value_and_gradients
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import schedule
from kernels_pallas.attention import masks, pallas_tpu

STRICT = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)
QUICK_CASES = ["length 1", "all masks"]

needs_libtpu = pytest.mark.skipif(
    schedule.libtpu_version() is None, reason="libtpu is not installed"
)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    # Several blocks in a small sequence.
    monkeypatch.setattr(pallas_tpu, "FORWARD_BLOCKS", pallas_tpu.Blocks(256, 128))
    monkeypatch.setattr(pallas_tpu, "BACKWARD_BLOCKS", pallas_tpu.Blocks(128, 128))


@pytest.mark.parametrize(
    "case",
    [case if case in QUICK_CASES else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)
def test_reads_nothing_it_has_not_written_and_races_with_nothing(case):
    arrays, d_out, options = inputs(case, "float32")
    # A race, a read out of bounds or (by its NaN) of memory that was not written would show.
    got = run(arrays, d_out, **options, **implementation_options("pallas_tpu", STRICT))
    expected, _ = value_and_gradients("reference", case, "float32")
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "keys"), [("all masks", 128), pytest.param("window", 256, marks=pytest.mark.slow)]
)
def test_keys_in_parts(case, keys, monkeypatch):
    from kernels_pallas.attention import pallas_tpu_backward

    monkeypatch.setattr(pallas_tpu_backward, "RESIDENT_BYTES", 8 * 128 * keys)
    arrays, d_out, options = inputs(case, "float32")
    got = run(arrays, d_out, **options, **implementation_options("pallas_tpu"))
    expected, _ = value_and_gradients("reference", case, "float32")
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def visited(shape, ids, batch, q_block, kv_block):
    found = masks.visits(shape, ids, batch, 1, q_block, kv_block)
    real = slice(masks.LEAD, masks.LEAD + int(found.count))
    entries = np.stack([np.asarray(x)[real] for x in (found.batch, found.q_block, found.kv_block)])
    partial = np.asarray(found.flags)[real] & masks.PARTIAL != 0
    return entries.T.tolist(), partial.tolist()


def test_blocks_in_which_nothing_is_seen_are_not_visited():
    causal, partial = visited(masks.Shape(True, None, 512, 512), masks.Ids(), 1, 128, 128)
    assert causal == [[0, i, j] for i in range(4) for j in range(i + 1)]
    assert partial == [i == j for _, i, j in causal]

    window, partial = visited(masks.Shape(True, 128, 512, 512), masks.Ids(), 1, 128, 128)
    assert window == [[0, i, j] for i in range(4) for j in range(max(0, i - 1), i + 1)]
    assert all(partial)

    # Two documents of two blocks in one sequence; in the other one, a block of padding.
    ids = np.repeat([[1, 1, 2, 2], [1, 1, 1, 0]], 128, axis=1).astype(np.int32)
    segments = masks.Ids((jax.numpy.asarray(ids), jax.numpy.asarray(ids)))
    found, partial = visited(masks.Shape(True, None, 512, 512), segments, 2, 128, 128)
    assert found == [
        *([0, i, j] for i, j in [(0, 0), (1, 0), (1, 1), (2, 2), (3, 2), (3, 3)]),
        *([1, i, j] for i, j in [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 0)]),
    ]
    # Only the diagonal hides pairs, and the visit that writes the padding's zeros.
    assert partial == [i == j or (b, i) == (1, 3) for b, i, j in found]

    mask = np.zeros((1, 256, 384), bool)
    mask[0, 130:, 128:256] = True
    mask[0, :, 300] = True
    found, partial = visited(
        masks.Shape(False, None, 256, 384), masks.Ids(mask=jax.numpy.asarray(mask)), 1, 128, 128
    )
    assert found == [[0, 0, 2], [0, 1, 1], [0, 1, 2]] and all(partial)


PRODUCTION = dict(batch=4, length=4096, heads=16, head_dim=128)
COMPILED = {
    "production": dict(PRODUCTION, segments=True),
    "no segments": PRODUCTION,
    "grouped heads": dict(PRODUCTION, kv_heads=4, segments=True),
    "float32": dict(PRODUCTION, dtype="float32"),
    "width 64": dict(PRODUCTION, head_dim=64),
    "width 80": dict(PRODUCTION, head_dim=80, segments=True),
    "width 96": dict(PRODUCTION, head_dim=96, subsegments=True),
    "width 256": dict(PRODUCTION, head_dim=256, segments=True),
    "window, not causal": dict(PRODUCTION, window=1000, causal=False),
    "any mask": dict(PRODUCTION, causal=False, mask=True),
    "odd lengths": dict(PRODUCTION, length=1000, kv_length=3000, causal=False),
    # Past 8,192 keys the backward pass takes them in parts.
    "long": dict(batch=1, length=20480, heads=16, head_dim=128, segments=True),
    "one query": dict(PRODUCTION, length=1, kv_length=4096, causal=False),
}


@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "case"),
    [
        (chip, case)
        if (chip, case) == ("v6e", "production")
        else pytest.param(chip, case, marks=pytest.mark.slow)
        for chip in schedule.TOPOLOGIES
        for case in COMPILED
    ],
)
@pytest.mark.parametrize("backward", [False, True])
def test_compiles_for(chip, case, backward):
    program = schedule.compile_for(
        "kernels_pallas.attention.benchmark:ours",
        chip,
        dump=False,
        backward=backward,
        q_block=512 if backward else 1024,
        **COMPILED[case],
    )
    if case == "production":
        # Copies in the kernel's layout; nothing of the size of the scores. What v5e and v6e keep of
        # them in vector memory the others, which have half of it, do not.
        arrays = 4 * 4096 * 16 * 128 * 2
        assert program.temp_bytes < (9.5 if backward else 5) * arrays


@needs_libtpu
@pytest.mark.slow
def test_schedules_on_v6e_have_no_spills_and_beat_splash():
    from kernels_pallas.attention import benchmark

    rows = [row for row in benchmark.schedules("v6e") if "512 x 512" in row.case]
    assert len(rows) == 4
    for row in rows:
        assert row.ratio < (0.8 if "backward" in row.case else 0.7)
        assert row.note.startswith("0 spills")
