"""What the GPU compiler makes of Pallas Mosaic kernels, without a GPU.

XLA's CUDA plugin compiles for a GPU that is not there, and its ptxas says what it made of a kernel:
registers, spills, warnings. `compile_for` runs that compiler in a process of its own, since the
plugin is no part of this environment (`make gpu-compiler` puts it in `.gpu-compiler`; in the
environment itself it would complain at every start where no GPU is), reads what it prints and
returns a `GpuProgram`. `kernels_pallas.schedule` is the same for TPUs.

How to read the numbers. Registers are per thread as at launch: 65,536 of them are shared by the
threads of a block, and `setmaxnreg` moves some between warpgroups later. A product that ptxas
serialized waits for the one before it and loses most of the tensor cores' speed. Nothing here says
how long a kernel takes.

Where libnvJitLink is beside the plugin, as in an installation for a real GPU, XLA links through it,
and ptxas then ignores `setmaxnreg` (note C7504) and may spill for it. `make gpu-compiler` leaves it
out. OLMAX_GPU_COMPILER names another folder with the plugin, to see the difference.

    python -m kernels_pallas.gpu_compiler tests.kernels_pallas.gpu_compiler_test:products
"""

import argparse
import dataclasses
import importlib
import importlib.util
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

from kernels_pallas.schedule import CompilationError, memory_of, one_named

TARGETS = {
    "h100": """
        gpu_device_info {
          threads_per_block_limit: 1024
          threads_per_warp: 32
          shared_memory_per_block: 49152
          shared_memory_per_core: 233472
          threads_per_core_limit: 2048
          core_count: 132
          fpus_per_core: 128
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          memory_bandwidth: 3352320000000
          l2_cache_size: 52428800
          clock_rate_ghz: 1.98
          device_memory_size: 84942979072
          shared_memory_per_block_optin: 232448
          cuda_compute_capability { major: 9 }
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
        }
        platform_name: "CUDA"
        dnn_version_info { major: 9 minor: 10 }
        runtime_version { major: 13 minor: 0 patch: 0 }
        device_description_str: "NVIDIA H100 80GB HBM3"
    """,
}
"""GPUs the kernels are compiled for, as XLA's `GpuTargetConfigProto` in text.

The H100 is the SXM one of XLA's xla/backends/gpu/target_config/specs/h100_sxm.txtpb. Sizes are
bytes, the bandwidth is bytes per second.
"""

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "-1",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "MOSAIC_GPU_DUMP_PTX": "1",
    "MOSAIC_GPU_DUMP_PTXAS": "1",
    "MOSAIC_GPU_DUMP_HOST_LLVM": "1",
}
"""Compiles where there is no GPU and prints what `parse` reads, one kernel after the other.

MOSAIC_GPU_DUMP_TO would write the same to files, but with tens of megabytes besides and a folder in
/tmp for each kernel that nobody removes.
"""

PLUGIN = "jax_cuda13_plugin"


@dataclasses.dataclass(frozen=True)
class GpuKernel:
    """One Mosaic kernel as ptxas made it."""

    name: str
    registers: int
    """Of a thread, at launch."""
    spill_bytes: int
    """Stored to and loaded from local memory for want of registers, per thread: each instruction
    once, however often it runs."""
    stack_bytes: int
    """Of a thread."""
    shared_bytes: int
    """Shared memory that a block asks for at launch, its barriers included."""
    wgmma: int
    """wgmma.mma_async instructions, each once however often it runs."""
    serialized: bool
    """ptxas made the wgmma instructions wait for each other."""
    notes: tuple[str, ...]
    """Warnings of ptxas."""


@dataclasses.dataclass(frozen=True)
class GpuProgram:
    """What the compiler made of a function."""

    kernels: tuple[GpuKernel, ...]
    """In the order of compilation; calls with the same code and shapes are one kernel."""
    temp_bytes: int
    argument_bytes: int
    output_bytes: int

    def kernel(self, part: str) -> GpuKernel:
        """The one kernel whose name contains `part`."""
        return one_named(self.kernels, part)


def folder() -> pathlib.Path:
    """The folder beside the environment that the compiler is looked for in."""
    default = pathlib.Path(__file__).resolve().parents[1] / ".gpu-compiler"
    return pathlib.Path(os.environ.get("OLMAX_GPU_COMPILER") or default)


def available() -> bool:
    """Whether the compiler is installed: in OLMAX_GPU_COMPILER where that is set, else by
    `make gpu-compiler` or in the present environment.
    """
    if os.environ.get("OLMAX_GPU_COMPILER"):
        return (folder() / PLUGIN).is_dir()
    # `make` writes .installed last, so half an installation is none.
    return (folder() / ".installed").exists() or importlib.util.find_spec(PLUGIN) is not None


