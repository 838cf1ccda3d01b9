"""CPU speed of the mixture of experts: `python -m experiments.olmoe.benchmark` (`make bench-moe`).

Two questions, each measured side by side in turns, so that a change of the machine's speed meets
both sides: one MoE layer forward and backward beside transformers' OlmoeSparseMoeBlock, and one
training step of the tiny OLMoE beside the dense model with the same active parameters.
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

LAYERS = {
    # As in the tiny model, and as the released one with an eighth of its widths.
    "tiny": dict(tokens=2048, d_model=128, d_ff=128, n_experts=16, experts_per_token=4),
    "eighth": dict(tokens=2048, d_model=256, d_ff=128, n_experts=64, experts_per_token=8),
    "wide": dict(tokens=1024, d_model=512, d_ff=256, n_experts=32, experts_per_token=4),
}
PEERS = ("eager", "grouped_mm")
"""Implementations of the experts in transformers. Its third, batched_mm, copies an expert for every
row (gigabytes here) and is made for decoding."""
STEP = dict(batch_size=16, seq_len=128)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """An MoE layer beside transformers', and the tiny OLMoE's step beside its dense twin's."""

    shapes: tuple[str, ...] = ("tiny", "eighth", "wide")
    """Of the layer."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Of the layer's parameters and products."""
    steps: bool = True
    """Whether to measure training steps too."""
    threads: int = 2
    """CPU cores."""
    rounds: int = 5
    """Turns of each side; every turn gives one pair of medians."""
    seconds: float = 1.5
    """Length of one turn, about."""
    peers: pathlib.Path = ROOT / ".peers/bin/python"
    """Python of the environment with torch and transformers (`make peers`)."""
    output: pathlib.Path = ROOT / "runs/benchmark_moe.json"
    """Every measured run and the environment, as JSON."""

    def __post_init__(self):
        for name in self.shapes:
            if name not in LAYERS:
                raise UserError(f"benchmark: unknown shape {name!r}; there are {', '.join(LAYERS)}")
        if self.shapes and not self.peers.exists():
            raise UserError(f"benchmark: no Python at {self.peers}; run `make peers`, or --peers")


def in_turns(benchmark: Benchmark, commands: dict[str, list[str]]) -> dict[str, dict]:
    """Every side's `ready` message and seconds by turn; a side that cannot run is left out."""
    sides = {}
    for name, command in commands.items():
        try:
            sides[name] = Side(command, benchmark.threads)
        except UserError:
            print(f"{name} cannot run this; left out", file=sys.stderr)
    runs = {
        name: max(2, round(benchmark.seconds / statistics.median(side.run(3))))
        for name, side in sides.items()
    }
    turns: dict[str, list[list[float]]] = {name: [] for name in sides}
    for number in range(benchmark.rounds):
        # Who begins alternates, so that neither always follows the other.
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            turns[name].append(sides[name].run(runs[name]))
    for side in sides.values():
        side.close()
    return {name: {**side.ready, "seconds": turns[name]} for name, side in sides.items()}


def medians(side: dict) -> list[float]:
    """Seconds of one run, the median of every turn."""
    return [statistics.median(turn) for turn in side["seconds"]]


def ratios(numerator: dict, denominator: dict) -> tuple[float, float, float]:
    """Median, lowest and highest ratio of a pair of turns."""
    pairs = [a / b for a, b in zip(medians(numerator), medians(denominator), strict=True)]
    return statistics.median(pairs), min(pairs), max(pairs)


def layer(benchmark: Benchmark, name: str, dtype: str) -> dict:
    """One layer on both sides, every implementation that transformers has."""
    asked = {**LAYERS[name], "dtype": dtype, "threads": benchmark.threads}
    commands = {
        "olmax": [sys.executable, "-m", "experiments.olmoe.benchmark_layer", json.dumps(asked)]
    }
    for peer in PEERS:
        argument = json.dumps({**asked, "implementation": peer})
        script = "experiments/olmoe/peers/torch_layer.py"
        commands[peer] = [str(benchmark.peers), script, argument]
    return in_turns(benchmark, commands)


