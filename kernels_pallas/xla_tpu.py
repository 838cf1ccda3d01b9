"""What XLA's TPU backend turns into fast code; the choice falls when a program is lowered, since a
host with CPUs alone may compile for TPUs.
"""

from collections.abc import Callable
from typing import Any

import jax


def on_tpu(tpu: Callable[..., Any], default: Callable[..., Any], *args: Any) -> Any:
    """`tpu(*args)` in programs for TPUs, `default(*args)` in others."""
    return jax.lax.platform_dependent(*args, tpu=tpu, default=default)


def in_memory(x: Any) -> Any:
    """`x`, an array or a tree of arrays, computed before what uses it and not inside it.

    XLA's TPU backend fuses what leads to an operand into the matrix product that reads it, which
    then does that work again for every tile of the other operand. That is mostly cheaper than a
    way through memory (docs/performance.md), but not where several products read the values.
    """
    return on_tpu(jax.lax.optimization_barrier, lambda x: x, x)
