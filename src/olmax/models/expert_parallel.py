"""Rows to the devices that hold their experts and back: all-to-all over a mesh axis, nothing
dropped.

Every device sends the rows of each expert to the device that has it. How many those are is known
only when the router has decided, so the places are computed from the exchanged counts, and the
buffer is as large as the worst case, all rows of all devices (what is empty of it is not sent where
the platform has a ragged all-to-all, and no expert multiplies it).
"""

import dataclasses

import jax
import jax.numpy as jnp

from kernels_pallas.xla_cpu import on_cpu


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Who sends how many rows to whom. Device p sends to device q what lies between what it sends
    to q - 1 and to q + 1.
    """

    sizes_PP: jax.Array
    """int32: rows from the first to the second."""
    most: int
    """Rows from one device to another at most."""
    rows: int
    """Rows of the buffer that receives."""
    rows_back: int
    """Rows of the buffer they came from."""
    counts_E: jax.Array
    """int32: rows of each expert of this device, from all devices."""
    by_expert_R: jax.Array
    """Received rows (sorted by sender, then expert) in the order of their experts."""
    by_sender_R: jax.Array
    """The inverse: rows in the order of their experts back in the order they were received."""

    def reversed(self) -> "Exchange":
        """Every row back to where it came from."""
        return dataclasses.replace(
            self, sizes_PP=self.sizes_PP.T, rows=self.rows_back, rows_back=self.rows
        )


def exchange_plan(counts_E: jax.Array, *, rows: int, most: int, axes: tuple[str, ...]) -> Exchange:
    """The exchange of `rows` rows sorted by expert, `counts_E` (int32) of each expert.

    Experts are cut over the mesh axes `axes` in order, and no device gets more than `most` of the
    rows. Called inside `shard_map`.
    """
    devices = jax.lax.axis_size(axes)
    local = counts_E.shape[0] // devices
    counts_PPE = jax.lax.all_gather(counts_E, axes).reshape(devices, devices, local)
    mine_PE = jnp.take(counts_PPE, jax.lax.axis_index(axes), axis=1)
    received = devices * most
    by_sender, by_expert = mine_PE.reshape(-1), mine_PE.T.reshape(-1)
    start_by_sender_PE = _starts(by_sender).reshape(devices, local)
    start_by_expert_EP = _starts(by_expert).reshape(local, devices)
    return Exchange(
        sizes_PP=jnp.sum(counts_PPE, axis=-1),
        most=most,
        rows=received,
        rows_back=rows,
        counts_E=jnp.sum(mine_PE, axis=0),
        by_expert_R=_reordered(by_expert, start_by_sender_PE.T.reshape(-1), received),
        by_sender_R=_reordered(by_sender, start_by_expert_EP.T.reshape(-1), received),
    )


def _starts(sizes: jax.Array) -> jax.Array:
    return jnp.cumsum(sizes) - sizes


def _reordered(sizes: jax.Array, starts: jax.Array, length: int) -> jax.Array:
    """Segments of these sizes one after the other, each read from its place in another order:
    int32 [length], 0 behind the last segment.
    """
    places = jnp.arange(length, dtype=jnp.int32)
    segments = jnp.searchsorted(jnp.cumsum(sizes), places, side="right", method="scan_unrolled")
    inside = segments < sizes.shape[0]
    segments = jnp.minimum(segments, sizes.shape[0] - 1)
    return jnp.where(inside, starts[segments] + places - _starts(sizes)[segments], 0)


def exchange(x_MD: jax.Array, plan: Exchange, axes: tuple[str, ...]) -> jax.Array:
    """Sends rows to their devices and returns the received ones, sorted by sender: [rows, D].

    What lies behind the last received row is zero.
    """
    me = jax.lax.axis_index(axes)
    sizes_PP = plan.sizes_PP.astype(jnp.int32)
    send_P, receive_P = sizes_PP[me], sizes_PP[:, me]
    # Where what this device sends begins at each receiver.
    there_P = (jnp.cumsum(sizes_PP, axis=0) - sizes_PP)[me]
    output = jnp.zeros((plan.rows, x_MD.shape[1]), x_MD.dtype)
    arguments = (x_MD, output, _starts(send_P), send_P, there_P, receive_P)

    def ragged(x_MD, output, *places):
        return jax.lax.ragged_all_to_all(x_MD, output, *places, axis_name=axes)

    def padded(x_MD, output, starts_P, send_P, there_P, receive_P):
        """For CPUs, whose XLA has no ragged all-to-all: all rows to everyone, then picked out."""
        del there_P
        within = jnp.arange(plan.most)
        rows_PM = jnp.where(within < send_P[:, None], starts_P[:, None] + within, x_MD.shape[0])
        sent_PMD = jnp.take(x_MD, rows_PM, axis=0, mode="fill", fill_value=0)
        received_PMD = jax.lax.all_to_all(sent_PMD, axes, 0, 0)
        begins_P = _starts(receive_P)
        places_PM = jnp.where(
            within < receive_P[:, None], begins_P[:, None] + within, output.shape[0]
        )
        return output.at[places_PM.reshape(-1)].add(
            received_PMD.reshape(-1, x_MD.shape[1]), mode="drop"
        )

    return on_cpu(padded, ragged, *arguments)
