"""One product of matrices after another on Hopper's tensor cores: what our kernels for GPUs share.

A block stays on its multiprocessor and takes every n-th item of a list of output tiles. It has
three warp groups. The last one copies pieces of both operands, `DEPTH` of the contracted axis at a
time, into a ring of slots in shared memory (TMA); the first two multiply them (wgmma), each for
half of the tile's rows, and finish the tile. The ring runs on from one item to the next: while a
tile is finished, the pieces of the next one are coming.

Written for compute capability 9.0 with jax's Mosaic GPU dialect of Pallas; interpreted on CPUs,
compiled for an H100 without one (`kernels_pallas.gpu_compiler`), never run on one.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import targets

DEPTH = 64
"""Of the contracted axis, in one slot: 128 bytes, the widest swizzle of shared memory."""
GRANULE = 8
"""Rows that are swizzled together; copies by TMA begin at multiples, in arrays of multiples."""
WORKERS = 2
"""Warp groups that multiply."""
DTYPES = ("bfloat16", "float16")
"""Of the operands; products accumulate in float32."""
H100_MULTIPROCESSORS = 132
_CAPABILITY = "9.0"


def check(op: str, interpret: Any) -> None:
    """Raises a ValueError where a kernel is neither compiled for a Hopper GPU nor interpreted."""
    targets.check_gpu(op, interpret)
    if interpret or jax.default_backend() != "gpu":
        return
    found = jax.devices()[0].compute_capability
    if found != _CAPABILITY:
        raise ValueError(
            f"{op}: implementation 'pallas_gpu' is for GPUs of compute capability {_CAPABILITY} "
            f"(Hopper), this one has {found}; leave the implementation out"
        )


@dataclasses.dataclass(frozen=True)
class Tile:
    """Size of an output tile, and slots of the ring."""

    rows: int
    columns: int
    slots: int = 4

    @property
    def worker_rows(self) -> int:
        return self.rows // WORKERS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ring:
    """Slots in shared memory with the pieces of both operands, and their barriers."""

    a: Any
    b: Any
    full: Any
    empty: Any


def ring(tile: Tile, a_piece: tuple[int, int], b_piece: tuple[int, int], dtype: Any) -> Ring:
    """What to allocate for a ring whose slots have pieces of these shapes."""
    return Ring(
        a=plgpu.SMEM((tile.slots, *a_piece), dtype),
        b=plgpu.SMEM((tile.slots, *b_piece), dtype),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=tile.slots),
        empty=plgpu.Barrier(num_arrivals=WORKERS, num_barriers=tile.slots),
    )


def worker() -> jax.Array:
    """Number of this warp group among those that multiply."""
    return lax.axis_index("group")


def worker_slice(size: int) -> Any:
    """This worker's share of `size` rows or columns."""
    share = size // WORKERS
    return pl.ds(pl.multiple_of(worker() * share, share), share)


