"""The verdict in words, and what would fit instead."""

import math

from olmax.planning.topology import Topology

GIB = 2**30


def verdict(
    total: int,
    state: int,
    *,
    fits: bool,
    topology: Topology,
    accumulation: int,
    batch_per_shard: int,
) -> str:
    """One sentence: fits, or by how much not and what would.

    Args:
      total: bytes one device needs.
      state: of these, parameters and optimiser.
      fits: whether the compiler took it.
      topology: what it was compiled for.
      accumulation: micro-batches now.
      batch_per_shard: sequences of one micro-batch on one device.
    """
    limit = topology.chip.hbm_bytes
    if fits:
        return f"fits: {total / GIB:.1f} of {limit / GIB:.1f} GiB a device"
    over = max(total - limit, 0)
    choices = []
    for factor in (2, 4, 8, 16, 32):
        # Activations and workspace shrink with the micro-batch, the state does not.
        if batch_per_shard % factor == 0 and state + (total - state) / factor < 0.95 * limit:
            choices.append(f"--accumulation {accumulation * factor}")
            break
    for doubling in range(1, 6):
        shape = _doubled(topology.shape, doubling)
        if math.prod(shape) > topology.chip.largest_slice:
            break
        if total / 2**doubling < 0.95 * limit:
            choices.append(f"--topology {topology.chip.name}:{'x'.join(map(str, shape))}")
            break
    advice = f"; these would fit by estimate: {', '.join(choices)}" if choices else ""
    need = f"{total / GIB:.1f} of {limit / GIB:.1f} GiB a device"
    return f"does not fit: over by {over / GIB:.1f} GiB ({need}){advice}"


def _doubled(shape: tuple[int, ...], times: int) -> tuple[int, ...]:
    sizes = list(shape)
    for _ in range(times):
        sizes[sizes.index(min(sizes))] *= 2
    return tuple(sorted(sizes))
