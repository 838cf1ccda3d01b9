"""Options of the TPU compiler for the train step, and why."""

from jax.sharding import Mesh

from kernels_pallas import targets

_WINDOWED_EINSUM = {
    # With many tokens a device the partitioner cuts products into pieces that wait for a part of
    # the weights each: 3.3 times the estimated cycles for the 1B on v5e:4x4 (docs/performance.md).
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}

# Three quarters of the vector memory, in KiB, by the start of `device_kind`, first match counts.
# The compiler's own limit for one operation is much lower, and products then read their operands
# from HBM again and again; the last quarter is for what the next operation fetches early.
_VMEM_LIMITS = (
    ("TPU v5 lite", 98304),
    ("TPU v5", 49152),
    ("TPU v6", 98304),
)


def compiler_options(mesh: Mesh | None) -> dict[str, str] | None:
    """Options of `jax.jit` for a train step on the mesh's devices; None where they are no TPUs."""
    if targets.platform() != "tpu":
        return None
    options = dict(_WINDOWED_EINSUM)
    if mesh is not None:
        kind = mesh.devices.flat[0].device_kind
        for start, limit in _VMEM_LIMITS:
            if kind.startswith(start):
                options["xla_tpu_scoped_vmem_limit_kib"] = str(limit)
                break
    return options
