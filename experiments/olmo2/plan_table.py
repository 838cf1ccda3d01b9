"""Plans of the OLMo 2 models, and how the proposed mesh compares with all others.

`python -m experiments.olmo2.plan_table models` plans 1B, 7B, 13B and 32B on v5e, v5p and v6e with a
given mesh, each in a process of its own whose time and memory are measured.
`python -m experiments.olmo2.plan_table meshes --model olmo2-1b --topology v5e:4x4 --batch-size 64`
compiles every way to cut the chips over data, fsdp and tensor and marks the proposed one.
With `--quick` no compilation goes on to the compiler's own times (`olmax plan --quick`).
Rows are kept in a file; those that are there are not made again.
"""

import dataclasses
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import Annotated

import tyro
from rich.console import Console

from olmax import cpu_tuning
from olmax.cli import options
from olmax.errors import UserError
from olmax.reporting.tables import Column, Table

GIB = 2**30
MODELS = ("olmo2-1b", "olmo2-7b", "olmo2-13b", "olmo2-32b")
TOPOLOGIES = ("v5e:16x16", "v5p:4x4x4", "v6e:16x16")


@dataclasses.dataclass(frozen=True)
class Models:
    """Plan all models on all chips; sequences of 4,096, one a chip, parameters cut over all."""

    output: pathlib.Path = pathlib.Path("runs/plan_models.json")
    """Rows made so far."""
    models: tuple[str, ...] = MODELS
    topologies: tuple[str, ...] = TOPOLOGIES
    quick: bool = False
    """Estimate times from FLOPs and bytes, in seconds instead of a minute or two a plan."""

    def run(self) -> Table:
        """Makes the missing rows."""
        rows = Rows(self.output)
        for model in self.models:
            for topology in self.topologies:
                if not rows.has(model=model, topology=topology, quick=self.quick):
                    batch = _chips(topology)
                    rows.add(measured(model, topology, None, batch, 4096, quick=self.quick))
        columns = [
            "model",
            Column("topology", align="left"),
            Column("GiB a device", digits=2),
            Column("of", digits=2),
            Column("Mcycles", digits=0),
            Column("step, s", digits=3),
            Column("MFU, %", digits=1),
            Column("days for 1e12 tokens", digits=1),
            Column("planned in, s", digits=0),
            Column("CPU, s", digits=0),
            Column("host GiB", digits=2),
        ]
        cells = [
            [
                row["model"],
                row["topology"],
                row["per_device_bytes"]["total"] / GIB,
                row["hbm_bytes"] / GIB,
                None if row["cycles"] is None else row["cycles"] / 1e6,
                row["step_seconds"],
                None if row["mfu"] is None else row["mfu"] * 100,
                row["days"],
                row["wall_seconds"],
                row["cpu_seconds"],
                row["host_bytes"] / GIB,
            ]
            for row in rows.all
            if row["quick"] == self.quick
        ]
        title = "One sequence of 4,096 a chip, full remat, fsdp" + _of(quick=self.quick)
        return Table(columns, cells, title=title)


