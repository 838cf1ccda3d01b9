"""Static instruction schedules of Pallas TPU kernels, without a TPU.

libtpu compiles for a chip that is not there and writes down what it made: the kernel's VLIW bundles
and the slots each of them uses. `compile_for` runs that compiler in a process of its own (its flags
are read once, at start), reads the listing and returns a `Program`.

How to read the numbers. A bundle is what a core issues in one cycle. The listing has each bundle
once, however often it runs, and knows nothing of waits for memory, so it bounds a time from below.
What runs once per tile is a *block*: a stretch of the listing that a branch may skip (the body of
`pl.when`), or the body of an inner loop. `Kernel.blocks` are the innermost of these that hold
matrix products, largest first; `Kernel.overhead` counts what a grid step runs besides (index
arithmetic and starting the copies), which is everything inside the grid's loop that no branch
skips. What is done at the first or last step of a row only (clearing and writing accumulators) is
in neither, just in `Kernel.bundles`.

    python -m kernels_pallas.schedule kernels_pallas.attention.benchmark:forward v6e:2x2
"""

import argparse
import dataclasses
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
"""A small topology of every generation the kernels are compiled for."""

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""What libtpu must find in the environment to compile where there is no TPU."""


class CompilationError(RuntimeError):
    """The compiler refused a program; the message is the end of what it said."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A stretch of bundles that runs as a whole: [start, stop) of the listing."""

    start: int
    stop: int
    matmuls: int
    spills: int
    """Vector registers stored to or filled from memory for want of registers."""
    slots: dict[str, int]
    """Slots used of each unit; `Kernel.capacity` says how many a bundle has."""

    @property
    def bundles(self) -> int:
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The listing of one Pallas kernel."""

    name: str
    bundles: int
    overhead: int
    spills: int
    blocks: tuple[Block, ...]
    capacity: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler made of a function."""

    kernels: tuple[Kernel, ...]
    temp_bytes: int
    argument_bytes: int
    output_bytes: int

    def kernel(self, part: str) -> Kernel:
        """The one kernel whose name contains `part`."""
        return one_named(self.kernels, part)


def one_named(kernels: Sequence[Any], part: str) -> Any:
    """The one of the kernels whose name contains `part`.

    Raises:
      LookupError: none does, or several.
    """
    found = [kernel for kernel in kernels if part in kernel.name]
    if len(found) != 1:
        names = [kernel.name for kernel in kernels]
        raise LookupError(f"{len(found)} kernels named like {part!r} among {names}")
    return found[0]


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes of a device that a compiled program takes, by the names of a `Program`'s fields."""
    memory = compiled.memory_analysis()
    assert memory is not None
    return dict(
        temp_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
    )


def libtpu_version() -> str | None:
    """Version of libtpu, or None where it is not installed."""
    import importlib.metadata

    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return None


