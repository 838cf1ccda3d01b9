"""Our Pallas kernels for TPUs: routing in one pass over the logits, and the weighted sum of a
token's rows, gathered by DMA.

The derivatives are XLA's (`gradients`): elementwise over [T, E], and gathers of rows. Letter B:
tokens of a block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import targets
from kernels_pallas.router import gradients
from kernels_pallas.router.routing import Routing, place_padding
from kernels_pallas.row_gather import Gather, gather_inputs, pack, unpack

ROUTE_BLOCK = 256
COMBINE_ROWS = 512
"""Rows gathered in a step of `combine`, about."""
LANES = 128
DTYPES = ("float32", "bfloat16")


def route(
    logits_TE: jax.Array, k: int, valid_T: jax.Array | None, *, interpret: Any = False
) -> Routing:
    """See `kernels_pallas.router.route`."""
    targets.check_tpu("route", interpret)
    if not logits_TE.shape[0] or logits_TE.dtype not in DTYPES:
        raise ValueError(
            f"route: implementation 'pallas_tpu' takes at least one token, one of {DTYPES}; "
            f"logits_TE is {logits_TE.dtype} {logits_TE.shape}"
        )
    return gradients.route(functools.partial(_route, interpret), logits_TE, k, valid_T)


def combine(
    y_MD: jax.Array, destinations_Tk: jax.Array, weights_Tk: jax.Array, *, interpret: Any = False
) -> jax.Array:
    """See `kernels_pallas.router.combine`."""
    targets.check_tpu("combine", interpret)
    lanes = LANES if y_MD.dtype == jnp.float32 else 2 * LANES
    empty = not y_MD.size or not destinations_Tk.size
    if empty or y_MD.dtype not in DTYPES or y_MD.shape[1] % lanes:
        raise ValueError(
            f"combine: implementation 'pallas_tpu' takes rows of {DTYPES} with a width in "
            f"multiples of {LANES} (bfloat16: {2 * LANES}) for at least one token; "
            f"y_MD is {y_MD.dtype} {y_MD.shape}"
        )
    forward = functools.partial(_combine, interpret)
    return gradients.combine(forward, y_MD, destinations_Tk, weights_Tk)


def _route(interpret, logits_TE, k: int, valid_T) -> Routing:
    tokens, experts = logits_TE.shape
    block = min(ROUTE_BLOCK, -(-tokens // 16) * 16)
    valid_T1 = jnp.ones((tokens, 1), jnp.int32) if valid_T is None else valid_T[:, None]

    def tokens_spec(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((block, width), lambda i: (i, 0))

    def whole_spec(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, width), lambda i: (0, 0))

    slots = jax.ShapeDtypeStruct((tokens, k), jnp.int32)
    sums = jax.ShapeDtypeStruct((1, experts), jnp.float32)
    weights_Tk, experts_Tk, positions_Tk, counts_1E, sum_1E, squares_11 = pl.pallas_call(
        functools.partial(_route_kernel, tokens=tokens, k=k),
        grid=(-(-tokens // block),),
        in_specs=[tokens_spec(experts), tokens_spec(1)],
        out_specs=[*[tokens_spec(k)] * 3, whole_spec(experts), whole_spec(experts), whole_spec(1)],
        out_shape=[
            jax.ShapeDtypeStruct((tokens, k), jnp.float32),
            slots,
            slots,
            sums,
            sums,
            jax.ShapeDtypeStruct((1, 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * block * experts,
            bytes_accessed=tokens * (experts * logits_TE.dtype.itemsize + 12 * k),
            transcendentals=tokens * experts,
        ),
        interpret=interpret,
        name="route",
    )(logits_TE, valid_T1.astype(jnp.int32))
    weights_Tk, experts_Tk, positions_Tk = place_padding(
        weights_Tk, experts_Tk, positions_Tk, valid_T, experts
    )
    return Routing(
        weights_Tk=weights_Tk,
        experts_Tk=experts_Tk,
        positions_Tk=positions_Tk,
        counts_E=counts_1E[0].astype(jnp.int32),
        probability_sum_E=sum_1E[0],
        squared_logsumexp_sum=squares_11[0, 0],
    )


def _route_kernel(
    logits_BE,
    valid_B1,
    weights_Bk,
    experts_Bk,
    positions_Bk,
    counts_1E,
    sum_1E,
    squares_11,
    *,
    tokens: int,
    k: int,
):
    step = pl.program_id(0)
    block, experts = logits_BE.shape

    @pl.when(step == 0)
    def _():
        for ref in (counts_1E, sum_1E, squares_11):
            ref[...] = jnp.zeros_like(ref)

    token_B1 = step * block + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0)
    counts_B1 = (token_B1 < tokens) & (valid_B1[...] != 0)
    # What stands behind the last token must not meet an addition.
    values_BE = jnp.where(counts_B1, logits_BE[...].astype(jnp.float32), 0.0)
    top_B1 = jnp.max(values_BE, axis=1, keepdims=True)
    powers_BE = jnp.exp(values_BE - top_B1)
    total_B1 = jnp.sum(powers_BE, axis=1, keepdims=True)
    lse_B1 = top_B1 + jnp.log(total_B1)
    probabilities_BE = jnp.where(counts_B1, powers_BE / total_B1, 0.0)
    sum_1E[...] += jnp.sum(probabilities_BE, axis=0, keepdims=True)
    squares_B1 = jnp.where(counts_B1, lse_B1 * lse_B1, 0.0)
    squares_11[...] += jnp.sum(squares_B1, axis=0, keepdims=True)

    expert_BE = jax.lax.broadcasted_iota(jnp.int32, (block, experts), 1)
    slot_Bk = jax.lax.broadcasted_iota(jnp.int32, (block, k), 1)
    chosen_BE = jnp.zeros((block, experts), jnp.float32)
    weights, choices = jnp.zeros((block, k), jnp.float32), jnp.zeros((block, k), jnp.int32)
    picks = []
    for slot in range(k):
        left_BE = jnp.where(chosen_BE > 0, -jnp.inf, values_BE)
        best_B1 = jnp.max(left_BE, axis=1, keepdims=True)
        # An expert of logit -inf can be chosen, but not twice.
        best_BE = (left_BE == best_B1) & (chosen_BE == 0)
        pick_B1 = jnp.min(jnp.where(best_BE, expert_BE, experts), axis=1, keepdims=True)
        chosen_BE = jnp.where(expert_BE == pick_B1, 1.0, chosen_BE)
        weights = jnp.where(slot_Bk == slot, jnp.exp(best_B1 - lse_B1), weights)
        choices = jnp.where(slot_Bk == slot, pick_B1, choices)
        picks.append(pick_B1)
    weights_Bk[...] = weights
    experts_Bk[...] = choices

    chosen_BE = jnp.where(counts_B1, chosen_BE, 0.0)
    row_BB, column_BB = (
        jax.lax.broadcasted_iota(jnp.int32, (block, block), axis) for axis in (0, 1)
    )
    # One pass of the matrix unit rounds to bfloat16, in which ones and zeros are exact.
    before_BE = counts_1E[...] + jnp.dot((column_BB < row_BB).astype(jnp.float32), chosen_BE)
    counts_1E[...] += jnp.sum(chosen_BE, axis=0, keepdims=True)
    positions = jnp.zeros((block, k), jnp.int32)
    for slot, pick_B1 in enumerate(picks):
        before_B1 = jnp.sum(jnp.where(expert_BE == pick_B1, before_BE, 0.0), axis=1, keepdims=True)
        positions = jnp.where(slot_Bk == slot, before_B1.astype(jnp.int32), positions)
    positions_Bk[...] = positions


def _combine(interpret, y_MD, destinations_Tk, weights_Tk) -> jax.Array:
    (rows, width), (tokens, k) = y_MD.shape, destinations_Tk.shape
    block = max(16, COMBINE_ROWS // k // 16 * 16)
    block = min(block, -(-tokens // 16) * 16)
    blocks = -(-tokens // block)
    # A row that does not exist weighs nothing, and what stands in its place is not read.
    weights_Tk = jnp.where(destinations_Tk < rows, weights_Tk.astype(jnp.float32), 0)
    padded_tBk = jnp.pad(destinations_Tk, ((0, blocks * block - tokens), (0, 0)))
    rows_tkB = jnp.swapaxes(padded_tBk.reshape(blocks, block, k), 1, 2)
    gather = gather_inputs(pack(y_MD), rows_tkB.reshape(blocks, 1, k * block), lambda i: i)
    return pl.pallas_call(
        functools.partial(_combine_kernel, dtype=y_MD.dtype),
        grid=(blocks,),
        in_specs=[
            pl.BlockSpec((block, k), lambda i: (i, 0)),
            *[spec for _, spec in gather.inputs],
        ],
        out_specs=pl.BlockSpec((block, width), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((tokens, width), y_MD.dtype),
        scratch_shapes=gather.scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=32 * 2**20,
            disable_bounds_checks=True,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * k * width,
            bytes_accessed=tokens * (k + 1) * width * y_MD.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="combine",
    )(weights_Tk, *[array for array, _ in gather.inputs])


def _combine_kernel(weights_Bk, source, rows, next_rows, out_BD, slots, semaphores, *, dtype):
    step = pl.program_id(0)
    gather = Gather(source, rows, next_rows, slots, semaphores)
    (block, k), width = weights_Bk.shape, out_BD.shape[1]
    slot = step % 2
    pl.when(step == 0)(lambda: gather.start_all(rows, slot))
    pl.when(step + 1 < pl.num_programs(0))(lambda: gather.start_all(next_rows, 1 - slot))
    gather.wait(slot)
    weights = [weights_Bk[:, pl.ds(j, 1)] for j in range(k)]
    for column in range(0, slots.shape[2], LANES):
        totals: list[Any] = []
        for j, weight_B1 in enumerate(weights):
            words = slots[slot, pl.ds(j * block, block), pl.ds(column, LANES)]
            for half, values in enumerate(unpack(words, jnp.float32)):
                term = jnp.where(weight_B1 == 0, 0.0, weight_B1 * values)
                if j:
                    totals[half] += term
                else:
                    totals.append(term)
        for half, total in enumerate(totals):
            place = column + half * (width // 2)
            out_BD[:, pl.ds(place, LANES)] = total.astype(dtype)
