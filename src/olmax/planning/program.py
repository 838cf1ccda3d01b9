"""Reading the text of a compiled TPU program: computations, instructions and where they came from.

The text is what `jax.stages.Compiled.as_text()` gives: the optimised, scheduled program of one
device. Only what a plan needs is read.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16}

# The compiler writes this where it has no estimate.
_NO_ESTIMATE = 2**63 - 1

_HEADER = re.compile(r"^(ENTRY )?%([^\s(]+) \(.*\{$")
# Metadata of kernels has lines that begin with a brace too, so the whole line counts.
_END = re.compile(r"\}(, execution_thread=\"\w+\")?")
_INSTRUCTION = re.compile(r"^  (ROOT )?%([^\s=]+) = ")
_OPCODE = re.compile(r"([a-z][a-z0-9-]*)\(")
_OPERAND = re.compile(r"%([^\s,(){}]+)")
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\]")
_CALLED = re.compile(r"\b(calls|body|condition|to_apply|branch_computations)=(\{[^}]*\}|%[^\s,]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")


def array_bytes(text: str) -> int:
    """Bytes of all arrays in a type such as `(f32[8,128]{1,0}, s32[])`."""
    return sum(
        math.prod(int(size) for size in dims.split(",") if size) * _bits(dtype) // 8
        for dtype, dims in _ARRAY.findall(text)
    )


def array_shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of all arrays in a type."""
    return [
        (dtype, tuple(int(size) for size in dims.split(",") if size))
        for dtype, dims in _ARRAY.findall(text)
    ]


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return int(digits[1]) if digits else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    type: str
    """Its result: one array or a tuple of them."""
    opcode: str
    operands: tuple[str, ...]
    """Names in the same computation."""
    text: str
    """Everything after the operands: attributes, metadata, configuration of the compiler."""
    is_root: bool = False

    @functools.cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Computations it uses, by role: `calls`, `body`, `condition`, `branch_computations`."""
        return {role: tuple(_OPERAND.findall(names)) for role, names in _CALLED.findall(self.text)}

    @functools.cached_property
    def cycles(self) -> int | None:
        """The compiler's own estimate; None where it made none."""
        match = _CYCLES.search(self.text)
        if not match or int(match[1]) == _NO_ESTIMATE:
            return None
        return int(match[1])

    @functools.cached_property
    def op_name(self) -> str:
        """Path of the jax operation it was made from."""
        match = _OP_NAME.search(self.text)
        return match[1] if match else ""

    @functools.cached_property
    def frame(self) -> int | None:
        """Index of its Python stack frame in the program's tables."""
        match = _FRAME.search(self.text)
        return int(match[1]) if match else None

    def attribute(self, name: str) -> str | None:
        """Text of an attribute up to its end: a word, a quoted string or balanced braces."""
        match = re.search(rf"\b{name}=", self.text)
        if not match:
            return None
        rest = self.text[match.end() :]
        if rest.startswith('"'):
            return rest[1 : rest.index('"', 1)]
        depth = 0
        for i, character in enumerate(rest):
            depth += (character in "{[(") - (character in "}])")
            if depth < 0 or (depth == 0 and character == ",") or (not depth and character == "\n"):
                return rest[:i].strip()
        return rest.strip()


