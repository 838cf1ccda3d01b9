"""Options of the TPU compiler for the train step, and why."""

from jax.sharding import Mesh

from kernels_pallas import targets
from olmax import sharding

_WINDOWED_EINSUM = {
    # With many tokens a device the partitioner cuts products into pieces that wait for a part of
    # the weights each: 3.3 times the estimated cycles for the 1B on v5e:4x4 (docs/performance.md).
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}

# Vector memory for one operation in KiB, with few and with many tokens a device, by the start of
# `device_kind`; first match counts. A core has 128 MiB, v5p 64. The compiler's own limit is much
# lower, and products then read their operands from HBM again and again. What operations do not get
# holds whole operands of the next ones, which few tokens fit into and many do not. Where it makes
# less than 1% of the cycles, the smaller one is here, which compiles sooner (docs/performance.md).
_VMEM_LIMITS = (
    ("TPU v5 lite", 32768, 49152),
    ("TPU v5", 49152, 49152),
    ("TPU v6", 49152, 98304),
)
_FEW_TOKENS = 4096


def compiler_options(mesh: Mesh | None, tokens: int) -> dict[str, str] | None:
    """Options of `jax.jit` for a train step on the mesh's devices; None where they are no TPUs.

    Args:
      mesh: None: one device, of which nothing is known.
      tokens: in one forward and backward pass, over all devices.
    """
    if targets.platform() != "tpu":
        return None
    options = dict(_WINDOWED_EINSUM)
    if mesh is not None:
        kind = mesh.devices.flat[0].device_kind
        local = tokens / sharding.batch_shards(mesh) / mesh.shape["context"]
        for start, few, many in _VMEM_LIMITS:
            if kind.startswith(start):
                limit = few if local <= _FEW_TOKENS else many
                options["xla_tpu_scoped_vmem_limit_kib"] = str(limit)
                break
    return options
