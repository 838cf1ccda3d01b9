"""Pricing operations that the compiler has not timed."""

import gzip
import pathlib
import re

import pytest

from olmax.planning import chips, cost, program, roofline
from tests.planning.fake_mesh import mesh_of

GOLDEN = pathlib.Path(__file__).parent / "golden" / "olmo2_7b_v5p_4x4x4.txt.gz"
V5P = chips.CHIPS["v5p"]

MATMUL = 2 * 512 * 128 * 256


def _instruction(lines: list[str], name: str, others: str = ""):
    body = "\n".join(f"  {line}" for line in lines)
    read = program.parse(f"{others}ENTRY %main () -> f32[] {{\n{body}\n}}\n")
    computation = read.computations["main"]
    return read, computation, computation.by_name[name]


@pytest.mark.parametrize(
    "result, left, kernel, window, labels, expected",
    [
        ("512,128", "512,256", "256,128", "", "bf_io->bf", MATMUL),
        ("128,512", "256,512", "256,128", "", "fb_io->fb", MATMUL),
        # A dimension that is added up, as 16 heads of the attention's output.
        ("512,128,1", "16,512,256", "16,256,128", "window={size=16}", "0bf_0io->bf0", 16 * MATMUL),
        # A dimension of the kernel that stays, written as a window that slides over padding.
        (
            "512,16,128",
            "512,1,256",
            "16,256,128",
            "window={size=16 pad=15_15 rhs_reversal=1}",
            "b0f_0io->b0f",
            16 * MATMUL,
        ),
        # A batch of products: every window meets one input among the holes between them.
        (
            "512,16,128",
            "512,16,256",
            "16,256,128",
            "window={size=16 stride=15 lhs_dilate=16}",
            "b0f_0io->b0f",
            16 * MATMUL,
        ),
    ],
)
def test_flops_of_products_however_the_compiler_writes_them(
    result, left, kernel, window, labels, expected
):
    _, computation, instruction = _instruction(
        [
            f"%x = bf16[{left}]{{1,0}} parameter(0)",
            f"%w = bf16[{kernel}]{{1,0}} parameter(1)",
            f"ROOT %p = bf16[{result}]{{1,0}} convolution(%x, %w), "
            + (f"{window}, " if window else "")
            + f"dim_labels={labels}",
        ],
        "p",
    )
    assert roofline.product_flops(computation, instruction) == expected


SLICED = """%inside (weights: f32[32,64,64], old: f32[32,64,64], i: s32[]) -> f32[32,64,64] {
  %weights = f32[32,64,64]{2,1,0} parameter(0)
  %old = f32[32,64,64]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %view = f32[32,64,64]{2,1,0} bitcast(%weights)
  %one = f32[1,64,64]{2,1,0} dynamic-slice(%view, %i, %zero, %zero), dynamic_slice_sizes={1,64,64}
  ROOT %new = f32[32,64,64]{2,1,0} dynamic-update-slice(%old, %one, %i, %zero, %zero)
}

"""


def test_a_layer_of_stacked_arrays_counts_as_the_layer():
    read, computation, fusion = _instruction(
        [
            "%w = f32[32,64,64]{2,1,0:T(8,128)} parameter(0)",
            "%o = f32[32,64,64]{2,1,0:T(8,128)} parameter(1)",
            "%n = s32[]{:T(128)} parameter(2)",
            "ROOT %f = f32[32,64,64]{2,1,0:T(8,128)} fusion(%w, %o, %n), kind=kLoop, calls=%inside",
        ],
        "f",
        SLICED,
    )
    layer = 64 * 64 * 4
    found = roofline.work(read, computation, fusion)
    assert found.flops == 0 and found.local_bytes == 0
    # Read once, written once; the rest is a few scalars.
    assert found.hbm_bytes == pytest.approx(2 * layer, abs=16)


def test_arrays_on_the_chip_are_told_apart():
    read, computation, instruction = _instruction(
        [
            "%x = f32[1024]{0:T(1024)S(1)} parameter(0)",
            "ROOT %c = f32[1024]{0:T(1024)} copy(%x)",
        ],
        "c",
    )
    assert roofline.work(read, computation, instruction) == roofline.Work(0, 4096, 4096)


@pytest.mark.parametrize(
    ("source", "slow"),
    [
        # Gathered from pieces of 20 columns, and of 16; another order of rows alone.
        ("{0,1:T(2,128)(2,1)}", True),
        ("{0,1:T(8,128)(2,1)}", False),
        ("{1,0:T(2,128)(2,1)}", False),
    ],
)
def test_copies_out_of_tiles_of_few_rows_that_transpose_are_slow(source, slow):
    read, computation, instruction = _instruction(
        [
            f"%x = bf16[27648,5120]{source} parameter(0)",
            "ROOT %c = bf16[27648,5120]{1,0:T(8,128)(2,1)} copy(%x)",
        ],
        "c",
    )
    v6e = chips.CHIPS["v6e"]
    cycles = roofline.seconds(roofline.work(read, computation, instruction), v6e) * v6e.clock_hz
    assert (cycles > 10 * 10**6) == slow
    # The compiler says 12,873,600.
    assert not slow or cycles == pytest.approx(12_873_600, rel=0.01)


def test_an_operation_takes_the_longest_of_products_memory_and_its_least():
    rates = roofline.RATES["v5p"]
    flops = roofline.seconds(roofline.Work(10**12, 10**6, 0), V5P)
    assert flops == pytest.approx(10**12 / V5P.peak_flops / rates.products)
    moved = roofline.seconds(roofline.Work(0, 10**9, 0), V5P)
    assert moved == pytest.approx(10**9 / V5P.hbm_bandwidth / rates.memory)
    assert 0 < roofline.seconds(roofline.Work(0, 4, 0), V5P) < flops / 1000


def test_the_estimate_of_a_whole_program_is_near_the_compilers():
    # An earlier train step than those that the rates were fitted to, with less vector memory for
    # one operation: its products take longer.
    text = gzip.decompress(GOLDEN.read_bytes()).decode()
    untimed = re.sub(r'"estimated_cycles":"\d+"', '"estimated_cycles":"9223372036854775807"', text)
    mesh = mesh_of({"fsdp": 64}, (4, 4, 4))
    timed, estimated = cost.costs(text, mesh, V5P), cost.costs(untimed, mesh, V5P, estimate=True)
    total, own = (sum(c.times * c.cycles for c in items) for items in (timed, estimated))
    assert 0.84 * total < own < 1.05 * total
    assert {c.source for c in estimated} >= {"roofline", "kernel", "collective"}
    assert "compiler" not in {c.source for c in estimated}
    assert cost.exposed_seconds(estimated) == pytest.approx(cost.exposed_seconds(timed), rel=0.02)
