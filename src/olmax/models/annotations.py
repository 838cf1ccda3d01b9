"""Where a model says what its activations are, without knowing any mesh.

`annotate(x, axes)` names the logical axes of an activation. Outside a mesh it returns `x`
unchanged; inside `olmax.sharding.use_mesh` it becomes a sharding constraint.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax

Axes = tuple[str | None, ...]

_annotator: contextvars.ContextVar[Callable[[jax.Array, Axes], jax.Array] | None] = (
    contextvars.ContextVar("annotator", default=None)
)


def annotate(x: jax.Array, axes: Axes) -> jax.Array:
    """Names the logical axes of `x` (one entry a dimension, None for an axis that is never
    sharded).
    """
    annotator = _annotator.get()
    return x if annotator is None else annotator(x, axes)


@contextlib.contextmanager
def annotator(fn: Callable[[jax.Array, Axes], jax.Array]) -> Iterator[None]:
    """Installs `fn` as what `annotate` calls inside this context."""
    token = _annotator.set(fn)
    try:
        yield
    finally:
        _annotator.reset(token)
