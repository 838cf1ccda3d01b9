"""What XLA's TPU backend turns into fast code; the choice falls when a program is lowered, since a
host with CPUs alone may compile for TPUs.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike


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


def unwritten(shape: tuple[int, ...], dtype: DTypeLike, after: jax.Array) -> jax.Array:
    """An array that nobody has written, allocated once `after` is there.

    Inside a loop, XLA takes `jax.lax.empty` out of it, and copies that array in every round for
    whoever writes into it. The result of a kernel that does nothing stays inside; two with the same
    `after` are one array, and copied too.
    """

    def tpu(after):
        return pl.pallas_call(
            lambda after, out: None,
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
            out_shape=jax.ShapeDtypeStruct(shape, dtype),
            cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=0, transcendentals=0),
            name="unwritten",
        )(after)

    return on_tpu(tpu, lambda after: jax.lax.empty(shape, dtype), after)