def compile_for(target: str, chip: str, *, dump: bool = True, **options) -> Program:
    """Compiles what `target` builds for one device of a chip generation.

    Args:
      target: `module:function`. The function gets `options` (JSON values) and returns a function of
        arrays and a tuple of `jax.ShapeDtypeStruct`, its arguments.
      chip: a key of `TOPOLOGIES`, or a topology name such as `v5p:2x2x1`.
      dump: read the schedules; without it the kernels are left out and compiling is quicker.

    Raises:
      CompilationError: the function does not compile, for want of VMEM among other reasons.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **ENVIRONMENT, "LIBTPU_INIT_ARGS": ""}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        if dump:
            environment["LIBTPU_INIT_ARGS"] = (
                f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
            )
        request = dict(target=target, topology=TOPOLOGIES.get(chip, chip), options=options)
        run = subprocess.run(
            [sys.executable, "-m", "kernels_pallas.schedule", "--request", json.dumps(request)],
            env=environment,
            capture_output=True,
            text=True,
        )
        if run.returncode:
            raise CompilationError(f"{target} for {chip} with {options}:\n{run.stderr[-3000:]}")
        memory = json.loads(run.stdout.splitlines()[-1])
        return Program(kernels=tuple(read_dump(pathlib.Path(folder))), **memory)


def read_dump(folder: pathlib.Path) -> list[Kernel]:
    """The Pallas kernels listed in a folder of compiler dumps, in the order of compilation."""
    kernels = []
    for listing in sorted(folder.glob("*-final_bundles.txt")):
        if "schedule-analysis" in listing.name:
            continue
        text = listing.read_text(errors="replace")
        exit_bundle = re.search(r"/\* exit bundle: %\S+ = .*", text)
        if "-TLP-" in listing.name or not exit_bundle or " custom-call(" not in exit_bundle[0]:
            continue
        identity = listing.name.rsplit("-", 2)[0]
        (utilization,) = folder.glob(
            f"{_escaped(identity)}-*-final_hlo-static-per-bundle-utilization.txt"
        )
        name = identity.split("-", 1)[1]
        kernels.append(parse(name, text, utilization.read_text()))
    return kernels


_BUNDLE = re.compile(r"^ *(?:0x([0-9a-f]+)|(0)) +(?:[A-Z]{2})?: *((?:> ?)*)\{", re.MULTILINE)
_BRANCH = re.compile(r"sbr\.rel (?:\((!?%\w+)\) )?target = \$region(\d+)")
_REGION_START = re.compile(r"(?:Start|Start/End empty) region (\d+)(?= |\*)")
_DELAY_SLOTS = 4


def parse(name: str, listing: str, utilization: str) -> Kernel:
    """Reads the texts of a `final_bundles` and a `per-bundle-utilization` file."""
    heads = list(_BUNDLE.finditer(listing))
    texts = [
        listing[a.end() : b.start() if b else None]
        for a, b in zip(heads, [*heads[1:], None], strict=True)
    ]
    depths = [head[3].count(">") for head in heads]
    _, units, counts, _, *rows = utilization.splitlines()
    units = [unit.strip() for unit in units.split(",")]
    use = [[int(value) for value in row.split()] for row in rows if row]
    if len(use) != len(texts):
        raise ValueError(f"{name}: {len(texts)} bundles listed but slots of {len(use)}")

    region_starts: dict[int, int] = {}
    for index, text in enumerate(texts):
        for region in _REGION_START.findall(text):
            region_starts.setdefault(int(region), index)
    skippable, loops = [], []
    for index, text in enumerate(texts):
        for _, region in _BRANCH.findall(text):
            target = region_starts.get(int(region))
            if target is None:
                continue
            if target > index:
                skippable.append((index + 1 + _DELAY_SLOTS, target))
            else:
                loops.append((target, index + 1 + _DELAY_SLOTS))

    def block(start: int, stop: int) -> Block:
        slots = {unit: sum(use[i][u] for i in range(start, stop)) for u, unit in enumerate(units)}
        matmuls = sum(text.count("= vmatmul") for text in texts[start:stop])
        return Block(start, stop, matmuls, _spills(slots), slots)

    inner_loops = [(a, b) for a, b in loops if depths[min(a + 1, len(depths) - 1)] > 1]
    candidates = [block(a, b) for a, b in {*skippable, *inner_loops} if b > a]
    busy = [one for one in candidates if one.slots[units[0]]]
    innermost = [
        one
        for one in busy
        if not any(
            other is not one and one.start <= other.start and other.stop <= one.stop
            for other in busy
        )
    ]
    in_loop = {index for index, depth in enumerate(depths) if depth}
    conditional = {index for a, b in {*skippable, *inner_loops} for index in range(a, b)}
    if not innermost and in_loop:
        innermost = [block(min(in_loop), max(in_loop) + 1)]
        conditional |= in_loop
    elif not innermost:
        innermost = [block(0, len(texts))]
    return Kernel(
        name=name,
        bundles=len(texts),
        overhead=len(in_loop - conditional),
        spills=_spills(block(0, len(texts)).slots),
        blocks=tuple(sorted(innermost, key=lambda one: -one.bundles)),
        capacity=dict(zip(units, map(int, counts.split()), strict=True)),
    )


def _spills(slots: dict[str, int]) -> int:
    return sum(count for unit, count in slots.items() if unit.endswith((":FILL", ":SPILL")))


def _escaped(name: str) -> str:
    return re.sub(r"([\[\]*?])", r"[\1]", name)


def _build(target: str, options: dict):
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)(**options)


def _answer(request: dict) -> dict:
    """Compiles in this process; its environment was set by `compile_for`."""
    import jax
    from jax.experimental import topologies

    from kernels_pallas import targets

    topology = topologies.get_topology_desc(request["topology"], platform="tpu")
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    function, arguments = _build(request["target"], request["options"])
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    with targets.compiling_for("tpu"):
        traced = jax.jit(function).trace(*arguments)
    return memory_of(traced.lower(lowering_platforms=("tpu",)).compile())


def main() -> None:
    parser = argparse.ArgumentParser(description="Static schedules of TPU kernels.")
    parser.add_argument("target", nargs="?", help="module:function that builds the program")
    parser.add_argument("chip", nargs="?", default="v6e", help=f"{', '.join(TOPOLOGIES)}")
    parser.add_argument("--options", default="{}", help="JSON keyword arguments of the function")
    parser.add_argument("--request", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.request:
        print(json.dumps(_answer(json.loads(arguments.request))))
        return
    program = compile_for(arguments.target, arguments.chip, **json.loads(arguments.options))
    print(f"temporaries {program.temp_bytes / 2**20:.1f} MiB")
    for kernel in program.kernels:
        print(
            f"{kernel.name}: {kernel.bundles} bundles, {kernel.overhead} of overhead per step, "
            f"{kernel.spills} spills"
        )
        for block in kernel.blocks:
            use = ", ".join(
                f"{unit} {count / kernel.capacity[unit] / block.bundles:.0%}"
                for unit, count in block.slots.items()
            )
            print(
                f"  block {block.start:#x}: {block.bundles} bundles, {block.matmuls} matmuls, "
                f"{block.spills} spills; {use}"
            )


if __name__ == "__main__":
    main()
