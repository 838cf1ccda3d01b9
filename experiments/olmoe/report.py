"""Stage report: tables in the terminal, report.html and report.json."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from experiments.olmoe import published
from experiments.olmoe.comparison import Results, average_bits, average_change, bits, findings
from experiments.olmoe.dry_run import plan, resolved
from experiments.olmoe.pipeline import ROUTING
from experiments.olmoe.recipe import MAIN, Recipe
from olmax.reporting import document
from olmax.reporting.document import (
    Block,
    Code,
    Findings,
    KeyNumbers,
    Report,
    Section,
    TableBlock,
    Text,
)
from olmax.reporting.figures import PALETTE, label_lines, panels, save_png, style
from olmax.reporting.files import environment, jsonable, write_json
from olmax.reporting.tables import Column, Table
from olmax.routing import report as routing_report
from olmax.training.recorder import read_metrics

METRICS = (
    "loss",
    "cross_entropy",
    "load_balance_loss",
    "router_z_loss",
    "max_violation",
    "min_load",
    "grad_norm",
)
PANELS = {
    "moe": {"moe": "16 experts", "dense": "dense"},
    "granularity": {"moe": "16 experts", "8-experts": "8 experts", "4-experts": "4 experts"},
    "shared": {"moe": "16 routed", "shared": "15 routed + 1 shared"},
    "choice": {"moe": "token choice", "expert-choice": "expert choice"},
    "balance": {"moe": "with", "unbalanced": "without"},
}
"""Comparisons of the paper and which runs are ours."""


def write_report(
    recipe: Recipe,
    directory: pathlib.Path,
    results: Results,
    seconds: Mapping[str, float],
    console: Console,
) -> None:
    """Writes report.json, report.html and main.png, and prints the tables."""
    routing = json.loads((directory / ROUTING / "routing.json").read_text())
    tokens = json.loads((directory / ROUTING / "tokens.json").read_text())
    curves = {name: read_metrics(directory / name) for name in results}
    numbers = collect(recipe, results, routing, curves, seconds)
    write_json(directory / "report.json", numbers)
    names = {int(i): text for i, text in tokens.items()}
    build(recipe, numbers, names).write(directory / "report.html")
    save_png(comparison_figure(numbers, ("moe",)), directory / "main.png", dpi=110)
    for table in (held_out_table(numbers), training_table(numbers)):
        console.print(table.rich())
    console.print(routing_report.saturation_table(routing).rich())
    for finding in numbers["findings"]:
        console.print(f"[bold]{finding['verdict']:>9}[/]  {finding['claim']}", highlight=False)
        console.print(f"           {finding['evidence']}", highlight=False, style="dim")
    console.print(f"{sum(seconds.values()) / 60:.1f} minutes in all stages", highlight=False)
    console.print(f"report: {directory / 'report.html'}", highlight=False, soft_wrap=True)


def collect(
    recipe: Recipe,
    results: Results,
    routing: Mapping[str, Any],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Everything the report is made from, as plain JSON: contents of report.json."""
    training = {name: _training_numbers(rows) for name, rows in curves.items()}
    numbers = {
        "recipe": json.loads(resolved(recipe)),
        "plan": plan(recipe),
        "environment": environment(),
        "seconds": dict(seconds),
        "training": training,
        "bits_per_byte": {
            name: {source: bits(results, name, source) for source in results[name]}
            | {"average": average_bits(results, name)}
            for name in results
        },
        "change_against_moe": {
            name: average_change(results, MAIN, name) for name in results if name != MAIN
        },
        "findings": findings(results, training, routing),
        "routing": routing,
        "curves": {name: _held_out_curve(rows) for name, rows in curves.items()},
        "published": published.load(),
    }
    return jsonable(numbers)


