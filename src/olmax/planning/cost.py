"""Time of one run of a compiled program, added up over its instructions and loops.

Computation: the compiler's `estimated_cycles` of every fusion, at the chip's clock. Where it made
no estimate: bytes read and written over the HBM bandwidth, or `roofline` for a program that has
none yet. Kernels: `kernels`. Collectives: the links' time; one that the program waits for counts
whole, one that runs beside computation counts as far as the computation of the same loop body is
too short to cover it.
"""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from olmax.planning import collectives, kernels, program, roofline
from olmax.planning.chips import Chip

if TYPE_CHECKING:
    from jax.sharding import Mesh

# These move no data, or move it while something else computes.
_FREE = frozenset(
    [
        "parameter",
        "constant",
        "get-tuple-element",
        "tuple",
        "bitcast",
        "while",
        "conditional",
        "call",
        "after-all",
        "partition-id",
        "replica-id",
        "add-dependency",
        "opt-barrier",
        "send",
        "recv",
        "domain",
    ]
)

# Of operations that run beside others; the collectives among the starts are told apart before.
_ASYNCHRONOUS = ("-start", "-update", "-done")

# The compiler estimates no cycles for these, in no program.
_UNTIMED = ("reshape", "dynamic-update-slice")

# Custom calls that only tell the compiler something.
_FREE_TARGETS = frozenset(
    [
        "AllocateBuffer",
        "AssumeGatherIndicesInBound",
        "GatherScatterIndicesBitpacked",
        "Sharding",
        "AssumeScatterIndicesInBound",
        "LayoutConstraint",
        "MoveToHost",
        "MoveToDevice",
    ]
)

