"""What single settings give on XLA's CPU backend: `python -m experiments.olmo2.ablation`.

Whole training steps of the shapes of `make bench`, with one thing switched off at a time, each in
turns with everything on; the first line, everything on against itself, tells the noise. One thread,
and processor time instead of wall time: other programs on the machine then matter less.
"""

import dataclasses
import json
import statistics
import sys
from typing import Any

import tyro
from rich.console import Console

from experiments.olmo2.benchmark import SHAPES
from experiments.side_by_side import Side
from olmax.cli import options
from olmax.errors import UserError
from olmax.reporting.tables import Column, Table

VARIANTS: dict[str, dict[str, Any]] = {
    "everything on": {},
    "layers in a loop (unroll_layers=False)": {"execution": {"unroll_layers": False}},
    "attention=reference (whole score matrices)": {"execution": {"attention": "reference"}},
    "loss=chunked (logits computed twice)": {"execution": {"loss": "chunked"}},
    "256-bit vectors": {"flags": "--xla_cpu_prefer_vector_width=256"},
    "no matrix products by YNNPACK": {"flags": "--xla_cpu_experimental_ynn_fusion_type="},
    "freed memory goes back to the system": {"keep_freed_memory": False},
}


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Training steps with one setting at a time switched off."""

    shapes: tuple[str, ...] = ("A", "B")
    """Of A (d128 L4 S128 B16) and B (d256 L6 S512 B8)."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Of the matrix products."""
    rounds: int = 3
    """Turns of each variant."""
    steps: int = 4
    """Steps of a turn."""

    def __post_init__(self):
        for name in self.shapes:
            if name not in SHAPES:
                raise UserError(f"ablation: unknown shape {name!r}; there are {', '.join(SHAPES)}")


def measure(ablation: Ablation, shape: str, dtype: str, variant: str) -> float:
    """Median processor seconds of a step of a variant over that with everything on. Two processes
    at a time: those of shape B hold 3 GB each.
    """

    def side(changes: dict[str, Any]) -> Side:
        rest = {key: value for key, value in changes.items() if key != "flags"}
        argument = json.dumps({**dataclasses.asdict(SHAPES[shape]), "dtype": dtype, **rest})
        command = [sys.executable, "-m", "experiments.olmo2.benchmark_step", argument]
        return Side(command, 1, {"XLA_FLAGS": changes.get("flags", "")})

    sides = side(VARIANTS[variant]), side({})
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(ablation.rounds):
        for found, one in zip(seconds, sides, strict=True):
            found += one.run(ablation.steps, "processor_seconds")
    for one in sides:
        one.close()
    return statistics.median(seconds[0]) / statistics.median(seconds[1])


def run(ablation: Ablation, console: Console) -> None:
    """Measures and prints the table."""
    columns: list[str | Column] = [Column("switched off", align="left")]
    slower: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for shape in ablation.shapes:
        for dtype in ablation.dtypes:
            console.print(f"{shape} ({SHAPES[shape]}) {dtype} ...")
            for name, values in slower.items():
                values.append(measure(ablation, shape, dtype, name))
                console.print(f"  {values[-1]:.2f}  {name}", style="dim")
    rows = [[name, *values] for name, values in slower.items()]
    table = Table(
        columns=columns,
        rows=rows,
        title="Processor time of a training step over that with everything on, one thread",
    )
    console.print(table.rich())


def main() -> int:
    """Exit status 0, or 2 for what the user can mend."""
    try:
        ablation = options.one_line(lambda: tyro.cli(Ablation))
        run(ablation, Console(width=None if sys.stdout.isatty() else 130))
    except UserError as error:
        print(f"ablation: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