@dataclasses.dataclass(frozen=True)
class Computation:
    """A list of instructions in the order they run."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @property
    def root(self) -> Instruction:
        """The instruction whose value is the result."""
        return next(i for i in self.instructions if i.is_root)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str
    frames: dict[int, tuple[tuple[str, str], ...]]
    """Python (file, function) of every stack frame id, innermost first."""

    def source(self, instruction: Instruction) -> tuple[tuple[str, str], ...]:
        """Python (file, function) an instruction comes from, innermost first; empty if unknown."""
        return self.frames.get(instruction.frame or 0, ())

    def trip_count(self, loop: Instruction) -> int:
        """How often a `while` runs.

        The compiler's own count if it states one, else the bound of the counter: the integer
        constant in the condition.

        Raises:
          ValueError: the condition has no single bound.
        """
        known = _TRIPS.search(loop.text)
        if known:
            return int(known[1])
        condition = self.computations[loop.called["condition"][0]]
        bounds = [
            int(instruction.text[: instruction.text.index(")")])
            for instruction in condition.instructions
            if instruction.opcode == "constant" and re.match(r"[su]\d+\[\]", instruction.type)
        ]
        if len(bounds) != 1:
            raise ValueError(f"loop {loop.name}: cannot read its trip count from {condition.name}")
        return bounds[0]


def parse(text: str) -> Program:
    """Reads the text of a program.

    Raises:
      ValueError: there is no entry computation.
    """
    computations, entry = {}, None
    for name, is_entry, lines in _computations(text):
        instructions = tuple(_instruction(line) for line in _joined(lines))
        computations[name] = Computation(name, instructions)
        entry = name if is_entry else entry
    if entry is None:
        raise ValueError("the text holds no entry computation")
    return Program(computations, entry, _frames(text))


def _computations(text: str) -> Iterator[tuple[str, bool, list[str]]]:
    header, lines = None, []
    for line in text.split("\n"):
        if header is None:
            header = _HEADER.match(line)
            lines = []
        elif _END.fullmatch(line):
            yield header[2], bool(header[1]), lines
            header = None
        else:
            lines.append(line)


def _joined(lines: list[str]) -> Iterator[str]:
    """Instructions, with the raw line breaks inside kernel metadata taken back."""
    current: list[str] = []
    for line in lines:
        if _INSTRUCTION.match(line) and current:
            yield "\n".join(current)
            current = []
        current.append(line)
    if current:
        yield "\n".join(current)


def _instruction(line: str) -> Instruction:
    head = _INSTRUCTION.match(line)
    if head is None:
        raise ValueError(f"not an instruction: {line[:80]!r}")
    rest = line[head.end() :]
    end = _type_end(rest)
    opcode = _OPCODE.match(rest, end + 1)
    if opcode is None:
        raise ValueError(f"instruction without an operation: {line[:80]!r}")
    stop = _closing(rest, opcode.end() - 1)
    inside = rest[opcode.end() : stop]
    # A constant's value stands where operands do.
    text = rest[opcode.end() :] if opcode[1] in ("constant", "parameter") else rest[stop + 1 :]
    return Instruction(
        name=head[2],
        type=rest[:end],
        opcode=opcode[1],
        operands=tuple(_OPERAND.findall(inside)),
        text=text,
        is_root=bool(head[1]),
    )


def _type_end(rest: str) -> int:
    return _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        if text[i] == "(":
            depth += 1
        elif text[i] == ")":
            depth -= 1
            if depth == 0:
                return i
    raise ValueError(f"unbalanced parentheses: {text[start : start + 80]!r}")


def _frames(text: str) -> dict[int, tuple[tuple[str, str], ...]]:
    tables: dict[str, dict[int, str]] = {}
    table = None
    for line in text.split("\n"):
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = tables.setdefault(line, {})
        elif table is not None and (match := re.match(r"(\d+) (.*)", line)):
            table[int(match[1])] = match[2]
        elif _HEADER.match(line):
            break
        elif line:
            table = None
    if "StackFrames" not in tables:
        return {}

    def field(row: str, name: str) -> int:
        match = re.search(rf"\b{name}=(\d+)", row)
        return int(match[1]) if match else 0

    places, parents = {}, {}
    for number, row in tables["StackFrames"].items():
        location = tables["FileLocations"].get(field(row, "file_location_id"), "")
        places[number] = (
            tables["FileNames"].get(field(location, "file_name_id"), "").strip('"'),
            tables["FunctionNames"].get(field(location, "function_name_id"), "").strip('"'),
        )
        # Parents count from one, so that zero can mean none.
        parents[number] = field(row, "parent_frame_id") - 1
    frames = {}
    for number in places:
        stack, current = [], number
        while current in places and len(stack) <= len(places):
            stack.append(places[current])
            current = parents[current]
        frames[number] = tuple(stack)
    return frames
