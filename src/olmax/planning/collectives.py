"""Collectives of a compiled program: who talks to whom, how much, and how long the links take."""

import dataclasses
import math
import re
from typing import TYPE_CHECKING

import numpy as np

from olmax.planning import program
from olmax.planning.chips import Chip

if TYPE_CHECKING:
    from jax.sharding import Mesh

# The opcode of each kind, with the ones that start it asynchronously.
KINDS = {
    "all-gather": "all-gather",
    "all-gather-start": "all-gather",
    "all-reduce": "all-reduce",
    "all-reduce-start": "all-reduce",
    "reduce-scatter": "reduce-scatter",
    "all-to-all": "all-to-all",
    "all-to-all-start": "all-to-all",
    "ragged-all-to-all": "all-to-all",
    "ragged-all-to-all-start": "all-to-all",
    "collective-permute": "collective-permute",
    "collective-permute-start": "collective-permute",
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of one device."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes it runs along."""
    group: int
    """Devices that take part."""
    bytes: int
    """Of the whole array: the gathered one, the one before scattering, the one reduced."""
    seconds: float
    """On the links, alone."""


def read(
    instruction: program.Instruction, operand_bytes: int, mesh: "Mesh", chip: Chip
) -> Collective | None:
    """The collective that an instruction is; None if it is something else.

    Raises:
      ValueError: its device groups are written in a way that is not understood.
    """
    kind = KINDS.get(instruction.opcode)
    if kind is None:
        return None
    result = program.array_bytes(instruction.type)
    if instruction.opcode.endswith("-start"):
        # The result of a start holds the operands too.
        result -= operand_bytes
    if kind == "all-gather":
        size = result
    elif instruction.opcode.startswith("ragged-all-to-all"):
        # One of input and output is what a device holds, the other a buffer for the worst case, as
        # the output that is an operand too. With balanced experts it sends what it holds.
        size = min(result, operand_bytes - result)
    else:
        size = operand_bytes
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", instruction.attribute("source_target_pairs") or "")
        group = np.array(pairs[0], int) if pairs else np.arange(1)
    else:
        group = first_group(instruction.attribute("replica_groups") or "", mesh.size)
    axes = _axes_of(group, mesh)
    seconds = link_seconds(kind, size, group, mesh, chip)
    return Collective(kind, axes, len(group), size, seconds)


def first_group(text: str, devices: int) -> np.ndarray:
    """Positions on the mesh (row-major) of the first group of devices.

    The compiler writes groups as lists `{{0,1},{2,3}}`, as a reshaped and transposed count
    `[2,4]<=[4,2]T(1,0)`, or as axes of a mesh `mesh['x'=2,'y'=4] {'y'}`.

    Raises:
      ValueError: none of these.
    """
    text = text.strip()
    if text in ("", "{}"):
        return np.arange(devices)
    if match := re.match(r"\{\{([0-9,]*)\}", text):
        return np.array([int(i) for i in match[1].split(",") if i])
    if match := re.match(r"\[(\d+),(\d+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", text):
        dims = [int(i) for i in match[3].split(",")]
        ids = np.arange(math.prod(dims)).reshape(dims)
        if match[4]:
            ids = ids.transpose([int(i) for i in match[4].split(",")])
        return ids.reshape(int(match[1]), int(match[2]))[0]
    if match := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(([^)]*)\))? ?\{([^}]*)\}", text):
        names = re.findall(r"'([^']+)'=(\d+)", match[1])
        sizes = [int(size) for _, size in names]
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        if match[2]:
            ids = np.array([int(i) for i in re.findall(r"\d+", match[2])]).reshape(sizes)
        order = [name for name, _ in names]
        used, index = [], [slice(None)] * len(order)
        parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", match[3])
        for name, before, size in parts:
            axis = order.index(name)
            used.append(axis)
            if before:
                # A part of an axis: `before` groups outside of it, `size` members.
                inside = sizes[axis] // (int(before) * int(size))
                index[axis] = slice(0, int(size) * inside, inside)
        for axis in range(len(order)):
            if axis not in used:
                index[axis] = slice(0, 1)
        return ids[tuple(index)].reshape(-1)
    raise ValueError(f"cannot read the device groups {text[:80]!r}")


def _axes_of(group: np.ndarray, mesh: "Mesh") -> tuple[str, ...]:
    coordinates = np.stack(np.unravel_index(group, mesh.devices.shape), axis=1)
    varying = (coordinates != coordinates[:1]).any(axis=0)
    return tuple(name for name, differs in zip(mesh.axis_names, varying, strict=True) if differs)


def link_seconds(kind: str, size: int, group: np.ndarray, mesh: "Mesh", chip: Chip) -> float:
    """Time of one collective on otherwise idle links.

    Rings along every torus dimension the group spans, all at once, both directions where the
    dimension closes to a ring (or is a pair of links), one direction otherwise. A part that crosses
    slices runs over the network of the hosts instead.
    """
    count = len(group)
    if count < 2 or not size:
        return 0.0
    devices = mesh.devices.reshape(-1)[group]
    slices = {getattr(device, "slice_index", 0) or 0 for device in devices}
    seconds = 0.0
    inside = count // len(slices)
    if len(slices) > 1:
        # Every chip carries the piece it holds after the part inside the slice.
        seconds += _sent(kind, size / max(inside, 1), len(slices)) / chip.dcn_bandwidth
    if inside > 1:
        extents, bandwidth = _torus(devices, mesh, chip)
        if kind == "all-to-all":
            # Along each dimension a piece travels a quarter of the ring on average.
            seconds += size * sum(max(extent / 4, 0.5) for extent in extents) / bandwidth
        elif kind == "collective-permute":
            seconds += size / chip.link_bandwidth
        else:
            seconds += _sent(kind, size, inside) / bandwidth
    return seconds


def _sent(kind: str, size: float, count: int) -> float:
    """Bytes that each of `count` devices sends."""
    share = (count - 1) / count
    return 2 * size * share if kind == "all-reduce" else size * share


def _torus(devices, mesh: "Mesh", chip: Chip) -> tuple[list[int], float]:
    """Extents of the group along the torus dimensions it spans, and bytes a second of all of
    them.
    """
    coordinates = np.array([device.coords for device in devices])
    everything = np.array([device.coords for device in mesh.devices.reshape(-1)])
    extents, bandwidth = [], 0.0
    for dimension in range(coordinates.shape[1]):
        extent = len(set(coordinates[:, dimension].tolist()))
        if extent < 2:
            continue
        whole = len(set(everything[:, dimension].tolist()))
        ring = extent == whole and whole % chip.wrap == 0
        extents.append(extent)
        bandwidth += chip.link_bandwidth * (2 if ring else 1)
    return extents, bandwidth
