"""Time of an operation that the compiler has not timed: its FLOPs and bytes over a chip's rates.

The compiler estimates cycles while it writes machine code, which is nearly all of the time it
takes; the program before that has every operation, shape, layout and memory space, but no cycles.
"""

import dataclasses
import re

from olmax.planning import program
from olmax.planning.chips import Chip

_TYPE = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\](\{[^{}]*\})?")
_LAYOUT = re.compile(r"\{(\d+)[^{}]*?T\((\d+),128\)")
_WINDOW = re.compile(r"(\w+)=([0-9x_-]+)")


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the compiler's own estimates come to, as shares of a chip's peaks."""

    products: float
    """Of `peak_flops`."""
    memory: float
    """Of `hbm_bandwidth`."""
    local: float
    """What a byte in the chip's own memory costs, to one in HBM."""


# Fitted to the estimates of whole programs (docs/planning.md tells which, and how far this is off).
RATES = {
    "v5e": Rates(0.93, 0.40, 0.1),
    "v5p": Rates(0.93, 0.35, 1.0),
    "v6e": Rates(0.81, 0.50, 1.0),
}

# An operation takes at least this long, whatever it does; tiny ones are mostly scalars.
_LEAST_CYCLES = 2400
_TINY_CYCLES = 300
_TINY_BYTES = 10_000

# Bytes a cycle of a copy that transposes an array out of tiles of fewer rows than a register has
# (12.9 Mcycles for a [27648, 5120] that was gathered from 256 pieces of 20 columns, on v6e).
RETILED_BYTES_PER_CYCLE = 44
_REGISTER_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Work:
    """What one run of an operation does on one device."""

    flops: int
    """Of products of matrices."""
    hbm_bytes: int
    """Read and written in HBM."""
    local_bytes: int
    """Read and written in the chip's own memory, where the compiler keeps arrays that fit."""
    retiled: bool = False
    """Whether it transposes an array out of tiles that fill a part of a register only."""


def work(
    read: program.Program, computation: program.Computation, instruction: program.Instruction
) -> Work:
    """FLOPs and bytes of an instruction of `computation`, with the computations it is fused from.

    A slice of an operand counts as the slice, an update in place as the update: so a loop over
    layers reads its stacked weights.
    """
    if instruction.opcode == "fusion":
        flops = _flops_within(read, read.computations[instruction.called["calls"][0]])
        return Work(flops, *_fusion_bytes(read, computation, instruction))
    operands = [
        computation.by_name[name].type
        for name in instruction.operands
        if name in computation.by_name
    ]
    if instruction.opcode in ("dynamic-slice", "gather", "slice"):
        moved = [instruction.type, instruction.type]
    elif instruction.opcode == "dynamic-update-slice":
        moved = [operands[1], operands[1]]
    else:
        moved = [instruction.type, *operands]
    arrays = [array for text in moved for array in _arrays(text)]
    retiled = instruction.opcode == "copy" and _retiles(operands[0], instruction.type)
    return Work(product_flops(computation, instruction), *_by_place(arrays), retiled)


def _retiles(source: str, result: str) -> bool:
    before, after = _LAYOUT.search(source), _LAYOUT.search(result)
    if not before or not after:
        return False
    return int(before[2]) < _REGISTER_ROWS and before[1] != after[1]


def seconds(work: Work, chip: Chip) -> float:
    """Of one run of an operation: its products or its memory, whichever takes longer."""
    rates = RATES[chip.name]
    moved = work.hbm_bytes + rates.local * work.local_bytes
    everything = work.hbm_bytes + work.local_bytes
    tiny = everything < _TINY_BYTES
    return max(
        everything / RETILED_BYTES_PER_CYCLE / chip.clock_hz if work.retiled else 0.0,
        work.flops / (rates.products * chip.peak_flops),
        moved / (rates.memory * chip.hbm_bandwidth),
        (_TINY_CYCLES if tiny else _LEAST_CYCLES) / chip.clock_hz,
    )


def _flops_within(read: program.Program, computation: program.Computation) -> int:
    total = 0
    for step in computation.instructions:
        total += product_flops(computation, step)
        if step.opcode == "fusion":
            total += _flops_within(read, read.computations[step.called["calls"][0]])
    return total