def compile_for(target: str, gpu: str = "h100", /, **options) -> GpuProgram:
    """Compiles what `target` builds for one GPU, or for several by the shardings of its arguments.

    Args:
      target: `module:function`. The function gets `options` (JSON values) and returns a function of
        arrays, jitted or not, and a tuple of trees of `jax.ShapeDtypeStruct`, its arguments. Those
        without a sharding are on one GPU; `devices` has more of them.
      gpu: a key of `TARGETS`.

    Raises:
      ValueError: there is no such GPU in `TARGETS`.
      CompilationError: the function does not compile, for want of shared memory among other
        reasons, or the compiler is not installed.
    """
    if gpu not in TARGETS:
        raise ValueError(f"gpu_compiler: no target {gpu!r}, only {', '.join(TARGETS)}")
    if not available():
        raise CompilationError(f"no GPU compiler in {folder()}; `make gpu-compiler` installs it")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MOSAIC_GPU_DUMP_")}
    environment = {**kept, **ENVIRONMENT}
    environment["PYTHONPATH"] = os.pathsep.join([*sys.path, str(folder())])
    request = dict(target=target, gpu=gpu, options=options)
    run = subprocess.run(
        [sys.executable, "-m", "kernels_pallas.gpu_compiler", "--request", json.dumps(request)],
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if run.returncode:
        raise CompilationError(f"{target} for {gpu} with {options}:\n{run.stderr[-3000:]}")
    # Not the last line: C++ and Python flush what they print in an order of their own.
    memory = re.search(r'^\{"temp_bytes": .*\}$', run.stdout, re.MULTILINE)
    assert memory is not None
    return GpuProgram(kernels=tuple(parse(run.stdout)), **json.loads(memory[0]))


_ENTRY = re.compile(r"^\.visible \.entry (\w+)\(", re.MULTILINE)
_REGISTERS = re.compile(r"^ptxas info +: Used (\d+) registers", re.MULTILINE)
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
# Of the function's address, sizes of grid, cluster and block, the bytes of shared memory, and more.
_LAUNCH = re.compile(
    r"call void @mosaic_gpu_build_kernel_spec\(ptr %\w+,(?: i32 \d+,){9} i32 (\d+),"
)
_NOTE = re.compile(r"^ptxas (?:info +: (?=\(C\d+\))|warning +: )(.*)$", re.MULTILINE)


def parse(output: str) -> list[GpuKernel]:
    """Reads the PTX, the words of ptxas and the host's LLVM code of every kernel, in that order.

    Raises:
      ValueError: something of a kernel is missing or there twice.
    """
    # Before the first kernel, and then by turns a kernel's entry and what follows.
    _, *pieces = _ENTRY.split(output)
    kernels = []
    for entry, text in itertools.batched(pieces, 2):
        name = entry.removesuffix("_mosaic_gpu_kernel")
        found = [[*pattern.finditer(text)] for pattern in (_REGISTERS, _FRAME, _LAUNCH)]
        if any(len(matches) != 1 for matches in found):
            counts = ", ".join(str(len(matches)) for matches in found)
            raise ValueError(f"{name}: not one line of registers, stack and launch but {counts}")
        (registers,), (frame,), (launch,) = found
        notes = tuple(note[1].strip() for note in _NOTE.finditer(text))
        kernels.append(
            GpuKernel(
                name=name,
                registers=int(registers[1]),
                spill_bytes=int(frame[2]) + int(frame[3]),
                stack_bytes=int(frame[1]),
                shared_bytes=int(launch[1]),
                wgmma=text.count("wgmma.mma_async."),
                serialized=any("wgmma" in note and "serialized" in note for note in notes),
                notes=notes,
            )
        )
    return kernels


def cells(program: GpuProgram) -> Iterator[dict]:
    """Of a program's kernels for the table of `kernels_pallas.benchmark`, alike ones once."""
    lines = [
        (
            kernel.name,
            kernel.registers,
            f"{kernel.spill_bytes} bytes of spills, {kernel.shared_bytes / 1024:.0f} KiB of shared "
            f"memory, wgmma {'serialized' if kernel.serialized else 'in flight'}",
        )
        for kernel in program.kernels
    ]
    for name, registers, note in dict.fromkeys(lines):
        yield dict(metric=f"registers, `{name}`", value=registers, note=note)


def devices(gpu: str, count: int) -> list:
    """GPUs of one host to compile for: jax devices on which nothing runs. Only in the process that
    compiles, for what builds a program there.
    """
    from jax.experimental import topologies

    found = topologies.get_topology_desc(
        platform="cuda", target_config=TARGETS[gpu], topology=f"1x1x{count}"
    )
    return found.devices


def _answer(request: dict) -> dict:
    """Compiles in this process; its environment was set by `compile_for`."""
    import jax

    from kernels_pallas import targets

    one = jax.sharding.SingleDeviceSharding(devices(request["gpu"], 1)[0])
    module, name = request["target"].split(":")
    with targets.compiling_for("gpu"):
        build = getattr(importlib.import_module(module), name)
        function, arguments = build(**request["options"])
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or one), arguments
        )
        # A jitted function keeps the options it was jitted with.
        jitted = function if hasattr(function, "trace") else jax.jit(function)
        traced = jitted.trace(*arguments)
    return memory_of(traced.lower(lowering_platforms=("cuda",)).compile())


def main() -> None:
    parser = argparse.ArgumentParser(description="What ptxas makes of Mosaic GPU kernels.")
    parser.add_argument("target", nargs="?", help="module:function that builds the program")
    parser.add_argument("gpu", nargs="?", default="h100", help=f"{', '.join(TARGETS)}")
    parser.add_argument("--options", default="{}", help="JSON keyword arguments of the function")
    parser.add_argument("--request", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.request:
        print(json.dumps(_answer(json.loads(arguments.request))))
        return
    program = compile_for(arguments.target, arguments.gpu, **json.loads(arguments.options))
    print(f"temporaries {program.temp_bytes / 2**20:.1f} MiB")
    for kernel in program.kernels:
        print(
            f"{kernel.name}: {kernel.registers} registers, {kernel.spill_bytes} bytes of spills, "
            f"{kernel.stack_bytes} of stack, {kernel.shared_bytes / 1024:.1f} KiB shared, "
            f"{kernel.wgmma} wgmma{' (serialized)' if kernel.serialized else ''}"
        )
        for note in kernel.notes:
            print(f"  {note}")


if __name__ == "__main__":
    main()
