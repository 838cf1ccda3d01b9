"""Public grouped products: argument checks and choice of implementation."""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas import targets
from kernels_pallas.grouped_matmul import pallas_gpu, pallas_tpu, ragged, reference, tiled

IMPLEMENTATIONS: dict[str, ModuleType] = {
    "reference": reference,
    "tiled": tiled,
    "ragged": ragged,
    "pallas_tpu": pallas_tpu,
    "pallas_gpu": pallas_gpu,
}

PER_DEVICE = frozenset({"tiled", "pallas_tpu", "pallas_gpu"})
"""Implementations the compiler cannot cut over a mesh: sharded callers use `jax.shard_map`."""


def choose(dtype: DTypeLike, widths: tuple[int, ...], *, gathers: bool) -> str:
    """The best implementation where the program will run, for rows of `dtype` that are gathered or
    not, and matrices of these two widths, the contracted one first.

    On TPUs our kernels where they take these, in programs for one device or inside `shard_map`. On
    GPUs the loops: as compiled for an H100, `jax.lax.ragged_dot` multiplies all rows with all
    matrices, in memory that no GPU has (README.md), and our kernels have not run on one.
    """
    backend = targets.platform()
    if backend == "tpu":
        if jax.device_count() > 1 and not jax.sharding.get_abstract_mesh().manual_axes:
            return "ragged"
        dtype = str(jnp.dtype(dtype))
        reason = pallas_tpu.unsupported(dtype, widths, widths[0] if gathers else None)
        return "ragged" if reason else "pallas_tpu"
    return "tiled"