@dataclasses.dataclass(frozen=True)
class Meshes:
    """Compile every mesh of data, fsdp and tensor, and the proposed one among them."""

    model: str = "olmo2-1b"
    topology: str = "v5e:4x4"
    batch_size: int = 64
    sequence_length: int = 4096
    quick: bool = False
    """Estimate times from FLOPs and bytes, in seconds instead of a minute or two a mesh."""
    output: pathlib.Path = pathlib.Path("runs/plan_meshes.json")
    """Rows made so far."""

    def run(self) -> Table:
        """Makes the missing rows."""
        from olmax.models.presets import get_preset
        from olmax.planning import proposal, trial
        from olmax.planning.topology import Topology

        config, topology = get_preset(self.model), Topology.parse(self.topology)
        question = (config, topology, self.batch_size, self.sequence_length)
        worth_trying = trial.worth_trying(proposal.propose(*question).meshes)
        rows = Rows(self.output)
        asked = dict(
            model=self.model,
            topology=self.topology,
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            quick=self.quick,
        )
        for candidate in proposal.candidates(*question):
            mesh = proposal.text_of(candidate.mesh)
            if not rows.has(mesh_text=mesh, **asked):
                plan = measured(
                    self.model,
                    self.topology,
                    mesh,
                    self.batch_size,
                    self.sequence_length,
                    quick=self.quick,
                )
                rows.add(plan | {"mesh_text": mesh})
        found = [row for row in rows.all if all(row[key] == asked[key] for key in asked)]
        found.sort(key=lambda row: (not row["fits"], row["step_seconds"] or 0))
        # As `olmax plan` chooses, of those it tries.
        names = [proposal.text_of(mesh) for mesh in worth_trying]
        tried = [row["mesh_text"] for row in found if row["mesh_text"] in names]
        columns = [
            Column("mesh", align="left"),
            Column("", align="left"),
            Column("GiB a device", digits=2),
            Column("Mcycles", digits=0),
            Column("waiting for links, s", digits=3),
            Column("step, s", digits=3),
        ]
        cells = [
            [
                row["mesh_text"],
                ("proposed" if row["mesh_text"] == tried[0] else "")
                + ("" if row["fits"] else "does not fit"),
                row["per_device_bytes"]["total"] / GIB,
                None if row["cycles"] is None else row["cycles"] / 1e6,
                row["exposed_collective_seconds"],
                row["step_seconds"],
            ]
            for row in found
        ]
        title = f"{self.model} on {self.topology}, {self.batch_size} x {self.sequence_length:,}"
        return Table(columns, cells, title=title + _of(quick=self.quick))


class Rows:
    """Plans in a JSON file."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.all: list[dict] = json.loads(path.read_text())["rows"] if path.exists() else []

    def has(self, **asked) -> bool:
        """Whether there is a row with these values."""
        return any(all(row.get(key) == asked[key] for key in asked) for row in self.all)

    def add(self, row: dict) -> None:
        """Adds one and writes the file."""
        from olmax.reporting.files import environment, write_json

        self.all.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"versions": environment()["versions"], "rows": self.all})


def measured(
    model: str,
    topology: str,
    mesh: str | None,
    batch_size: int,
    sequence_length: int,
    *,
    quick: bool = False,
) -> dict:
    """A plan by `olmax plan` in a process of its own, with what the process took.

    Without a mesh, the parameters are cut over all chips.

    Raises:
      UserError: the command failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "plan.json"
        command = [
            *(sys.executable, "-m", "olmax.cli.main", "plan"),
            *("--model", model, "--topology", topology, "--output", str(path)),
            *("--batch-size", str(batch_size), "--sequence-length", str(sequence_length)),
            *("--mesh", mesh or f"fsdp={_chips(topology)}"),
            *(["--quick"] if quick else []),
        ]
        start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise UserError(done.stderr.strip() or f"`{' '.join(command)}` failed")
        taken = {
            "wall_seconds": time.monotonic() - start,
            "cpu_seconds": sum(
                getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime")
            ),
            # The largest child so far, which is what a bound needs.
            "host_bytes": after.ru_maxrss * 1024,
        }
        return json.loads(path.read_text()) | taken


def _of(*, quick: bool) -> str:
    return ", quick plans" if quick else ""


def _chips(topology: str) -> int:
    from olmax.planning.topology import Topology

    return Topology.parse(topology).num_chips


def main() -> int:
    """Runs one of the two."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    cpu_tuning.apply()
    kind = (
        Annotated[Models, tyro.conf.subcommand("models")]
        | Annotated[Meshes, tyro.conf.subcommand("meshes")]
    )
    try:
        table = options.one_line(lambda: tyro.cli(kind, description=__doc__)).run()
    except UserError as error:
        print(f"plan_table: {error}", file=sys.stderr)
        return 2
    Console(soft_wrap=True, width=200).print(table.rich())
    return 0


if __name__ == "__main__":
    sys.exit(main())
