"""TPU slices by name, as devices to compile for. No TPU is needed, only the libtpu package."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from olmax import absent_tpu
from olmax.errors import UserError
from olmax.planning import chips


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` slices of `shape` chips each."""

    chip: chips.Chip
    shape: tuple[int, ...]
    slices: int = 1

    @classmethod
    def parse(cls, text: str, slices: int = 1) -> "Topology":
        """From `v5p:4x4x4`.

        Raises:
          UserError: not of that form, an unknown chip or the wrong number of dimensions.
        """
        match = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", text.strip().lower())
        if not match:
            raise UserError(
                f"topology {text!r}: write chip and shape, such as v5p:4x4x4 or v6e:16x16"
            )
        chip = chips.find(match[1])
        shape = tuple(int(size) for size in match[2].split("x"))
        if len(shape) != chip.dimensions or min(shape) < 1:
            example = "x".join(["4"] * chip.dimensions)
            raise UserError(
                f"topology {text!r}: a {chip.name} slice has {chip.dimensions} dimensions, "
                f"such as {chip.name}:{example}"
            )
        if math.prod(shape) > chip.largest_slice:
            raise UserError(
                f"topology {text!r}: a {chip.name} slice has at most {chip.largest_slice:,} chips; "
                "join several with --slices"
            )
        if slices < 1:
            raise UserError(f"slices must be at least 1, is {slices}")
        return cls(chip, shape, slices)

    @property
    def name(self) -> str:
        """Of one slice, `v5p:4x4x4`."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def num_chips(self) -> int:
        """Of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def hosts_per_slice(self) -> int:
        """Virtual machines of one slice."""
        return max(1, math.prod(self.shape) // self.chip.chips_per_host)

    @property
    def accelerator_type(self) -> str:
        """Google Cloud's name of one slice, `v5p-128`."""
        return f"{self.chip.accelerator}-{math.prod(self.shape) * self.chip.cores_in_name}"

    @property
    def standard(self) -> bool:
        """Whether `accelerator_type`, which is a number of chips, means this shape: the one nearest
        to a square or a cube.
        """
        chips_in_slice = math.prod(self.shape)
        # Larger slices of a three-dimensional torus are made of cubes of 64 chips.
        unit = 4 if self.chip.dimensions == 3 and chips_in_slice >= 64 else 1
        shapes = _shapes(chips_in_slice, self.chip.dimensions, unit)
        return tuple(sorted(self.shape)) == min(shapes, key=sum, default=())

    def devices(self) -> "list[Any]":
        """Devices to compile for; they cannot run anything.

        Raises:
          UserError: libtpu is missing or does not fit this jax, or there is no such slice.
        """
        absent_tpu.announce()
        import jax
        from jax.experimental import topologies

        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                "planning compiles with libtpu, which is not installed: pip install 'olmax[tpu]'"
            )
        # Without being told so, the compiler takes no dimension for a ring, and then writes gathers
        # as sums of zero-padded pieces.
        rings = [size % self.chip.wrap == 0 for size in self.shape]
        options: dict[str, Any] = {"wrap": tuple(rings + [False] * (3 - len(rings)))}
        if self.slices > 1:
            options["num_slices"] = self.slices
        try:
            with _quiet():
                found = topologies.get_topology_desc(
                    platform="tpu", topology_name=self.name, **options
                )
        except Exception as error:
            raise UserError(_reason(self, error, jax.__version__)) from error
        expected = self.num_chips * self.chip.devices_per_chip
        if len(found.devices) != expected:
            raise UserError(
                f"topology {self.name}: libtpu gives {len(found.devices)} devices, not {expected}"
            )
        return list(found.devices)


def _shapes(chips_in_slice: int, dimensions: int, unit: int) -> list[tuple[int, ...]]:
    """Sorted shapes of this many chips whose sides are multiples of `unit`."""
    if dimensions == 1:
        return [] if chips_in_slice % unit else [(chips_in_slice,)]
    return [
        (side, *rest)
        for side in range(unit, chips_in_slice + 1, unit)
        if chips_in_slice % side == 0
        for rest in _shapes(chips_in_slice // side, dimensions - 1, unit)
        if rest[0] >= side
    ]


def _reason(topology: Topology, error: Exception, jax_version: str) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    low = first.lower()
    if "version" in low or "pjrt_c_api" in low or "undefined symbol" in low:
        return (
            f"libtpu does not go with jax {jax_version} ({first}); "
            f"pip install -U 'jax[tpu]=={jax_version}'"
        )
    return f"no such TPU slice {topology.name}: {first}"


@contextlib.contextmanager
def _quiet():
    """Hides what libtpu's C++ writes to standard error."""
    saved = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
