"""Training throughput beside Hugging Face + torch on CPU cores: `python -m
experiments.olmo2.benchmark`.

Both sides run the same shapes as whole training steps (forward, backward, clipping by the global
norm, AdamW, float32 master parameters) in processes of their own that live side by side and work in
turns, so that a change of the machine's speed meets both. Ratios are taken pair by pair.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import sys

import tyro
from rich.console import Console

from experiments.side_by_side import ROOT, Side, environment
from olmax.cli import options
from olmax.errors import UserError
from olmax.reporting.tables import Column, Table


@dataclasses.dataclass(frozen=True)
class Shape:
    """An OLMo 2 model (reordered norm, full-width QK-norm, untied head) and a batch."""

    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    vocab_size: int
    seq_len: int
    batch_size: int

    def __str__(self) -> str:
        return (
            f"d{self.d_model} L{self.n_layers} H{self.n_heads} ffn{self.d_ff} V{self.vocab_size} "
            f"S{self.seq_len} B{self.batch_size}"
        )


SHAPES = {
    "A": Shape(128, 4, 4, 512, 1024, 128, 16),
    "B": Shape(256, 6, 8, 1024, 8192, 512, 8),
}


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Whole training steps of olmax and of Hugging Face + torch, in turns."""

    shapes: tuple[str, ...] = ("A", "B")
    """Of A (d128 L4 S128 B16) and B (d256 L6 S512 B8)."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Of the matrix products; parameters are float32 in both (torch: autocast)."""
    threads: int = 2
    """CPU cores."""
    rounds: int = 7
    """Turns of each side; every turn gives one pair of medians."""
    seconds: float = 5.0
    """Length of one turn, about."""
    peers: pathlib.Path = ROOT / ".peers/bin/python"
    """Python of the environment with torch and transformers (`make peers`)."""
    output: pathlib.Path = ROOT / "runs/benchmark.json"
    """Every measured step and the environment, as JSON."""

    def __post_init__(self):
        for name in self.shapes:
            if name not in SHAPES:
                raise UserError(f"benchmark: unknown shape {name!r}; there are {', '.join(SHAPES)}")
        if not self.peers.exists():
            raise UserError(f"benchmark: no Python at {self.peers}; run `make peers`, or --peers")


def measure(benchmark: Benchmark, shape: Shape, dtype: str) -> dict:
    """Both sides in turns; see `summary` for the fields."""
    argument = json.dumps(
        {**dataclasses.asdict(shape), "dtype": dtype, "threads": benchmark.threads}
    )
    commands = {
        "olmax": [sys.executable, "-m", "experiments.olmo2.benchmark_step", argument],
        "torch": [str(benchmark.peers), "experiments/olmo2/peers/torch_step.py", argument],
    }
    sides = {name: Side(command, benchmark.threads) for name, command in commands.items()}
    steps = {}
    for name, side in sides.items():
        steps[name] = max(2, round(benchmark.seconds / statistics.median(side.run(3))))
    turns = {name: [] for name in sides}
    for number in range(benchmark.rounds):
        # Who begins alternates, so that neither always follows the other.
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            turns[name].append(sides[name].run(steps[name]))
    for side in sides.values():
        side.close()
    return {name: {**sides[name].ready, "seconds": turns[name]} for name in sides}


def summary(shape: Shape, result: dict) -> dict[str, float]:
    """Tokens/s of both sides (median over turns of the median step), the median, lowest and highest
    ratio of a pair of turns, and our model FLOP/s.
    """
    tokens = shape.batch_size * shape.seq_len
    rates = {
        name: [tokens / statistics.median(turn) for turn in side["seconds"]]
        for name, side in result.items()
    }
    ratios = [ours / theirs for ours, theirs in zip(rates["olmax"], rates["torch"], strict=True)]
    ours = statistics.median(rates["olmax"])
    return {
        "olmax": ours,
        "torch": statistics.median(rates["torch"]),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "gflops": ours * result["olmax"]["flops_per_token"] / 1e9,
    }


def run(benchmark: Benchmark, console: Console) -> None:
    """Measures, prints the table and writes the JSON."""
    load = os.getloadavg()[0]
    if load > 0.5:
        console.print(f"[yellow]The machine is busy (load {load:.1f}); expect noise.[/yellow]")
    rows, results = [], []
    for name in benchmark.shapes:
        for dtype in benchmark.dtypes:
            shape = SHAPES[name]
            console.print(f"{name} ({shape}) {dtype} ...")
            result = measure(benchmark, shape, dtype)
            numbers = summary(shape, result)
            results.append({"shape": name, "dtype": dtype, **result, "summary": numbers})
            spread = f"{numbers['ratio_low']:.2f} to {numbers['ratio_high']:.2f}"
            rows.append(
                [
                    name,
                    dtype,
                    round(numbers["olmax"]),
                    round(numbers["torch"]),
                    numbers["ratio"],
                    spread,
                    round(numbers["gflops"]),
                ]
            )
    sides = [result[side] for result in results for side in ("olmax", "torch")]
    about = {**environment(benchmark.threads, sides), "load_before": load}
    table = Table(
        columns=[
            "shape",
            Column("dtype", align="left"),
            "olmax tok/s",
            "torch tok/s",
            Column("ratio", digits=2),
            "pairs",
            "olmax GFLOP/s",
        ],
        rows=rows,
        title="Whole training steps, in turns",
        caption=", ".join(f"{key} {value}" for key, value in about.items()),
    )
    console.print(table.rich())
    benchmark.output.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "environment": about,
        "shapes": {name: dataclasses.asdict(SHAPES[name]) for name in benchmark.shapes},
        "results": results,
    }
    partial = benchmark.output.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.rename(benchmark.output)
    console.print(f"written to {benchmark.output}")


def main() -> int:
    """Exit status 0, or 2 for what the user can mend."""
    try:
        benchmark = options.one_line(lambda: tyro.cli(Benchmark))
        run(benchmark, Console(width=None if sys.stdout.isatty() else 130))
    except UserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
