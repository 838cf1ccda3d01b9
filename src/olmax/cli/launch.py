"""`olmax launch`: a command on every host of TPU slices or of a cluster."""

import dataclasses
import os
from typing import Any, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Launch:
    """Write and show what runs a command on every host: exact commands, scripts, environment.

    First the plan's verdict is checked: the command's own configuration is planned for the
    topology, or --plan names a plan already made. Nothing is sent anywhere without --yes; the
    runner `local` starts its processes here at once.

    In the command, {checkpoints} stands for the job's folder in the bucket.

    Example: olmax launch --topology v5p:8x8x8 --runner xpk --cluster my-pods --bucket gs://mine --
    python -m experiments.olmo2 pretrain --preset olmo2-7b --pretrain.checkpoint.directory
    {checkpoints}
    """

    command: tyro.conf.Positional[tuple[str, ...]]
    """What to run, after `--`."""
    runner: Literal["xpk", "queued-resources", "slurm", "local"]
    """xpk: Google Kubernetes Engine. queued-resources: TPU VMs. slurm. local: this machine."""
    topology: str | None = None
    """Chip and shape of a slice, such as v5p:8x8x8 (xpk, queued-resources)."""
    slices: int = 1
    """Slices of this topology."""
    name: str = "olmax"
    """Of the job and its cloud resources."""
    plan: str | None = None
    """plan.json whose verdict counts, instead of a quick plan made now."""
    check: bool = True
    """Check that the training fits (--no-check leaves it out)."""
    bucket: str | None = None
    """gs://... for checkpoints, and for the source with queued-resources."""
    env: tuple[str, ...] = ()
    """NAME=value for every process."""
    max_restarts: int = 10
    """After preemptions and failures."""
    output: str = "launch"
    """Directory for scripts and manifests."""
    yes: bool = False
    """Run the commands with the tools installed here."""
    project: str | None = None
    """Google Cloud project."""
    zone: str | None = None
    """Google Cloud zone."""
    cluster: str | None = None
    """xpk: name of the cluster."""
    image: str | None = None
    """xpk: container image with olmax[tpu]; without, every pod installs this directory."""
    spot: bool = False
    """xpk, queued-resources: preemptible capacity."""
    service_account: str | None = None
    """queued-resources: of the hosts."""
    network: str | None = None
    """queued-resources: VPC network."""
    hosts: int | None = None
    """slurm, local: nodes or processes; those of the topology when left out."""
    partition: str | None = None
    """slurm."""
    account: str | None = None
    """slurm."""
    time_limit: str | None = None
    """slurm: such as 24:00:00."""
    gpus_per_host: int = 0
    """slurm: GPUs of a node."""

    def run(self) -> None:
        """Checks, writes the files, shows and perhaps runs the commands.

        Raises:
          UserError: bad input, a plan that does not fit, a tool that is missing or fails.
        """
        from olmax.errors import UserError
        from olmax.launching import local
        from olmax.launching.job import Job, parse_environment
        from olmax.planning.topology import Topology

        job = Job(
            self.name,
            self.command,
            parse_environment(self.env),
            self.bucket,
            self.max_restarts,
            self.output,
        )
        topology = None
        if self.topology is not None:
            topology = Topology.parse(self.topology, self.slices)
        elif self.runner in ("xpk", "queued-resources"):
            raise UserError(f"runner {self.runner} needs --topology, such as v5p:8x8x8")
        rendered = self._render(job, topology)
        if topology is not None and self.check:
            print(f"plan: {self._verdict(topology)}")
        self._show(rendered)
        if self.runner == "local":
            status = local.run(job, self._hosts(topology))
            if status:
                raise SystemExit(status)
        elif self.yes:
            self._run(rendered)
        else:
            print("Nothing was run; --yes runs the commands above.")

    def _hosts(self, topology: Any) -> int:
        from olmax.errors import UserError

        if self.hosts is not None:
            if self.hosts < 1:
                raise UserError(f"--hosts must be at least 1, is {self.hosts}")
            return self.hosts
        if topology is None:
            raise UserError(f"runner {self.runner} needs --hosts or --topology")
        return topology.hosts_per_slice * topology.slices

    def _render(self, job: Any, topology: Any) -> Any:
        from olmax.launching import local, queued_resources, slurm, xpk

        cloud: Any = dict(project=self.project, zone=self.zone, spot=self.spot)
        if self.runner == "xpk":
            return xpk.render(job, topology, cluster=self.cluster, image=self.image, **cloud)
        if self.runner == "queued-resources":
            return queued_resources.render(
                job,
                topology,
                service_account=self.service_account,
                network=self.network,
                **cloud,
            )
        hosts = self._hosts(topology)
        if self.runner == "slurm":
            return slurm.render(
                job,
                hosts,
                partition=self.partition,
                account=self.account,
                time_limit=self.time_limit,
                gpus_per_host=self.gpus_per_host,
            )
        return local.render(job, hosts, local.free_port())

    def _verdict(self, topology: Any) -> str:
        """The plan's verdict.

        Raises:
          UserError: it does not fit, or the plan is for something else.
        """
        from olmax.errors import UserError

        if self.plan is not None:
            from olmax.planning.stored import load

            plan = load(self.plan)
            planned = (plan["topology"], plan.get("slices", 1))
            if planned != (topology.name, topology.slices):
                raise UserError(
                    f"{self.plan} is a plan for {planned[1]} x {planned[0]}, "
                    f"not for {topology.slices} x {topology.name}"
                )
        else:
            # Nothing runs on a device here; a GPU or TPU of this machine stays free.
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
            from olmax.launching.intent import train_config
            from olmax.planning.plan import plan as make
            from olmax.reporting.files import jsonable

            config = train_config(self.command)
            plan = jsonable(
                make(
                    config.model,
                    topology,
                    batch_size=config.batch_size,
                    sequence_length=config.seq_len,
                    mesh=config.mesh,
                    remat=config.execution.remat,
                    accumulation=config.accumulation,
                    tokens=config.total_steps * config.tokens_per_step,
                    # Memory is what counts here; a whole plan may be given.
                    quick=True,
                )
            )
        if not plan["fits"]:
            raise UserError(f"not launched: {plan['verdict']} (--no-check launches anyway)")
        verdict = plan["verdict"]
        if plan["step_seconds"] is not None:
            from olmax.planning.view import duration

            verdict += (
                f"; {plan['step_seconds']:.2f} s a step, MFU {plan['mfu']:.0%}, "
                f"{duration(plan['days'])}, ${plan['price']:,.0f}"
            )
        if plan.get("quick"):
            verdict += " (a quick plan: machine code of kernels not made)"
        return verdict

    def _show(self, rendered: Any) -> None:
        from etils import epath

        from olmax.reporting.files import write_text

        for name, text in rendered.files.items():
            path = write_text(epath.Path(self.output) / name, text)
            print(f"\n# {path}\n{text}", end="")
        print("\n# commands")
        for step in rendered.steps:
            print(f"# {step.what}\n{step.text}")
        if rendered.afterwards:
            print("\n# later")
        for step in rendered.afterwards:
            print(f"# {step.what}\n{step.text}")

    def _run(self, rendered: Any) -> None:
        """Runs the steps with the tools of this machine."""
        import shutil
        import subprocess

        from olmax.errors import UserError

        for step in rendered.steps:
            if shutil.which(step.argv[0]) is None:
                raise UserError(f"{step.argv[0]} is not installed here; nothing was run")
        for step in rendered.steps:
            print(f"\n# {step.what}")
            status = subprocess.run(step.argv, check=False).returncode
            if status:
                raise UserError(f"{step.what}: {step.argv[0]} ended with status {status}")
