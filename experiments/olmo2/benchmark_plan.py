"""Compiled training steps beside MaxText's: `python -m experiments.olmo2.benchmark_plan`.

Both sides compile their own step for the same TPU topology with the same compiler, the same tokens
a chip and full rematerialisation, one after the other, on this machine's CPU. Compared are the
cycles of a step without the attention kernels, which have no estimate on either side, and the
temporary bytes of a device; both programs are read by `olmax.planning`. Other kernels (our loss)
count by the work they declare, since the other side has what they do among its cycles. MaxText is
compiled twice: as it is, and with the compiler options of our train step, which it documents for
some of its own recipes.
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import tyro
from rich.console import Console

from olmax import cpu_tuning
from olmax.cli import options
from olmax.errors import UserError
from olmax.reporting.tables import Column, Table

ROOT = pathlib.Path(__file__).resolve().parents[2]
MAXTEXT_VERSION = "0.2.5"


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison; the parameters are cut over all chips on both sides."""

    model: str
    """Of the same name on both sides."""
    topology: str
    peer_topology: str
    """MaxText's name, which counts cores for v5p."""
    batch_per_chip: int
    sequence_length: int


CASES = {
    "7b": Case("llama2-7b", "v5p:4x4x4", "v5p-128", 1, 4096),
    "8b": Case("llama3.1-8b", "v6e:16x16", "v6e-256", 2, 8192),
}


@dataclasses.dataclass(frozen=True)
class BenchmarkPlan:
    """Cycles and temporaries of a training step, olmax and MaxText, side by side."""

    cases: tuple[str, ...] = tuple(CASES)
    """Of 7b (llama2-7b, 64 chips of v5p) and 8b (llama3.1-8b, 256 chips of v6e)."""
    peers: pathlib.Path = ROOT / ".peers-maxtext/bin/python"
    """Python of the environment with MaxText (`make peers-maxtext`)."""
    output: pathlib.Path = ROOT / "runs/benchmark_plan.json"
    """Everything measured, as JSON."""

    def __post_init__(self):
        for name in self.cases:
            if name not in CASES:
                raise UserError(
                    f"benchmark_plan: unknown case {name!r}; there are {', '.join(CASES)}"
                )
        if not self.peers.exists():
            raise UserError(
                f"benchmark_plan: no Python at {self.peers}; run `make peers-maxtext`, or --peers"
            )


@dataclasses.dataclass(frozen=True)
class Side:
    """What is compared."""

    cycles: int
    """Of everything but the attention kernels."""
    attention_seconds: float
    """Of those, as `olmax plan` prices them."""
    temporary_bytes: int
    compile_seconds: float


def _mesh(case: Case):
    from olmax import sharding
    from olmax.planning.topology import Topology

    topology = Topology.parse(case.topology)
    return topology, sharding.make_mesh(f"fsdp={topology.num_chips}", topology.devices())


def compiler_options(case: Case) -> dict[str, str]:
    """Of our train step on the case's chips."""
    from kernels_pallas import targets
    from olmax.training import tpu_options

    topology, mesh = _mesh(case)
    tokens = case.batch_per_chip * topology.num_chips * case.sequence_length
    with targets.compiling_for("tpu"):
        return tpu_options.compiler_options(mesh, tokens) or {}


def ours(case: Case) -> Side:
    """olmax's step, as `olmax plan` compiles it."""
    from kernels_pallas import targets
    from olmax.models.config import Execution
    from olmax.models.presets import get_preset
    from olmax.planning import compilation

    topology, mesh = _mesh(case)
    model = get_preset(case.model)
    batch = case.batch_per_chip * topology.num_chips
    execution = Execution(compute_dtype="bfloat16", remat="full")
    with targets.compiling_for("tpu"):
        step = compilation.build(
            model, execution, mesh, tokens_per_step=batch * case.sequence_length
        )
    compiled = compilation.compile_step(step, batch, case.sequence_length)
    if not compiled.text:
        raise UserError(f"{case.model} does not fit {case.topology}: {compiled.refused}")
    return _read(case, compiled.text, compiled.temporary_bytes, compiled.compile_seconds)


