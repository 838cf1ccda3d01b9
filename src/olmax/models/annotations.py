"""Where a model says what its activations are, without knowing any mesh.

`annotate(x, axes)` names the logical axes of an activation. Outside a mesh it returns `x`
unchanged; inside `olmax.sharding.use_mesh` it becomes a sharding constraint. `per_device` says that
a function works on each device's part alone.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Placement:
    """What the annotations mean on a mesh."""

    constrain: Callable[[jax.Array, Axes], jax.Array]
    """Constrains an activation with these logical axes."""
    per_device: Callable[..., Any]
    """`(fn, axes, arrays, out_axes)`: applies `fn` on every device to its part of the arrays."""
    mesh_axes: Callable[[str, int], tuple[str, ...]]
    """`(axis, size)`: the mesh axes over which a dimension of this size is cut."""


_placement: contextvars.ContextVar[Placement | None] = contextvars.ContextVar(
    "placement", default=None
)


def annotate(x: jax.Array, axes: Axes) -> jax.Array:
    """Names the logical axes of `x` (one entry a dimension, None for an axis that is never
    sharded).
    """
    placement = _placement.get()
    return x if placement is None else placement.constrain(x, axes)


def per_device(
    fn: Callable[..., Any],
    axes: Sequence[Axes],
    *arrays: jax.Array,
    out_axes: Sequence[Axes] | None = None,
) -> Any:
    """`fn(*arrays)` where `fn` is a program of one device, such as a Pallas kernel.

    Args:
      fn: gets its device's part of every array.
      axes: logical axes of each array.
      out_axes: logical axes of each array of the tuple that `fn` returns, cut as the same axes of
        the arguments are. None: what it returns (an array or several) has the axes of its first
        argument.
    """
    placement = _placement.get()
    return fn(*arrays) if placement is None else placement.per_device(fn, axes, arrays, out_axes)


def on_mesh() -> bool:
    """Whether arrays lie on several devices."""
    return _placement.get() is not None


def mesh_axes(axis: str, size: int) -> tuple[str, ...]:
    """Names for the collectives that `fn` of `per_device` needs where it reduces over `axis`.

    Empty when a dimension of this size is not cut.
    """
    placement = _placement.get()
    return () if placement is None else placement.mesh_axes(axis, size)


@contextlib.contextmanager
def placed(placement: Placement) -> Iterator[None]:
    """Installs what the annotations mean inside this context."""
    token = _placement.set(placement)
    try:
        yield
    finally:
        _placement.reset(token)