def _fusion_bytes(
    read: program.Program, outer: program.Computation, fusion: program.Instruction
) -> tuple[int, int]:
    inner = read.computations[fusion.called["calls"][0]]
    arrays, updated = [], set()
    for number, name in enumerate(fusion.operands):
        if name not in outer.by_name:
            continue
        kind = outer.by_name[name].type
        size = program.array_bytes(kind)
        touched, in_place = _touched(read, inner, number, size)
        arrays.append((touched, "S(" in kind))
        if in_place:
            updated.add(size)
    # An array that is updated in place is a result too, of which only the update is written.
    arrays += [array for array in _arrays(fusion.type) if array[0] not in updated]
    return _by_place(arrays)


def _touched(
    read: program.Program, computation: program.Computation, number: int, size: int
) -> tuple[int, bool]:
    """Bytes that a fused computation reads, or writes in place, of its parameter `number`, which
    has `size`; and whether it updates it in place.
    """
    name = next(
        (
            step.name
            for step in computation.instructions
            if step.opcode == "parameter" and int(step.text[: step.text.index(")")]) == number
        ),
        None,
    )
    if name is None:
        return size, False
    touched, in_place = 0, False
    views = {name}
    for step in computation.instructions:
        for position, operand in enumerate(step.operands):
            if operand not in views:
                continue
            if step.opcode in ("bitcast", "get-tuple-element", "tuple"):
                views.add(step.name)
            elif step.opcode in ("dynamic-slice", "gather", "slice"):
                touched += program.array_bytes(step.type) if position == 0 else 0
            elif step.opcode == "dynamic-update-slice" and position == 0:
                in_place = True
                touched += program.array_bytes(computation.by_name[step.operands[1]].type)
            elif step.opcode == "fusion":
                inner = read.computations[step.called["calls"][0]]
                part, changed = _touched(read, inner, position, size)
                touched, in_place = touched + part, in_place or changed
            else:
                touched += size
    return min(touched, size), in_place


def _arrays(text: str) -> list[tuple[int, bool]]:
    """Bytes of the arrays in a type, and whether they are in another memory than HBM, which their
    layout tells as `S(1)`.
    """
    return [
        (program.array_bytes(f"{dtype}[{dims}]"), "S(" in layout)
        for dtype, dims, layout in _TYPE.findall(text)
    ]


def _by_place(arrays: list[tuple[int, bool]]) -> tuple[int, int]:
    return (
        sum(size for size, local in arrays if not local),
        sum(size for size, local in arrays if local),
    )


def product_flops(computation: program.Computation, instruction: program.Instruction) -> int:
    """FLOPs of a convolution, which is what the TPU compiler makes of every product; 0 for other
    instructions.
    """
    if instruction.opcode != "convolution":
        return 0
    labels = instruction.attribute("dim_labels") or ""
    match = re.fullmatch(r"(\w+)_(\w+)->(\w+)", labels)
    if not match:
        return 0
    shapes = []
    for name in instruction.operands:
        ((_, shape),) = program.array_shapes(computation.by_name[name].type)
        shapes.append(shape)
    ((_, result),) = program.array_shapes(instruction.type)
    left, kernel, out = match.groups()
    window = dict(_WINDOW.findall(instruction.attribute("window") or ""))
    count = 2 * result[out.index("b")] * result[out.index("f")] * shapes[1][kernel.index("i")]
    spatial = sum(letter.isdigit() for letter in out)
    for axis in range(spatial):
        count *= _window_places(
            inputs=shapes[0][left.index(str(axis))],
            outputs=result[out.index(str(axis))],
            size=shapes[1][kernel.index(str(axis))],
            stride=int(_entry(window, "stride", axis, "1")),
            before=int(_entry(window, "pad", axis, "0_0").split("_")[0]),
            left_dilation=int(_entry(window, "lhs_dilate", axis, "1")),
            right_dilation=int(_entry(window, "rhs_dilate", axis, "1")),
        )
    return count


def _entry(window: dict[str, str], name: str, axis: int, default: str) -> str:
    return window[name].split("x")[axis] if name in window else default


def _window_places(
    *,
    inputs: int,
    outputs: int,
    size: int,
    stride: int,
    before: int,
    left_dilation: int,
    right_dilation: int,
) -> int:
    """Pairs of an output and a place of the window that meet an input and not padding."""
    if inputs == outputs == size == 1:
        return 1
    last = (inputs - 1) * left_dilation
    pairs = 0
    for place in range(size):
        for output in range(outputs):
            at = output * stride - before + place * right_dilation
            pairs += 0 <= at <= last and at % left_dilation == 0
    return pairs
