"""TPU VMs through Google Cloud's queued resources: a startup script on every host."""

import shlex

from olmax.errors import UserError
from olmax.launching.job import Job, Rendered, Step
from olmax.planning.topology import Topology

_RUNTIMES = {"v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}


def render(
    job: Job,
    topology: Topology,
    *,
    project: str | None,
    zone: str | None,
    service_account: str | None,
    network: str | None,
    spot: bool,
) -> Rendered:
    """A queued resource whose hosts fetch the committed source and run the job at every boot.

    Args:
      job: what runs; needs a bucket, through which the source reaches the hosts.
      topology: slices it runs on.
      project: Google Cloud project.
      zone: where the quota is.
      service_account: of the hosts, with access to the bucket; the project's default when None.
      network: VPC network; the default one when None.
      spot: preemptible capacity, which a second script requests again when it is taken away.

    Raises:
      UserError: project, zone or bucket missing.
    """
    if project is None or zone is None:
        raise UserError("runner queued-resources needs --project and --zone")
    if job.folder is None:
        raise UserError("runner queued-resources needs --bucket gs://..., for the source")
    startup, watch, archive = f"{job.name}-startup.sh", f"{job.name}-watch.sh", f"{job.name}.tar.gz"
    where = ("--project", project, "--zone", zone)
    queue = ("gcloud", "compute", "tpus", "queued-resources")
    if topology.slices > 1:
        nodes = ("--node-count", str(topology.slices), "--node-prefix", job.name)
    else:
        nodes = ("--node-id", job.name)
    create = (
        *(*queue, "create", job.name),
        *where,
        *nodes,
        *_hardware(topology),
        *("--runtime-version", _RUNTIMES[topology.chip.name]),
        *(("--service-account", service_account) if service_account else ()),
        *(("--network", network) if network else ()),
        *(("--spot",) if spot else ()),
        *("--metadata-from-file", f"startup-script={job.path(startup)}"),
    )
    request = Step("request the slices", create)
    remove = Step(
        "give everything back",
        (*queue, "delete", job.name, *where, "--force", "--quiet"),
    )
    node = f"{job.name}-0" if topology.slices > 1 else job.name
    files = {startup: _startup(job, archive)}
    if spot:
        files[watch] = _watch(job, where, request, remove)
    upload = ("gcloud", "storage", "cp", job.path(archive), f"{job.folder}/source.tar.gz")
    again = Step("request again after every preemption", ("bash", job.path(watch)))
    return Rendered(
        files,
        (
            Step(
                "pack the committed source",
                ("git", "archive", "--format", "tar.gz", "--output", job.path(archive), "HEAD"),
            ),
            Step("upload it", upload),
            again if spot else request,
        ),
        (
            Step(
                "see its state",
                (*queue, "describe", job.name, *where),
            ),
            Step(
                "read the first host's log",
                (
                    *("gcloud", "compute", "tpus", "tpu-vm", "ssh", node, *where),
                    *("--worker", "0", "--command", f"sudo tail -f /var/log/{job.name}.log"),
                ),
            ),
            remove,
        ),
    )


def _hardware(topology: Topology) -> tuple[str, ...]:
    if topology.standard:
        return ("--accelerator-type", topology.accelerator_type)
    shape = "x".join(map(str, topology.shape))
    return ("--type", topology.chip.accelerator, "--topology", shape)


def _startup(job: Job, archive: str) -> str:
    exports = "".join(
        f"export {name}={shlex.quote(value)}\n" for name, value in job.environment.items()
    )
    return f"""#!/bin/bash
# Runs as root on every host of every slice, at every boot: one process a host.
set -euo pipefail
exec >>/var/log/{job.name}.log 2>&1

export HOME=/root
mkdir -p /opt/{job.name}
cd /opt/{job.name}
if [ ! -e installed ]; then
  gcloud storage cp {job.folder}/source.tar.gz {archive}
  tar xzf {archive}
  # The image's own Python is older than what olmax needs.
  curl -LsSf https://astral.sh/uv/install.sh | sh
  "$HOME"/.local/bin/uv venv --python 3.12 .venv
  "$HOME"/.local/bin/uv pip install --python .venv/bin/python --constraint constraints.txt '.[tpu]'
  touch installed
fi
export PATH=/opt/{job.name}/.venv/bin:$PATH
{exports}
for attempt in $(seq 0 {job.max_restarts}); do
  echo "attempt $attempt, $(date -u +%FT%TZ)"
  if {job.shell_command}; then
    echo done
    exit 0
  fi
  # All hosts must be gone before any of them can start anew.
  sleep 30
done
echo "gave up after {job.max_restarts} restarts"
exit 1
"""


def _watch(job: Job, where: tuple[str, ...], request: Step, remove: Step) -> str:
    queue = ("gcloud", "compute", "tpus", "queued-resources")
    describe = shlex.join((*queue, "describe", job.name, *where, "--format", "value(state.state)"))
    return f"""#!/bin/bash
# Keeps the request alive: spot capacity that was taken away is requested again.
# Runs on your machine until you stop it (Ctrl-C), up to {job.max_restarts} new requests.
set -uo pipefail

request() {{
  {request.text.replace(chr(10), chr(10) + "  ")}
}}

request || exit 1
renewed=0
while sleep 60; do
  state=$({describe})
  echo "$(date -u +%FT%TZ) $state"
  case "$state" in
    SUSPENDED | FAILED)
      if [ "$renewed" -ge {job.max_restarts} ]; then
        echo "gave up after {job.max_restarts} new requests"
        exit 1
      fi
      renewed=$((renewed + 1))
      {remove.text.replace(chr(10), chr(10) + "      ")}
      request
      ;;
  esac
done
"""
