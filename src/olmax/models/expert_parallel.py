"""Rows to the devices that hold their experts and back: all-to-all over a mesh axis, nothing
dropped.

Every device sends the rows of each expert to the device that has it, to the place where they belong
among the rows that all devices send to that expert, so that nobody reorders anything. How many
those are is known only when the router has decided, so the places are computed from the exchanged
counts, and the buffer is as large as the worst case, all rows of all devices. What is empty of it
is not cleared (which takes TPUs as long as everything else the experts do), not sent where the
platform has a ragged all-to-all, and multiplied by no expert.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kernels_pallas.xla_cpu import on_cpu
from kernels_pallas.xla_tpu import unwritten


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["sizes_PPE", "from_PPE", "to_PPE", "counts_E"],
    meta_fields=["most", "rows", "rows_back"],
)
@dataclasses.dataclass(frozen=True)
class Exchange:
    """Who sends how many rows to whom, from where, and to which place.

    Indices of the arrays (int32): sender, receiver, expert of the device that has experts.
    """

    sizes_PPE: jax.Array
    """Rows."""
    from_PPE: jax.Array
    """The first of them in the sender's buffer."""
    to_PPE: jax.Array
    """The first of them in the receiver's buffer."""
    most: int
    """Rows from one device to another at most."""
    rows: int
    """Rows of the buffer that receives."""
    rows_back: int
    """Rows of the buffer they came from."""
    counts_E: jax.Array
    """int32: rows of each expert of this device, from all devices."""

    def reversed(self) -> "Exchange":
        """Every row back to where it came from."""
        return dataclasses.replace(
            self,
            sizes_PPE=jnp.swapaxes(self.sizes_PPE, 0, 1),
            from_PPE=jnp.swapaxes(self.to_PPE, 0, 1),
            to_PPE=jnp.swapaxes(self.from_PPE, 0, 1),
            rows=self.rows_back,
            rows_back=self.rows,
        )


def exchange_plan(counts_E: jax.Array, *, rows: int, most: int, axes: tuple[str, ...]) -> Exchange:
    """The exchange of `rows` rows sorted by expert, `counts_E` (int32) of each expert.

    Experts are cut over the mesh axes `axes` in order, and no device gets more than `most` of the
    rows. What a device receives is sorted by expert. Called inside `shard_map`.
    """
    devices = jax.lax.axis_size(axes)
    local = counts_E.shape[0] // devices
    counts_PPE = jax.lax.all_gather(counts_E, axes).reshape(devices, devices, local)
    # A sender's rows lie receiver by receiver, a receiver's expert by expert.
    from_PPE = _starts(counts_PPE.reshape(devices, -1)).reshape(counts_PPE.shape)
    by_expert_PEP = jnp.transpose(counts_PPE, (1, 2, 0))
    to_PEP = _starts(by_expert_PEP.reshape(devices, -1)).reshape(by_expert_PEP.shape)
    mine_PE = jnp.take(counts_PPE, jax.lax.axis_index(axes), axis=1)
    return Exchange(
        sizes_PPE=counts_PPE,
        from_PPE=from_PPE,
        to_PPE=jnp.transpose(to_PEP, (2, 0, 1)),
        most=most,
        rows=devices * most,
        rows_back=rows,
        counts_E=jnp.sum(mine_PE, axis=0),
    )


def _starts(sizes: jax.Array) -> jax.Array:
    return jnp.cumsum(sizes, axis=-1) - sizes


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def exchange(x_MD: jax.Array, plan: Exchange, axes: tuple[str, ...]) -> jax.Array:
    """Sends rows to their places on other devices and returns what arrives here: [rows, D].

    Rows may have several dimensions, and any dtype.

    What arrives stands together at the beginning, and what lies behind it is undefined. The
    gradient is the exchange backwards, so that of rows that are not sent is undefined too.
    """
    me = jax.lax.axis_index(axes)
    shape = plan.rows, *x_MD.shape[1:]
    send_PE, receive_PE = plan.sizes_PPE[me], plan.sizes_PPE[:, me]
    from_PE, there_PE, here_PE = plan.from_PPE[me], plan.to_PPE[me], plan.to_PPE[:, me]

    def ragged(x_MD, from_PE, send_PE, there_PE, receive_PE, here_PE):
        del here_PE
        slices = (a.reshape(-1) for a in (from_PE, send_PE, there_PE, receive_PE))
        output = unwritten(shape, x_MD.dtype, after=x_MD[:1])
        return jax.lax.ragged_all_to_all(x_MD, output, *slices, axis_name=axes)

    def padded(x_MD, from_PE, send_PE, there_PE, receive_PE, here_PE):
        """For CPUs, whose XLA has no ragged all-to-all: all rows to everyone, then picked out."""
        del there_PE
        rows_PM = _places(from_PE, send_PE, plan.most, outside=x_MD.shape[0])
        sent_PMD = jnp.take(x_MD, rows_PM, axis=0, mode="fill", fill_value=0)
        received_PMD = jax.lax.all_to_all(sent_PMD, axes, 0, 0)
        places_PM = _places(here_PE, receive_PE, plan.most, outside=plan.rows)
        return (
            jnp.zeros(shape, x_MD.dtype)
            .at[places_PM.reshape(-1)]
            .set(received_PMD.reshape(-1, *shape[1:]), mode="drop")
        )

    arguments = (x_MD, from_PE, send_PE, there_PE, receive_PE, here_PE)
    return on_cpu(padded, ragged, *arguments)


def _exchange_forward(x_MD, plan, axes):
    return exchange(x_MD, plan, axes), plan


def _exchange_backward(axes, plan, d_RD):
    return exchange(d_RD, plan.reversed(), axes), None


exchange.defvjp(_exchange_forward, _exchange_backward)


def _places(starts_PE: jax.Array, sizes_PE: jax.Array, most: int, outside: int) -> jax.Array:
    """Places of the rows that go to or come from each device, one slice after the other: int32
    [P, most], `outside` behind the last one.
    """
    stops_PE = jnp.cumsum(sizes_PE, axis=1)
    rows_M = jnp.arange(most, dtype=jnp.int32)
    slices_PM = jnp.sum(rows_M[None, :, None] >= stops_PE[:, None], axis=-1)
    inside_PM = slices_PM < sizes_PE.shape[1]
    slices_PM = jnp.minimum(slices_PM, sizes_PE.shape[1] - 1)
    first_PM = jnp.take_along_axis(starts_PE - (stops_PE - sizes_PE), slices_PM, axis=1)
    return jnp.where(inside_PM, first_PM + rows_M, outside)
