"""Meshes of devices that exist only as coordinates on a torus."""

import dataclasses
import types

import numpy as np


@dataclasses.dataclass(frozen=True)
class Device:
    coords: tuple[int, ...]
    slice_index: int = 0


def mesh_of(shape: dict[str, int], torus: tuple[int, ...], slices: int = 1):
    """A stand-in for a mesh: the devices of `slices` tori in row-major order."""
    chips = int(np.prod(torus))
    devices = np.empty(slices * chips, object)
    for i in range(devices.size):
        slice_index, inside = divmod(i, chips)
        coords = tuple(int(c) for c in np.unravel_index(inside, torus))
        devices[i] = Device(coords, slice_index)
    return types.SimpleNamespace(
        devices=devices.reshape(tuple(shape.values())), axis_names=tuple(shape), size=devices.size
    )
