"""The platform a kernel is compiled for, which is not always the one that traces it."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

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


def check_tpu(op: str, interpret: Any) -> None:
    """Raises a ValueError where a TPU kernel is neither compiled for a TPU nor interpreted."""
    _check(op, "tpu", "TPU", interpret)


def check_gpu(op: str, interpret: Any) -> None:
    """Raises a ValueError where a GPU kernel is neither compiled for a GPU nor interpreted."""
    _check(op, "gpu", "GPU", interpret)


def _check(op: str, needed: str, name: str, interpret: Any) -> None:
    if not interpret and platform() != needed:
        raise ValueError(
            f"{op}: implementation 'pallas_{needed}' cannot run on {platform()}; it needs a {name} "
            "or interpret=True (kernels_pallas.targets.compiling_for compiles ahead of time)"
        )