def maxtext(case: Case, python: pathlib.Path, compiler_options: dict[str, str]) -> Side:
    """MaxText's step, by its own ahead-of-time compilation in its own environment.

    Raises:
      UserError: it fails.
    """
    from olmax import absent_tpu

    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "compile_topology": case.peer_topology,
            "compile_topology_num_slices": 1,
            "model_name": case.model,
            "per_device_batch_size": case.batch_per_chip,
            "max_target_length": case.sequence_length,
            "remat_policy": "full",
            "run_name": "plan",
            "base_output_directory": folder,
            "dataset_type": "synthetic",
            "enable_checkpointing": "false",
            "enable_goodput_recording": "false",
            "monitor_goodput": "false",
        }
        text = pathlib.Path(folder) / "program.txt"
        own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [
                str(python),
                str(ROOT / "experiments/olmo2/peers/maxtext_compile.py"),
                str(text),
                json.dumps(compiler_options),
                *(f"{key}={value}" for key, value in settings.items()),
            ],
            env=own | absent_tpu.ENVIRONMENT | {"JAX_PLATFORMS": "cpu"},
            cwd=folder,
            capture_output=True,
            text=True,
        )
        found = [line for line in done.stdout.splitlines() if line.startswith("MAXTEXT ")]
        if done.returncode or not found:
            last = (done.stderr.strip() or "no output").splitlines()[-1]
            raise UserError(f"MaxText does not compile {case.model}: {last[:300]}")
        memory = json.loads(found[-1].removeprefix("MAXTEXT "))
        return _read(case, text.read_text(), memory["temporary_bytes"], memory["compile_seconds"])


def _read(case: Case, text: str, temporary_bytes: int, compile_seconds: float) -> Side:
    from olmax.planning.plan import step_costs

    topology, mesh = _mesh(case)
    items = step_costs(text, mesh, topology)
    attention = others = 0.0
    for item in items:
        if item.part == "attention kernel":
            attention += item.times * item.seconds
        elif item.source == "kernel":
            others += item.times * item.seconds
    estimated = sum(item.times * item.cycles for item in items)
    return Side(
        cycles=estimated + round(others * topology.chip.clock_hz),
        attention_seconds=attention,
        temporary_bytes=temporary_bytes,
        compile_seconds=compile_seconds,
    )


def table(rows: list[tuple[Case, str, Side, Side]]) -> Table:
    """Ours, MaxText's and the ratio, one row for each of MaxText's compilations of a case."""
    columns = [
        "model",
        Column("topology", align="left"),
        Column("batch a chip", align="left"),
        Column("MaxText's options", align="left"),
        Column("Mcycles", digits=0),
        Column("MaxText", digits=0),
        Column("ratio", digits=3),
        Column("temporaries, GiB", digits=2),
        Column("MaxText", digits=2),
        Column("ratio", digits=3),
    ]
    cells = [
        [
            case.model,
            case.topology,
            f"{case.batch_per_chip} x {case.sequence_length:,}",
            kind,
            a.cycles / 1e6,
            b.cycles / 1e6,
            a.cycles / b.cycles,
            a.temporary_bytes / 2**30,
            b.temporary_bytes / 2**30,
            a.temporary_bytes / b.temporary_bytes,
        ]
        for case, kind, a, b in rows
    ]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    title = f"Compiled training step, full remat, {versions}, MaxText {MAXTEXT_VERSION}"
    return Table(columns, cells, title=title)


def main() -> int:
    """Compiles both sides of every case and prints the table."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    cpu_tuning.apply()
    try:
        settings = options.one_line(lambda: tyro.cli(BenchmarkPlan, description=__doc__))
        from olmax.reporting.files import environment, write_json

        rows = []
        for name in settings.cases:
            case = CASES[name]
            print(f"{case.model} on {case.topology}: olmax ...", file=sys.stderr, flush=True)
            own = ours(case)
            for kind, chosen in (("its own", {}), ("ours", compiler_options(case))):
                print(f"  MaxText with {kind} options ...", file=sys.stderr, flush=True)
                rows.append((case, kind, own, maxtext(case, settings.peers, chosen)))
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            settings.output,
            {
                "versions": environment()["versions"] | {"maxtext": MAXTEXT_VERSION},
                "rows": [
                    {"case": dataclasses.asdict(case), "olmax": dataclasses.asdict(a)}
                    | {"maxtext": dataclasses.asdict(b), "maxtext_options": kind}
                    for case, kind, a, b in rows
                ],
            },
        )
    except UserError as error:
        print(f"benchmark_plan: {error}", file=sys.stderr)
        return 2
    Console(width=None if sys.stdout.isatty() else 130).print(table(rows).rich())
    return 0


if __name__ == "__main__":
    sys.exit(main())