def grouped_matmul(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes_G: jax.Array,
    *,
    rows_M: jax.Array | None = None,
    readers_Tr: jax.Array | None = None,
    expected_rows: int | None = None,
    transpose_rhs: bool = False,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Multiplies consecutive rows with the matrix of their group: out[m] = lhs[m] @ rhs[g(m)].

    The first group_sizes[0] rows belong to group 0, the next group_sizes[1] to group 1, and so on.
    Differentiable in lhs and rhs; the gradient of rhs is accumulated in float32.

    Args:
      lhs: [M, K], float32, bfloat16 or float16; [T, K] with `rows_M`.
      rhs: [G, K, N], or [G, N, K] with `transpose_rhs`; any of those dtypes, cast to lhs's for the
        product, which accumulates in float32.
      group_sizes_G: int32 [G]. Their values are only known while the program runs and are not
        errors: rows past their sum give zeros and get no gradient, whatever stands in them (NaN
        too), groups that reach past M are cut there, and a negative size counts as 0.
      rows_M: int32 [M], each in 0 .. T - 1: row m of the product reads lhs[rows_M[m]]. The gradient
        of a row of lhs is the sum over its readers, added up in float32 in a fixed order.
      readers_Tr: int32 [T, r], `rows_M` the other way round where it is known (`dispatch` of the
        router gives both): which rows read each row of lhs; numbers outside all groups are nobody.
        Its gradient is then added up without a sort. A reader that is missing adds nothing to it.
      expected_rows: how many rows all groups together will have, about, where M is only a bound for
        that (rows from other devices): tiles are chosen, and the cost is declared, for so many.
      preferred_element_type: dtype of the result; lhs's when None.
      implementation: `reference` (G times the work), `tiled` (loops; CPUs and GPUs), `ragged`
        (`jax.lax.ragged_dot`; on CPUs and GPUs G times the work and memory), `pallas_tpu` (float32
        and bfloat16, widths in multiples of 128, of 256 for bfloat16 rows to gather), `pallas_gpu`
        (Hopper; bfloat16 and float16, widths in multiples of 64; never run on a GPU), or None for
        the best one here.
      interpret: for `pallas_tpu` without a TPU and `pallas_gpu` without a GPU: True, or
        `pltpu.InterpretParams` or `plgpu.InterpretGPUParams` to simulate one.

    Returns:
      [M, N].

    Raises:
      ValueError: shapes or dtypes that do not fit, or an implementation that does not exist or
        cannot take them; `pallas_tpu` and `pallas_gpu` without `interpret` in a program that is
        not for TPUs or GPUs.
    """
    op = "grouped_matmul"
    _check_floats(op, lhs=lhs, rhs=rhs)
    _check_rank(op, "lhs", lhs, "[M, K]" if rows_M is None else "[T, K]")
    _check_rank(op, "rhs", rhs, "[G, N, K]" if transpose_rhs else "[G, K, N]")
    contracted = rhs.shape[2 if transpose_rhs else 1]
    if contracted != lhs.shape[1]:
        raise ValueError(
            f"{op}: rhs {rhs.shape} has K = {contracted}, lhs {lhs.shape} has K = {lhs.shape[1]}; "
            "they must be equal"
        )
    _check_groups(op, group_sizes_G, rhs.shape[0], lhs, rows_M, readers_Tr)
    _check_expected(op, expected_rows)
    widths = (contracted, rhs.shape[1 if transpose_rhs else 2])
    implementation = implementation or choose(lhs.dtype, widths, gathers=rows_M is not None)
    return _module(op, implementation).grouped_matmul(
        lhs,
        rhs,
        group_sizes_G,
        rows_M=rows_M,
        readers_Tr=readers_Tr,
        expected_rows=expected_rows,
        transpose_rhs=transpose_rhs,
        preferred_element_type=preferred_element_type,
        **_interpret(op, implementation, interpret),
    )


def grouped_swiglu(
    x_TK: jax.Array,
    gate_up_GCKF: jax.Array,
    group_sizes_G: jax.Array,
    *,
    rows_M: jax.Array | None = None,
    readers_Tr: jax.Array | None = None,
    expected_rows: int | None = None,
    implementation: str | None = None,
    interpret: Any = False,
) -> jax.Array:
    """silu(x @ gate[g]) * (x @ up[g]) for consecutive rows, the first half of an expert.

    Args:
      x_TK: [T, K], float32, bfloat16 or float16.
      gate_up_GCKF: [G, 2, K, F]; index 0 is the gate, 1 is up. Cast to x's dtype.
      group_sizes_G, rows_M, readers_Tr, expected_rows, implementation, interpret: as in
        `grouped_matmul`.

    Returns:
      [M, F] in x's dtype; M is T without `rows_M`. silu and the product with up are float32.

    Raises:
      ValueError: as in `grouped_matmul`.
    """
    op = "grouped_swiglu"
    _check_floats(op, x_TK=x_TK, gate_up_GCKF=gate_up_GCKF)
    _check_rank(op, "x_TK", x_TK, "[T, K]")
    _check_rank(op, "gate_up_GCKF", gate_up_GCKF, "[G, 2, K, F]")
    if gate_up_GCKF.shape[1] != 2 or gate_up_GCKF.shape[2] != x_TK.shape[1]:
        raise ValueError(
            f"{op}: gate_up_GCKF has shape {gate_up_GCKF.shape}, expected "
            f"[G, 2, K, F] with K = {x_TK.shape[1]} as in x_TK {x_TK.shape}"
        )
    _check_groups(op, group_sizes_G, gate_up_GCKF.shape[0], x_TK, rows_M, readers_Tr)
    _check_expected(op, expected_rows)
    widths = (x_TK.shape[1], gate_up_GCKF.shape[3])
    implementation = implementation or choose(x_TK.dtype, widths, gathers=rows_M is not None)
    return _module(op, implementation).grouped_swiglu(
        x_TK,
        gate_up_GCKF,
        group_sizes_G,
        rows_M=rows_M,
        readers_Tr=readers_Tr,
        expected_rows=expected_rows,
        **_interpret(op, implementation, interpret),
    )


def _check_floats(op: str, **arrays: jax.Array) -> None:
    accepted = ("float32", "bfloat16", "float16")
    for name, array in arrays.items():
        if array.dtype not in accepted:
            raise ValueError(
                f"{op}: {name} {array.shape} has dtype {array.dtype}, expected one of {accepted}"
            )


def _check_rank(op: str, name: str, array: jax.Array, expected: str) -> None:
    if array.ndim != expected.count(",") + 1:
        raise ValueError(f"{op}: {name} has shape {array.shape}, expected {expected}")


def _check_groups(op: str, group_sizes_G, groups: int, lhs, rows_M, readers_Tr) -> None:
    if group_sizes_G.shape != (groups,) or group_sizes_G.dtype != jnp.int32:
        raise ValueError(
            f"{op}: group_sizes_G is {group_sizes_G.dtype} {group_sizes_G.shape}, "
            f"expected int32 ({groups},): one size per matrix"
        )
    if rows_M is not None and (rows_M.ndim != 1 or rows_M.dtype != jnp.int32):
        raise ValueError(f"{op}: rows_M is {rows_M.dtype} {rows_M.shape}, expected int32 [M]")
    if rows_M is not None and rows_M.shape[0] and not lhs.shape[0]:
        raise ValueError(f"{op}: rows_M {rows_M.shape} reads from no rows: {lhs.shape}")
    if readers_Tr is None:
        return
    if rows_M is None:
        raise ValueError(f"{op}: readers_Tr goes with rows_M, which is missing")
    if readers_Tr.ndim != 2 or readers_Tr.shape[0] != lhs.shape[0] or readers_Tr.dtype != jnp.int32:
        raise ValueError(
            f"{op}: readers_Tr is {readers_Tr.dtype} {readers_Tr.shape}, "
            f"expected int32 [{lhs.shape[0]}, r]: the readers of each of lhs's rows"
        )


def _check_expected(op: str, expected_rows: int | None) -> None:
    if expected_rows is not None and expected_rows < 1:
        raise ValueError(f"{op}: expected_rows is {expected_rows}, expected at least 1")


def _module(op: str, implementation: str) -> ModuleType:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{op}: unknown implementation {implementation!r}; there are {sorted(IMPLEMENTATIONS)}"
        )
    return IMPLEMENTATIONS[implementation]


def _interpret(op: str, implementation: str, interpret: Any) -> dict[str, Any]:
    if not interpret:
        return {}
    if implementation not in ("pallas_tpu", "pallas_gpu"):
        raise ValueError(
            f"{op}: interpret is for implementations 'pallas_tpu' and 'pallas_gpu', "
            f"not {implementation!r}"
        )
    return {"interpret": interpret}
