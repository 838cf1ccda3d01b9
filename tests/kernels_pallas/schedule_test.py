"""Reading of the compiler's listings: of a small one written by hand, and of a kernel compiled
here where libtpu is installed.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from kernels_pallas import schedule

# A grid loop (0x2 to 0xf) with one part that pl.when may skip (0x8 to 0xb) and 4 delay slots after
# every branch.
LISTING = """= control target key start
LB: loop body
= control target key end

     0   :  { %s0 = inlined_call_operand.vmem [shape: f32[8], index: 0] }
   0x1   :  { %s1 = smov.u32 0 } /* Start region 1 */
   0x2 LB: > { %s2 = sadd.s32 1, %s1 } /* Start region 2 */
   0x3   : > { %5 = sbr.rel (%p1) target = $region4 }
   0x4   :  {}
   0x5   :  {}
   0x6   :  {}
   0x7   :  {}
   0x8   : > { %v1 = vmatmul.mubr.bf16.gmra.mxu0 %v0  ;;  %v2 = vld [vmem:[%s9]] }
   0x9   : > { %v3 = vmatmul.mubr.bf16.gmra.mxu1 %v0 }
   0xa   : > { %6 = vst [vmem:[%s9]] %v3 } /* End region 3 */
   0xb PF: > { %s3 = sadd.s32 1, %s1 } /* Start/End empty region 4 */
   0xc   :  { %7 = sbr.rel (!%p2) target = $region2 }
   0xd   :  {}
   0xe   :  {}
   0xf   :  {}
  0x10   : > { %s4 = smov.u32 %s3 } /* End region 2 */
  0x11   :  { %8 = vsyncpa [#allocation9], 1 } /* "tpu_custom_call" */
"""
UTILIZATION = "\n".join(
    ["== CAPACTIY:", "MATMUL, VALU, VLOAD:FILL", "    2     4     3", "== UTILIZATION:"]
    + ["0 0 0"] * 8
    + ["1 0 1", "1 0 0", "0 2 0"]
    + ["0 0 0"] * 7
    + [""]
)


def test_blocks_overhead_and_spills_of_a_listing():
    kernel = schedule.parse("example", LISTING, UTILIZATION)
    assert kernel.bundles == 18
    assert kernel.capacity == {"MATMUL": 2, "VALU": 4, "VLOAD:FILL": 3}
    (block,) = kernel.blocks
    assert (block.start, block.stop, block.bundles) == (8, 11, 3)
    assert block.matmuls == 2 and block.spills == 1 and block.slots["VALU"] == 2
    assert kernel.overhead == 4  # 0x2, 0x3, 0xb, 0x10: the loop's own, with no branch around them


def test_a_listing_without_its_slots_is_an_error():
    with pytest.raises(ValueError, match="18 bundles listed but slots of 17"):
        schedule.parse("example", LISTING, UTILIZATION.removesuffix("0 0 0\n"))


def product(size: int):
    def kernel(a_ref, b_ref, out_ref):
        out_ref[...] = jnp.dot(a_ref[...], b_ref[...], preferred_element_type=jnp.float32)

    spec = pl.BlockSpec((128, size), lambda i: (i, 0))

    def run(a, b):
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((512, size), jnp.float32),
            grid=(4,),
            in_specs=[spec, pl.BlockSpec((size, size), lambda i: (0, 0))],
            out_specs=spec,
            name="product",
        )(a, b)

    bf16 = jnp.bfloat16
    return run, (
        jax.ShapeDtypeStruct((512, size), bf16),
        jax.ShapeDtypeStruct((size, size), bf16),
    )


@pytest.mark.skipif(schedule.libtpu_version() is None, reason="libtpu is not installed")
def test_compiles_for_a_chip_that_is_not_here():
    program = schedule.compile_for(f"{__name__}:product", "v5e", size=256)
    kernel = program.kernel("product")
    assert kernel.bundles > 64 and kernel.spills == 0
    # 128 rows, 16 to a bfloat16 register, against 4 pieces of 128 x 128.
    assert kernel.blocks[0].matmuls == 128 // 16 * 4 * 2 // 2
    assert program.argument_bytes == (512 + 256) * 256 * 2


@pytest.mark.skipif(schedule.libtpu_version() is None, reason="libtpu is not installed")
def test_what_does_not_compile_says_why():
    with pytest.raises(schedule.CompilationError, match=r"(?i)vmem"):
        schedule.compile_for(f"{__name__}:product", "v5e", dump=False, size=4096)