def steps(benchmark: Benchmark, dtype: str) -> dict:
    """One training step of the tiny OLMoE and of its dense twin."""
    commands = {}
    for preset in ("olmoe-tiny", "olmoe-tiny-dense"):
        argument = json.dumps({**STEP, "preset": preset, "dtype": dtype})
        commands[preset] = [sys.executable, "-m", "experiments.olmoe.benchmark_step", argument]
    return in_turns(benchmark, commands)


def run(benchmark: Benchmark, console: Console) -> None:
    """Measures, prints the tables and writes the JSON."""
    load = os.getloadavg()[0]
    if load > 0.5:
        console.print(f"[yellow]The machine is busy (load {load:.1f}); expect noise.[/yellow]")
    results, rows = [], []
    for name in benchmark.shapes:
        for dtype in benchmark.dtypes:
            found = layer(benchmark, name, dtype)
            peers = {peer: found[peer] for peer in PEERS if peer in found}
            fastest = min(peers, key=lambda peer: statistics.median(medians(peers[peer])))
            ratio, low, high = ratios(found[fastest], found["olmax"])
            results.append({"what": "layer", "shape": name, "dtype": dtype, "sides": found})
            console.print(f"layer {name} {dtype}: {ratio:.2f} times as fast as {fastest}")
            milliseconds = {
                side: 1e3 * statistics.median(medians(values)) for side, values in found.items()
            }
            rows.append(
                [
                    name, dtype, milliseconds["olmax"], *(milliseconds.get(p) for p in PEERS),
                    fastest, ratio, f"{low:.2f} to {high:.2f}",
                ]
            )  # fmt: skip
    console.print(
        Table(
            [
                "layer", Column("dtype", align="left"), Column("olmax ms", 1),
                *(Column(f"{peer} ms", 1) for peer in PEERS), Column("fastest peer", align="left"),
                Column("speed-up", 2), "pairs",
            ],
            rows,
            title="MoE layer, forward and backward, beside transformers",
            caption="; ".join(f"{name}: {LAYERS[name]}" for name in benchmark.shapes),
        ).rich()
    )  # fmt: skip
    rows = []
    for dtype in benchmark.dtypes if benchmark.steps else ():
        found = steps(benchmark, dtype)
        ratio, low, high = ratios(found["olmoe-tiny"], found["olmoe-tiny-dense"])
        results.append({"what": "step", "dtype": dtype, "sides": found})
        console.print(f"step {dtype}: {ratio:.2f} times the dense step")
        times = [1e3 * statistics.median(medians(side)) for side in found.values()]
        rows.append([dtype, *times, ratio, f"{low:.2f} to {high:.2f}"])
    about = environment(benchmark.threads, [side for r in results for side in r["sides"].values()])
    about |= {"load_before": load}
    console.print(
        Table(
            [
                "dtype", Column("OLMoE ms", 1), Column("dense ms", 1), Column("cost", 2), "pairs",
            ],
            rows,
            title="Training step of olmoe-tiny beside olmoe-tiny-dense",
            caption=", ".join(f"{key} {value}" for key, value in {**STEP, **about}.items()),
        ).rich()
    )  # fmt: skip
    benchmark.output.parent.mkdir(parents=True, exist_ok=True)
    partial = benchmark.output.with_suffix(".partial")
    partial.write_text(json.dumps({"environment": about, "results": results}, indent=1) + "\n")
    partial.rename(benchmark.output)
    console.print(f"written to {benchmark.output}")


def main() -> int:
    """Exit status 0, or 2 for what the user can mend."""
    try:
        benchmark = options.one_line(lambda: tyro.cli(Benchmark))
        run(benchmark, Console(width=None if sys.stdout.isatty() else 150))
    except UserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
