"""Multi-host start.

`initialize()` is called once, before anything touches a device, by every command that computes. It
does nothing for a single process, so the same command runs on a laptop and on each host of a pod.
"""

import dataclasses
import glob
import os
from collections.abc import Mapping

from olmax.errors import UserError

_PLAIN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """How the processes of a job find each other.

    `kind` is `environment` (address, count and id below), or a detection method of jax: `slurm`,
    `gketpu`, `gcetpu`.
    """

    kind: str
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def detect(environ: Mapping[str, str], *, tpu_attached: bool = False) -> Cluster | None:
    """The cluster described by `environ`, or None for a single process.

    In this order: plain variables (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID),
    a Slurm step with more than one task, a GKE TPU slice (TPU_WORKER_HOSTNAMES with several hosts,
    or several slices), a TPU VM.

    Raises:
      UserError: the plain variables are incomplete or no integers.
    """
    given = [name for name in _PLAIN if environ.get(name)]
    # The address alone is jax's own override for clusters it detects.
    if set(given) - {"JAX_COORDINATOR_ADDRESS"}:
        missing = sorted(set(_PLAIN) - set(given))
        if missing:
            raise UserError(
                f"multi-process start: {', '.join(given)} set but not {', '.join(missing)}"
            )
        try:
            count, index = int(environ["JAX_NUM_PROCESSES"]), int(environ["JAX_PROCESS_ID"])
        except ValueError:
            raise UserError(
                "multi-process start: JAX_NUM_PROCESSES and JAX_PROCESS_ID must be integers"
            ) from None
        if not 0 <= index < count:
            raise UserError(f"multi-process start: JAX_PROCESS_ID={index} is not in 0..{count - 1}")
        return (
            Cluster("environment", environ["JAX_COORDINATOR_ADDRESS"], count, index)
            if count > 1
            else None
        )
    if all(name in environ for name in _SLURM):
        return Cluster("slurm") if int(environ["SLURM_NTASKS"]) > 1 else None
    if tpu_attached:
        hosts = [host for host in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
        several_slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1) > 1
        if hosts:
            return Cluster("gketpu") if len(hosts) > 1 or several_slices else None
        if "TPU_SKIP_MDS_QUERY" not in environ:
            return Cluster("gcetpu")
    return None


def tpu_attached() -> bool:
    """Whether TPU chips are visible to this host (no library is loaded to find out)."""
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def initialize() -> Cluster | None:
    """Joins this process to its job, if there is one. Safe to call again.

    Raises:
      UserError: the environment describes a job that cannot be joined.
    """
    import jax

    if jax.distributed.is_initialized():
        return None
    cluster = detect(os.environ, tpu_attached=tpu_attached() and _tpu_wanted())
    if cluster is None:
        return None
    try:
        if cluster.kind == "environment":
            jax.distributed.initialize(
                cluster.coordinator_address, cluster.num_processes, cluster.process_id
            )
        else:
            jax.distributed.initialize(cluster_detection_method=cluster.kind)
    except (RuntimeError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(f"multi-process start by {cluster.kind} failed: {first_line}") from error
    return cluster


def _tpu_wanted() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return not platforms or "tpu" in platforms