PARTS = (
    "embedding",
    "attention projections",
    "attention kernel",
    "MLP",
    "router",
    "experts",
    "norms and residuals",
    "layer loop",
    "head and loss",
    "optimizer",
    "other",
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """One instruction over a whole step."""

    name: str
    part: str
    phase: str
    """`forward`, `recomputed`, `backward` or `update`."""
    times: int
    """Runs in one step."""
    cycles: int
    """Of the compiler or of `roofline`, one run; 0 where the seconds come from elsewhere."""
    seconds: float
    """One run of computation or kernel; 0 for a pure collective."""
    source: str
    """`compiler`, `roofline`, `bytes`, `kernel` or `collective`."""
    collective: collectives.Collective | None = None
    overlapped: bool = False
    """Whether a collective runs beside computation."""
    body: str = ""
    """Computation it stands in, which is what a collective can overlap with."""


class UnknownKernel(ValueError):
    """The program calls a kernel whose time is not known."""


@dataclasses.dataclass(frozen=True)
class _Pricing:
    """The program that is priced, and by what."""

    read: program.Program
    mesh: "Mesh"
    chip: Chip
    estimate: bool


def costs(text: str, mesh: "Mesh", chip: Chip, *, estimate: bool = False) -> list[Cost]:
    """Every instruction of a compiled program that takes time.

    Args:
      text: `Compiled.as_text()`, or the optimised program before machine code.
      mesh: that it was compiled for.
      chip: its devices.
      estimate: the program has no `estimated_cycles` yet; computation is priced by `roofline`.

    Raises:
      UnknownKernel: a Pallas kernel without figures.
      ValueError: a text that is not understood.
    """
    read = program.parse(text)
    pricing = _Pricing(read, mesh, chip, estimate)
    return list(_walk(pricing, read.computations[read.entry], 1))


def _walk(pricing: _Pricing, computation: program.Computation, times: int) -> Iterator[Cost]:
    read = pricing.read
    for instruction in computation.instructions:
        called = instruction.called
        if instruction.opcode == "while":
            trips = read.trip_count(instruction)
            body = read.computations[called["body"][0]]
            yield from _walk(pricing, body, times * trips)
            continue
        if instruction.opcode == "conditional":
            branches = [
                list(_walk(pricing, read.computations[name], times))
                for name in called.get("branch_computations", ())
            ]
            # The dearest branch: a plan should not promise the cheap one.
            yield from max(branches, key=total_seconds, default=[])
            continue
        if instruction.opcode in ("call", "call-start", "async-start"):
            for name in called.get("calls", called.get("to_apply", ())):
                yield from _walk(pricing, read.computations[name], times)
            continue
        cost = _cost(pricing, computation, instruction, times)
        if cost is not None:
            yield cost


def _cost(
    pricing: _Pricing,
    computation: program.Computation,
    instruction: program.Instruction,
    times: int,
) -> Cost | None:
    read, chip = pricing.read, pricing.chip
    operand_bytes = sum(
        program.array_bytes(computation.by_name[name].type)
        for name in instruction.operands
        if name in computation.by_name
    )
    fields: dict[str, Any] = dict(
        name=instruction.name,
        part=part_of(read, instruction),
        phase=phase_of(instruction),
        times=times,
        body=computation.name,
    )
    collective = collectives.read(instruction, operand_bytes, pricing.mesh, chip)
    if collective is not None:
        return Cost(
            **fields,
            cycles=0,
            seconds=0.0,
            source="collective",
            collective=collective,
            overlapped=instruction.opcode.endswith("-start"),
        )
    if instruction.opcode == "custom-call":
        target = instruction.attribute("custom_call_target")
        if target in _FREE_TARGETS:
            return None
        if target == "tpu_custom_call":
            seconds = kernels.seconds(instruction, operand_bytes, chip)
            if seconds is None:
                raise UnknownKernel(instruction.name)
            fields["part"] = kernels.find(instruction).part
            return Cost(**fields, cycles=0, seconds=seconds, source="kernel")
    if instruction.opcode in _FREE or instruction.opcode.endswith(_ASYNCHRONOUS):
        return None
    fused = _fused_collective(pricing, instruction)
    if fused is not None:
        fields |= dict(collective=fused.collective, overlapped=fused.beside)
    cycles = instruction.cycles
    if cycles is not None:
        return Cost(**fields, cycles=cycles, seconds=cycles / chip.clock_hz, source="compiler")
    if fused is not None and not fused.computes:
        if fused.collective is None:
            return None
        return Cost(**fields, cycles=0, seconds=0.0, source="collective")
    work = roofline.work(read, computation, instruction)
    if pricing.estimate and instruction.opcode not in _UNTIMED:
        seconds = roofline.seconds(work, chip)
        cycles = round(seconds * chip.clock_hz)
        return Cost(**fields, cycles=cycles, seconds=seconds, source="roofline")
    return Cost(**fields, cycles=0, seconds=work.hbm_bytes / chip.hbm_bandwidth, source="bytes")


@dataclasses.dataclass(frozen=True)
class _Fused:
    """What a fusion with a collective inside it stands for."""

    collective: collectives.Collective | None
    """None where another fusion of the same collective has counted it."""
    beside: bool
    """Whether the collective runs beside computation."""
    computes: bool
    """Whether the fusion does more than the collective."""


def _fused_collective(pricing: _Pricing, instruction: program.Instruction) -> _Fused | None:
    """The collective inside a fusion, such as a reduce-scatter or one fused with a product."""
    if instruction.opcode != "fusion":
        return None
    for name in instruction.called.get("calls", ()):
        inner = pricing.read.computations[name]
        for step in inner.instructions:
            if step.opcode not in collectives.KINDS:
                continue
            size = sum(
                program.array_bytes(inner.by_name[operand].type)
                for operand in step.operands
                if operand in inner.by_name
            )
            found = collectives.read(step, size, pricing.mesh, pricing.chip)
            if found is None:
                continue
            computes = any(
                other.opcode in ("convolution", "fusion") for other in inner.instructions
            )
            if "async_collective_fusion_config" in step.text:
                # One collective that a chain of fusions carries on: its start, products beside it,
                # its end. It counts where it starts.
                starts = inner.root.attribute("custom_call_target") == "AsyncCollectiveStart"
                return _Fused(found if starts else None, True, computes)
            if found.kind == "all-reduce" and _scatters(inner):
                # Each device keeps its slice only, so half of an all-reduce is left out.
                found = dataclasses.replace(found, kind="reduce-scatter", seconds=found.seconds / 2)
            beside = computes or instruction.cycles is not None or "async" in instruction.text[:400]
            return _Fused(found, beside, computes)
    return None


def _scatters(computation: program.Computation) -> bool:
    return any(step.opcode == "dynamic-slice" for step in computation.instructions)


def phase_of(instruction: program.Instruction) -> str:
    """Which pass of training an instruction belongs to, by the path of its jax operation."""
    name = instruction.op_name
    if "rematted_computation" in name:
        return "recomputed"
    if "transpose(" in name:
        return "backward"
    if "jvp(" in name:
        return "forward"
    return "update"


def part_of(read: program.Program, instruction: program.Instruction) -> str:
    """Which part of the model an instruction belongs to, by the Python frames it was traced in."""
    frames = read.source(instruction)
    if not frames:
        for name in instruction.called.get("calls", ()):
            for inner in read.computations[name].instructions:
                frames = frames or read.source(inner)
    functions = [function for _, function in frames]
    for function in functions:
        if function.startswith("Embedder."):
            return "embedding"
        if function.startswith("Attention."):
            return "attention projections"
        if function.startswith("MLP."):
            return "MLP"
        if function in ("MoE._token_choice", "MoE._expert_choice"):
            return "router"
        if function.startswith("MoE.") or function == "exchange":
            return "experts"
        if function.startswith("Block."):
            return "norms and residuals"
        if function in ("cross_entropy", "linear_cross_entropy", "Decoder.head_kernel"):
            return "head and loss"
        if function.startswith("Decoder.trunk"):
            return "layer loop"
    if any("objectives.py" in file for file, _ in frames):
        return "head and loss"
    if any("optax" in file or "optimizers.py" in file for file, _ in frames):
        return "optimizer"
    if functions and functions[0] == "make_train_step.<locals>.step":
        return "optimizer"
    return "other"


def total_seconds(items: list[Cost]) -> float:
    """Step time: computation and kernels, plus what the collectives leave uncovered."""
    computing = sum(cost.times * cost.seconds for cost in items)
    return computing + exposed_seconds(items)


def exposed_seconds(items: list[Cost]) -> float:
    """Time the collectives add to a step.

    Waited-for ones add all of theirs. Those beside computation add what exceeds the computation of
    the loop body they stand in.
    """
    waited = sum(
        cost.times * cost.collective.seconds
        for cost in items
        if cost.collective and not cost.overlapped
    )
    bodies: dict[str, list[Cost]] = {}
    for cost in items:
        bodies.setdefault(cost.body, []).append(cost)
    beside = 0.0
    for inside in bodies.values():
        links = sum(c.times * c.collective.seconds for c in inside if c.collective and c.overlapped)
        work = sum(c.times * c.seconds for c in inside)
        beside += max(0.0, links - work)
    return waited + beside
