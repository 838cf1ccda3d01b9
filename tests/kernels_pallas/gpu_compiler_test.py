"""Reading of what the GPU compiler prints: of a small text written by hand, and of kernels compiled
here where it is installed.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import gpu_compiler
from kernels_pallas.schedule import CompilationError

# The first kernel as ptxas alone describes it, the second as it does before libnvJitLink links.
OUTPUT = """ptxas info    : (C9999) Of something else.
.target sm_90a
.visible .entry first_mosaic_gpu_kernel(
	.param .align 64 .b8 first_mosaic_gpu_kernel_param_0[384]
) {
	ld.param::entry.b64 	%rd1, [first_mosaic_gpu_kernel_param_0];
	wgmma.fence.sync.aligned;
	{ setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r1}, %rd1; }
	{ setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r1}, %rd1; }
	wgmma.commit_group.sync.aligned;
}

ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for first_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 90 registers, used 2 barriers, 1 bytes smem
ptxas info    : Compile time = 28.868 ms

define void @first_mosaic_gpu(ptr %0, ptr %1) {
  call void @mosaic_gpu_build_kernel_spec(ptr %0, i32 132, i32 1, i32 1, i32 0, i32 0, i32 0, \
i32 128, i32 1, i32 1, i32 40968, i32 0, i32 1, ptr %342, ptr %344)
}

.visible .entry second_mosaic_gpu_kernel(
	.param .align 64 .b8 second_mosaic_gpu_kernel_param_0[384]
) {
	{ setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r1}, %rd1; }
}

ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized \
due to insufficient register resources for the wgmma pipeline in the function \
'second_mosaic_gpu_kernel'
ptxas warning : Registers are spilled to local memory in function 'second_mosaic_gpu_kernel', \
28 bytes spill stores, 36 bytes spill loads
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'second_mosaic_gpu_kernel' for 'sm_90a'
ptxas         .     32 bytes stack frame, 28 bytes spill stores, 36 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 17 bytes smem
info    : used 168 registers, used 16 barriers, 32 stack, 1025 bytes smem, 960 bytes cmem[0]
\0
  call void @mosaic_gpu_build_kernel_spec(ptr %0, i32 132, i32 1, i32 1, i32 0, i32 0, i32 0, \
i32 384, i32 1, i32 1, i32 229448, i32 0, i32 3, ptr %355, ptr %361)
"""


def test_kernels_of_an_output():
    first, second = gpu_compiler.parse(OUTPUT)
    assert first == gpu_compiler.GpuKernel(
        name="first",
        registers=90,
        spill_bytes=0,
        stack_bytes=0,
        shared_bytes=40968,
        wgmma=2,
        serialized=False,
        notes=(),
    )
    assert second.name == "second" and second.registers == 168 and second.wgmma == 1
    assert second.spill_bytes == 28 + 36 and second.stack_bytes == 32
    assert second.shared_bytes == 229448
    assert second.serialized
    assert [note[:7] for note in second.notes] == ["(C7511)", "Registe"]


def test_a_program_without_kernels_has_none():
    assert gpu_compiler.parse("{}\n") == []


def test_a_kernel_without_its_registers_is_an_error():
    with pytest.raises(ValueError, match=r"second: not one line .* but 0, 1, 1"):
        gpu_compiler.parse(OUTPUT.replace("Used 168 registers", ""))


def test_kernels_are_found_by_name():
    program = gpu_compiler.GpuProgram(tuple(gpu_compiler.parse(OUTPUT)), 0, 0, 0)
    assert program.kernel("sec").registers == 168
    with pytest.raises(LookupError, match="0 kernels named like 'third'"):
        program.kernel("third")


def test_the_compiler_is_that_of_the_pinned_jax(repository):
    (pinned,) = re.findall(
        r"^jax==(.*)$", (repository / "constraints.txt").read_text(), re.MULTILINE
    )
    wanted = (repository / "gpu-compiler-requirements.txt").read_text()
    assert set(re.findall(r"==(\S+)", wanted)) == {pinned}


def test_without_the_compiler_there_is_a_word_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("OLMAX_GPU_COMPILER", str(tmp_path))
    assert not gpu_compiler.available()
    with pytest.raises(CompilationError, match="make gpu-compiler"):
        gpu_compiler.compile_for(f"{__name__}:products")
    with pytest.raises(ValueError, match="no target 'h900', only h100"):
        gpu_compiler.compile_for(f"{__name__}:products", "h900")


def product(name: str, rows: int, depth: int):
    """(rows, depth) times (depth, 128), bfloat16, in one block: a copy in, wgmma, a copy out."""
    bf16 = jnp.bfloat16

    def swizzled(*shape: int):
        transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM(shape, bf16, transforms=transforms)

    def kernel(a_ref, b_ref, out_ref, a_smem, b_smem, out_smem, barrier):
        plgpu.copy_gmem_to_smem(a_ref, a_smem, barrier)
        plgpu.copy_gmem_to_smem(b_ref, b_smem, barrier)
        plgpu.barrier_wait(barrier)

        def multiply(acc_ref):
            plgpu.wgmma(acc_ref, a_smem, b_smem)
            return acc_ref[...]

        acc = pl.run_scoped(multiply, plgpu.ACC((rows, 128), jnp.float32))
        out_smem[...] = acc.astype(bf16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_ref)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((rows, 128), bf16),
        scratch_types=[
            swizzled(rows, depth),
            swizzled(depth, 128),
            swizzled(rows, 128),
            plgpu.Barrier(num_arrivals=2),
        ],
        kernel_name=name,
    )


def products(depth: int = 64):
    def run(a, b):
        sizes = {"low": 64, "high": 128, "full": 256}
        return [product(name, rows, depth)(a[:rows], b) for name, rows in sizes.items()]

    bf16 = jnp.bfloat16
    return run, (
        jax.ShapeDtypeStruct((256, depth), bf16),
        jax.ShapeDtypeStruct((depth, 128), bf16),
    )


needs_compiler = pytest.mark.skipif(
    not gpu_compiler.available(), reason="the GPU compiler is not installed (make gpu-compiler)"
)


@needs_compiler
def test_compiles_for_a_gpu_that_is_not_here():
    program = gpu_compiler.compile_for(f"{__name__}:products", depth=128)
    assert len(program.kernels) == 3
    low, high, full = (program.kernel(name) for name in ("low", "high", "full"))
    for kernel, rows in ((low, 64), (high, 128), (full, 256)):
        # An instruction takes 64 rows and 16 of the depth; its accumulators are in 128 threads.
        assert kernel.wgmma == rows // 64 * 128 // 16
        assert kernel.registers > min(rows * 128 // 128, 254)
        tiles = 2 * (rows * 128 + 128 * 128 + rows * 128)
        assert tiles < kernel.shared_bytes <= tiles + 1024
    for kernel in (low, high):
        assert kernel.spill_bytes == kernel.stack_bytes == 0 and not kernel.serialized
    # 256 accumulators do not fit into the 255 registers that a thread may have.
    assert full.registers == 255 and full.serialized and "serialized" in full.notes[0]
    assert program.argument_bytes == (256 + 128) * 128 * 2
    assert program.output_bytes >= (64 + 128 + 256) * 128 * 2


@needs_compiler
def test_what_does_not_compile_says_why():
    with pytest.raises(CompilationError, match="exceeds available shared memory"):
        gpu_compiler.compile_for(f"{__name__}:products", depth=1024)


@needs_compiler
def test_a_function_that_is_not_there_says_so():
    with pytest.raises(CompilationError, match="has no attribute 'quotients'"):
        gpu_compiler.compile_for(f"{__name__}:quotients")
