"""The platform a kernel is compiled for, which is not always the one that traces it."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: the default backend's, or what `compiling_for` says."""
    return _target.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """Traces inside for another platform: programs that are compiled ahead of time.

    A function already traced outside keeps its trace, as with everything jax caches.
    """
    token = _target.set(name)
    try:
        yield
    finally:
        _target.reset(token)