def _training_numbers(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    steps = [row for row in rows if "loss" in row]
    last = steps[-max(1, len(steps) // 20) :]
    speeds = sorted(row["tokens_per_second"] for row in steps if row.get("tokens_per_second"))
    found = {
        name: sum(row[name] for row in last) / len(last) for name in METRICS if name in last[0]
    }
    return {
        "tokens": steps[-1]["tokens"],
        "median_tokens_per_second": speeds[len(speeds) // 2] if speeds else None,
        **found,
    }


def _held_out_curve(rows: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """(millions of tokens, mean bits per byte over sources) while training."""
    tokens = {row["step"]: row["tokens"] for row in rows if "tokens" in row}
    found = []
    for row in rows:
        values = [value for key, value in row.items() if key.startswith("held_out/")]
        values = [v for v in values if isinstance(v, float) and math.isfinite(v)]
        if values:
            found.append([tokens[row["step"]] / 1e6, sum(values) / len(values)])
    return found


def held_out_table(numbers: Mapping[str, Any]) -> Table:
    """Bits per byte of every run by source, and the paired difference to the main run."""
    runs = numbers["bits_per_byte"]
    sources = [source for source in runs[MAIN] if source != "average"]
    rows = [
        [
            name,
            *(_estimate(values[source], 3) for source in [*sources, "average"]),
            "" if name == MAIN else _estimate(numbers["change_against_moe"][name], 4, signed=True),
        ]
        for name, values in runs.items()
    ]
    return Table(
        ["run", *sources, "average", f"change against {MAIN}"],
        rows,
        title="Bits per byte on held-out text",
        caption="± one standard error over documents; change: document by document, mean over "
        "sources. Lower is better. Experts that choose tokens see later ones while they do.",
        strong_rows=[0],
    )


def _estimate(value: Mapping[str, float], digits: int, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{value['value']:{sign}.{digits}f} ± {value['stderr']:.{digits}f}"


def training_table(numbers: Mapping[str, Any]) -> Table:
    """Every run: sizes, last losses, balance, speed."""
    models = numbers["plan"]["models"]
    rows = [
        [
            name, models[name]["parameters"], models[name]["active_parameters"],
            run["cross_entropy"], run.get("load_balance_loss"), run.get("router_z_loss"),
            None if "max_violation" not in run else 1 + run["max_violation"], run.get("min_load"),
            run["median_tokens_per_second"] and round(run["median_tokens_per_second"]),
        ]
        for name, run in numbers["training"].items()
    ]  # fmt: skip
    return Table(
        [
            "run", "parameters", "active", Column("cross-entropy", 3), Column("balance loss", 4),
            Column("z-loss", 5), Column("fullest", 2), Column("emptiest", 2), "tokens/s",
        ],
        rows,
        title="Training runs",
        caption="Means over the last twentieth of the steps. Fullest and emptiest expert: times an "
        "equal share, mean over layers.",
    )  # fmt: skip


def comparison_figure(numbers: Mapping[str, Any], wanted: Sequence[str]) -> Figure:
    """Our held-out curves on the left, the paper's digitised ones on the right, a row each."""
    paper = numbers["published"]["curves"]
    with style():
        figure, axes = panels(len(wanted), 2, height=2.5)
        for row, name in enumerate(wanted):
            ours = {
                label: numbers["curves"][run]
                for run, label in PANELS[name].items()
                if run in numbers["curves"]
            }
            for axis, series, title in (
                (axes[2 * row], ours, "This run: bits per byte"),
                (axes[2 * row + 1], paper[name]["series"], f"The paper: {paper[name]['title']}"),
            ):
                _lines(axis, series, title)
        axes[-2].set_xlabel("tokens (millions)")
        axes[-1].set_xlabel("tokens (billions)")
        return figure


def _lines(axis, series: Mapping[str, Sequence[Sequence[float]]], title: str) -> None:
    labels, ends, values = [], [], []
    for color, (label, points) in zip(PALETTE, series.items(), strict=False):
        if points:
            x, y = zip(*points, strict=True)
            axis.plot(x, y, color=color, marker="o", markersize=2.5)
            labels.append(label)
            ends.append((x[-1], y[-1]))
            values += y
    if values:
        # The first steps would flatten what matters.
        low, high = min(values), sorted(values)[int(0.85 * (len(values) - 1))]
        axis.set_ylim(low - 0.08 * (high - low), high)
        label_lines(axis, labels, ends, PALETTE)
    axis.set_title(title, fontsize=9)


def paper_tables() -> list[Table]:
    """The paper's numbers that this run's stand beside."""
    paper = published.load()
    ablations = paper["ablations"]
    return [
        Table(
            ["", *(Column(name, 3 if "loss" in name else 1) for name in ablations["columns"])],
            [[name, *row] for name, row in ablations["rows"].items()],
            title="The paper's ablations",
            caption=ablations["source"],
        ),
        Table(
            ["", *(Column(f"{p} %", 1) for p in paper["saturation"]["stages"])],
            [[top, *paper["saturation"][top]] for top in ("top-1", "top-8")],
            title="The paper's router saturation (%)",
            caption=paper["saturation"]["source"],
        ),
        Table(
            ["", *(Column(f"layer {n}", 1) for n in paper["vocabulary_specialization"]["layers"])],
            [[name, *row] for name, row in paper["vocabulary_specialization"]["rows"].items()],
            title="The paper's vocabulary specialisation (%)",
            caption=paper["vocabulary_specialization"]["source"],
        ),
    ]


def build(recipe: Recipe, numbers: Mapping[str, Any], names: Mapping[int, str]) -> Report:
    """The report out of report.json's contents; `names` spells token ids."""
    runs, models = numbers["bits_per_byte"], numbers["plan"]["models"]
    key = [
        (f"{models[MAIN]['parameters']:,}", "parameters"),
        (f"{models[MAIN]['active_parameters']:,}", "active for a token"),
        (f"{numbers['training'][MAIN]['tokens']:,}", "tokens of each run"),
        (f"{runs[MAIN]['average']['value']:.3f}", "bits per byte, experts"),
    ]
    if "dense" in runs:
        key.append((f"{runs['dense']['average']['value']:.3f}", "bits per byte, dense"))
    items = [document.Finding(f["claim"], f["verdict"], f["evidence"])
             for f in numbers["findings"]]  # fmt: skip
    wanted = [name for name, ours in PANELS.items() if all(run in runs for run in ours)]
    sections = [
        Section(
            "Findings",
            [
                KeyNumbers(key),
                Text(
                    "All runs read the same tokens in the same order and differ in the model (or "
                    "the balancing loss) alone. A verdict needs two standard errors; the standard "
                    "errors are over held-out documents, not over seeds, so they say nothing of "
                    "another run's luck. The models are thousands of times smaller than the "
                    "paper's and see a millionth of its tokens: what is not shown here may well be "
                    "true at its size."
                ),
                Findings(items),
            ],
        ),
        Section("Held-out text", [TableBlock(held_out_table(numbers))]),
        Section("Training", [TableBlock(training_table(numbers))]),
    ]
    if wanted:
        figure = document.Figure(
            comparison_figure(numbers, wanted),
            "Left: this run, mean bits per byte over a part of the held-out text. Right: "
            f"validation loss on C4. {numbers['published']['curves']['source']}",
            "Curves of this run beside those of the paper, one row a comparison",
        )
        sections.insert(1, Section("Beside the paper's curves", [figure]))
    sections += routing_report.sections(numbers["routing"], names=names)
    blocks: list[Block] = [TableBlock(table) for table in paper_tables()]
    sections.append(Section("Numbers of the paper", blocks))
    about = json.dumps(numbers["environment"], indent=1)
    minutes = ", ".join(f"{name} {value:.0f} s" for name, value in numbers["seconds"].items())
    sections.append(
        Section(
            "How this was made",
            [
                *(Text(note) for note in recipe.notes),
                Text(f"Wall time: {minutes}."),
                Code(about),
                Code(json.dumps(numbers["recipe"], indent=1)),
            ],
        )
    )
    subtitle = f"{recipe.name}: {len(runs)} models on the same {recipe.tokens:,} tokens"
    return Report("OLMoE in miniature", subtitle, sections)