def products(
    memory: Ring,
    tile: Tile,
    items: Sequence[int],
    *,
    begin: Callable[[tuple[jax.Array, ...]], tuple[Any, jax.Array]],
    copy: Callable[[Any, jax.Array], tuple[Any, Any]],
    factors: Callable[[Any, Any], tuple[Any, Any]],
    finish: Callable[[Any, jax.Array], None],
    prepare: Callable[[Any, jax.Array, Any, Any], None] | None = None,
) -> None:
    """Runs all of a block's items; called in the body of `kernel`.

    Args:
      memory: the ring.
      tile: of the output.
      items: sizes of the axes of the list of items, which is walked through in row-major order.
      begin: from an item's indices what the other functions need of it, and its number of steps
        along the contracted axis (int32, 0 is allowed).
      copy: from that and a step the two pieces in global memory; past the ends they read zeros.
      factors: from the two pieces in shared memory what this worker multiplies.
      finish: gets the worker's part of the product, float32 [tile.rows / 2, tile.columns].
      prepare: may change the two pieces in shared memory before they are multiplied.
    """
    slots = jnp.int32(tile.slots)

    def every_item(run: Callable[[Any, jax.Array, jax.Array], jax.Array]) -> None:
        @plgpu.nd_loop(tuple(items), collective_axes="block", init_carry=jnp.int32(0))
        def _(info, carry):
            item, steps = begin(info.index)
            return run(item, steps, carry)

    @pl.when(worker() == WORKERS)
    def _():
        plgpu.set_max_registers(40, action="decrease")

        def fetch(item, steps, count):
            def step(number, count):
                slot = lax.rem(count, slots)

                @pl.when(count >= slots)
                def _():
                    plgpu.barrier_wait(memory.empty.at[slot])

                for source, place in zip(copy(item, number), (memory.a, memory.b), strict=True):
                    plgpu.copy_gmem_to_smem(source, place.at[slot], memory.full.at[slot])
                return count + 1

            return lax.fori_loop(0, steps, step, count)

        every_item(fetch)

    @pl.when(worker() < WORKERS)
    def _():
        plgpu.set_max_registers(232, action="increase")

        def multiply(item, steps, count):
            def release(count):
                plgpu.barrier_arrive(memory.empty.at[lax.rem(count + slots - 1, slots)])

            def accumulate(sums):
                def step(number, count):
                    slot = lax.rem(count, slots)
                    plgpu.barrier_wait(memory.full.at[slot])
                    a, b = memory.a.at[slot], memory.b.at[slot]
                    if prepare is not None:
                        prepare(item, number, a, b)
                    plgpu.wgmma(sums, *factors(a, b))
                    # The product before this one has ended, so its slot may be filled again.
                    plgpu.wgmma_wait(1)
                    pl.when(number > 0)(lambda: release(count))
                    return count + 1

                last = lax.fori_loop(0, steps, step, count)
                plgpu.wgmma_wait(0)
                pl.when(steps > 0)(lambda: release(last))
                return sums[...], last

            shape = (tile.worker_rows, tile.columns)
            sums, count = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
            finish(item, sums)
            return count

        every_item(multiply)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def staging(dtype: Any) -> Any:
    """Shared memory through which `store` goes: two pieces for each worker."""
    return plgpu.SMEM((WORKERS, 2, 64, 128 // jnp.dtype(dtype).itemsize), dtype)


def store(values: jax.Array, stage: Any, send: Callable[[Any, int, int], None]) -> None:
    """Sends a worker's part of a tile to global memory by TMA, in pieces of 64 rows.

    Args:
      values: [64 n, columns], in the dtype of `stage`.
      stage: what `staging` allocated.
      send: starts the copies of a piece in shared memory, whose first row and column in `values` it
        gets, by `copy`.
    """
    _, _, height, width = stage.shape
    place = 0
    for row in range(0, values.shape[0], height):
        for column in range(0, values.shape[1], width):
            piece = stage.at[worker(), place]
            place = 1 - place
            # The copies of the piece that was here have read it, those of the last one may not.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            piece[...] = values[row : row + height, column : column + width]
            plgpu.commit_smem()
            send(piece, row, column)
            plgpu.commit_smem_to_gmem_group()


def copy(piece: Any, place: Any) -> None:
    """Starts a copy from shared to global memory, one of those that are waited for together."""
    plgpu.copy_smem_to_gmem(piece, place, commit_group=False)


def kernel(
    body: Callable[..., None],
    *,
    name: str,
    items: int,
    out_type: Any,
    scratch: Sequence[Any],
    cost: pl.CostEstimate,
    interpret: Any,
) -> Callable[..., Any]:
    """The kernel whose body calls `products`, as a function of arrays.

    Args:
      body: gets inputs, outputs and scratch, as references.
      name: of the kernel in profiles and dumps.
      items: length of the list; as many blocks share it as there are multiprocessors.
      out_type: shapes and dtypes of the results.
      scratch: what to allocate in shared memory.
      cost: declared to XLA, which cannot look inside.
      interpret: False, True, or `plgpu.InterpretGPUParams` to simulate a GPU on CPUs.
    """
    if interpret is True:
        interpret = plgpu.InterpretGPUParams()
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(min(items, multiprocessors()),),
        grid_names=("block",),
        num_threads=WORKERS + 1,
        thread_name="group",
        kernel_name=name,
        cost_estimate=cost,
        interpret=interpret or None,
    )


def multiprocessors() -> int:
    """Of the GPU that is compiled for: this machine's, or else an H100's."""
    if jax.default_backend() == "gpu":
        return jax.devices()[0].core_count
    return H100_MULTIPROCESSORS
