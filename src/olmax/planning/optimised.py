"""The optimised program of a step as the compiler dumps it, minutes before its machine code.

It holds every operation in its order, its layout and memory space, all collectives and the
assignment of memory; the estimated cycles are missing, they come with the machine code.
"""

import dataclasses
import pathlib
import re

from olmax.planning import program

# The name of the jitted function, which the dumped files carry.
_STEP = "jit_step"

# The compiler writes these files in this order, so the last one says that the others are whole.
_PROGRAM = f"*{_STEP}*.after_optimizations.hlo.pb"
_MEMORY = f"*{_STEP}*.after_optimizations-buffer-assignment.txt"
_LAST = f"*{_STEP}*.after_optimizations_after_buffer_assignment.hlo.pb"

# A dumped program is an HloProto; this field of it is the program.
_HLO_MODULE = 1


@dataclasses.dataclass(frozen=True)
class Optimised:
    """An optimised program."""

    text: str
    """In the form of `Compiled.as_text()`, without estimated cycles."""
    total_bytes: int
    """Arguments and temporaries in HBM, one device."""

    @property
    def largest(self) -> frozenset[str]:
        """Names of the products and kernels, which take the compiler longest."""
        read = program.parse(self.text)
        # A fused computation stands in front of what calls it.
        products: set[str] = set()
        names = set()
        for computation in read.computations.values():
            for instruction in computation.instructions:
                if instruction.opcode == "fusion":
                    multiplies = not products.isdisjoint(instruction.called.get("calls", ()))
                else:
                    multiplies = instruction.opcode in ("convolution", "dot")
                if multiplies:
                    products.add(computation.name)
                if multiplies or "tpu_custom_call" in instruction.text:
                    names.add((computation.name, instruction.name))
        fused = {
            name
            for computation in read.computations.values()
            for instruction in computation.instructions
            if instruction.opcode == "fusion"
            for name in instruction.called.get("calls", ())
        }
        return frozenset(name for computation, name in names if computation not in fused)


def flags(folder: pathlib.Path) -> str:
    """For XLA_FLAGS: makes the compiler write its programs to `folder`."""
    return f"--xla_dump_to={folder} --xla_dump_hlo_as_proto --xla_dump_hlo_as_text"


def read(folder: pathlib.Path) -> Optimised | None:
    """The program of a step in a folder of dumps; None before it is there.

    Raises:
      ValueError: the files do not hold what they should.
    """
    if not any(folder.glob(_LAST)):
        return None
    (program,) = folder.glob(_PROGRAM)
    (memory,) = folder.glob(_MEMORY)
    return Optimised(_text(program.read_bytes()), _hbm_bytes(memory.read_text()))


def _hbm_bytes(assignment: str) -> int:
    """All allocations in a device's memory; those of other memory spaces name their `color`."""
    sizes = re.findall(r"^allocation \d+: size (\d+), page \d+, (?!thread-local)", assignment, re.M)
    if not sizes:
        raise ValueError("the compiler's assignment of memory lists no allocation")
    return sum(map(int, sizes))


def _text(proto: bytes) -> str:
    # jaxlib has no public way to print a dumped program.
    from jaxlib import _hlo  # pyright: ignore[reportAttributeAccessIssue]

    module = _hlo.HloModule.from_serialized_hlo_module_proto(_field(proto, _HLO_MODULE))
    return module.to_string()


def _field(message: bytes, number: int) -> bytes:
    """A field that is itself a message, of a protocol buffer in its wire format."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 2:
            size, at = _varint(message, at)
            if key >> 3 == number:
                return message[at : at + size]
            at += size
        elif kind == 0:
            _, at = _varint(message, at)
        else:
            at += 8 if kind == 1 else 4
    raise ValueError(f"no field {number} in the dumped program")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
