"""GKE through xpk: one workload, one pod a host, restarted as a JobSet."""

from olmax.errors import UserError
from olmax.launching.job import Job, Rendered, Step
from olmax.planning.topology import Topology

_BASE_IMAGE = "python:3.12"
_GRACE_SECONDS = 300


def render(
    job: Job,
    topology: Topology,
    *,
    cluster: str | None,
    project: str | None,
    zone: str | None,
    image: str | None,
    spot: bool,
) -> Rendered:
    """The `xpk workload create` of a job.

    Args:
      job: what runs.
      topology: slices it runs on.
      cluster: an xpk cluster with such slices.
      project: Google Cloud project; gcloud's current one when None.
      zone: likewise.
      image: container with olmax and libtpu installed; when None, xpk puts the current directory on
        a Python image and every pod installs it first.
      spot: spot capacity, on clusters that provision nodes themselves.

    Raises:
      UserError: no cluster, or a shape that xpk has no name for.
    """
    if cluster is None:
        raise UserError("runner xpk needs --cluster, the name of your xpk cluster")
    if not topology.standard:
        raise UserError(
            f"runner xpk: {topology.accelerator_type} is not {topology.name}; xpk names slices by "
            "their size and takes the shape nearest to a cube or a square; take that, or "
            "--runner queued-resources"
        )
    where = ["--cluster", cluster]
    where += ["--project", project] if project else []
    where += ["--zone", zone] if zone else []
    environment = "".join(f"{name}={value}\n" for name, value in job.environment.items())
    files = {f"{job.name}.env": environment} if environment else {}
    if image is None:
        source = ["--base-docker-image", _BASE_IMAGE, "--script-dir", "."]
        install = "pip install --quiet --constraint constraints.txt '.[tpu]' && "
    else:
        source, install = ["--docker-image", image], ""
    create = [
        *("xpk", "workload", "create"),
        *("--workload", job.name),
        *where,
        *("--tpu-type", topology.accelerator_type),
        *("--num-slices", str(topology.slices)),
        *source,
        *(["--env-file", job.path(f"{job.name}.env")] if environment else []),
        *(["--spot"] if spot else []),
        *("--max-restarts", str(job.max_restarts)),
        # A crash of one host must bring back all of them, from the last checkpoint.
        "--restart-on-user-code-failure",
        # Time to finish a checkpoint when a node is taken away.
        *("--termination-grace-period-seconds", str(_GRACE_SECONDS)),
        *("--command", f"{install}{job.shell_command}"),
    ]
    return Rendered(
        files,
        (Step("create the workload", tuple(create)),),
        (
            Step("list workloads", ("xpk", "workload", "list", *where)),
            Step("stop it", ("xpk", "workload", "delete", "--workload", job.name, *where)),
        ),
    )
