"""Slurm: one batch script, one task a node, requeued after preemption."""

import shlex

from olmax.errors import UserError
from olmax.launching.job import Job, Rendered, Step

_SIGNAL_SECONDS = 120


def render(
    job: Job,
    hosts: int,
    *,
    partition: str | None,
    account: str | None,
    time_limit: str | None,
    gpus_per_host: int,
) -> Rendered:
    """The batch script of a job and its `sbatch`.

    Args:
      job: what runs.
      hosts: nodes.
      partition: Slurm's default when None.
      account: likewise.
      time_limit: such as 24:00:00; the partition's when None.
      gpus_per_host: 0 for nodes with other accelerators, or none.

    Raises:
      UserError: not at least one host.
    """
    if hosts < 1:
        raise UserError(f"hosts must be at least 1, is {hosts}")
    options = [
        ("job-name", job.name),
        ("nodes", hosts),
        ("ntasks-per-node", 1),
        ("gpus-per-node", gpus_per_host or None),
        ("exclusive", ""),
        ("partition", partition),
        ("account", account),
        ("time", time_limit),
        ("requeue", ""),
        # The trainer writes a checkpoint when it gets this, before the time is up.
        ("signal", f"TERM@{_SIGNAL_SECONDS}"),
        ("open-mode", "append"),
        ("output", f"{job.name}-%j.log"),
    ]
    header = "".join(
        f"#SBATCH --{name}\n" if value == "" else f"#SBATCH --{name}={value}\n"
        for name, value in options
        if value is not None
    )
    exports = "".join(
        f"export {name}={shlex.quote(value)}\n" for name, value in job.environment.items()
    )
    script = f"""#!/bin/bash
{header}
# The processes find each other through the variables that Slurm sets for every task.
{exports}if srun --kill-on-bad-exit=1 {job.shell_command}; then
  exit 0
fi
# Preempted jobs are requeued by Slurm; failed ones here, a limited number of times.
if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.max_restarts} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit 1
"""
    file = f"{job.name}.sbatch"
    return Rendered(
        {file: script},
        (Step("submit it", ("sbatch", job.path(file))),),
        (
            Step("see its state", ("squeue", "--name", job.name)),
            Step("stop it", ("scancel", "--name", job.name)),
        ),
    )
