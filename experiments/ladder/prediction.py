"""Stages predict and report: what the ladder says about the target, and what came of it."""

import dataclasses
import datetime
import json
import pathlib
from collections.abc import Mapping

from rich.console import Console

from experiments.ladder.presets import Ladder
from olmax import scaling
from olmax.reporting.document import Section, TableBlock
from olmax.reporting.files import environment, write_json
from olmax.reporting.tables import Column, Table
from olmax.scaling.holdout import leave_one_size_out
from olmax.scaling.identifiability import flat_warnings
from olmax.scaling.report import ladder_report, prediction_table

RUNS, TARGET = "runs", "target"
FIT, PREDICTION = "ladder.json", "prediction.json"


def predict(ladder: Ladder, directory: pathlib.Path, console: Console) -> None:
    """Fits the trained runs and writes the prediction of the target, with intervals.

    `prediction.json` says when it was written and whether the target had been trained by then.
    """
    runs = _runs(ladder, directory)
    # The published start is made for models a thousand times larger.
    procedure = dataclasses.replace(scaling.PUBLISHED, last=ladder.last, search="many")
    fit = scaling.fit_ladder(runs, procedure=procedure)
    draws = scaling.resample(runs, fit, samples=ladder.resamples, seed=ladder.seed)
    scaling.save(directory / FIT, fit, draws)
    target = _target(ladder)
    saved = scaling.SavedLadder(fit, draws)
    table = saved.predict(target)
    trained = (directory / TARGET / f"{target.name}.csv").exists()
    content = {
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "target_was_trained": trained,
        "target": target,
        "compute_ratio": _ratio(ladder),
        "runs": list(fit.runs),
        "predictions": table.to_dict("index"),
        "warnings": [*saved.warnings(target), *flat_warnings(runs, fit, [target])],
    }
    write_json(directory / PREDICTION, content)
    console.print(prediction_table(table, f"Prediction of {target.name}").rich())
    console.print(
        f"{directory / PREDICTION}: written "
        + ("after the target was trained" if trained else "before the target is trained"),
        highlight=False,
    )


def report(
    ladder: Ladder, directory: pathlib.Path, seconds: Mapping[str, float], console: Console
) -> None:
    """Sets the prediction beside what the target scored: terminal, report.html, report.json."""
    written = json.loads((directory / PREDICTION).read_text())
    saved = scaling.load(directory / FIT)
    runs = _runs(ladder, directory)
    target = scaling.read_run(directory / TARGET / f"{ladder.target_rung().name}.csv")
    table = saved.compare(target)
    title = f"{target.name}: predicted from {len(runs)} runs, then trained"
    console.print(prediction_table(table, title).rich())
    inside = int(((table["low"] <= table["actual"]) & (table["actual"] <= table["high"])).sum())
    summary = (
        f"mean absolute error {100 * table['error'].abs().mean():.2f} points; {inside} of "
        f"{len(table)} scores inside their 90% interval; target "
        f"{_ratio(ladder):.1f} x the compute of the largest run"
    )
    console.print(summary, highlight=False)
    tasks = [task.task for task in saved.fit.tasks.values()]
    holdout = None
    if len({run.size for run in runs}) >= 4:
        holdout = leave_one_size_out(runs, tasks, {"this": saved.fit.procedure})
    order = (
        "The prediction was written before the target was trained"
        if not written["target_was_trained"]
        else "The target had been trained before this prediction was written"
    )
    page = ladder_report(
        saved.fit,
        title=f"A model ladder: {ladder.name}",
        runs=runs,
        target_runs=[target],
        predictions={target.name: table},
        warnings=[f"{order} ({written['written']}).", *written["warnings"]],
        holdout=holdout,
        extra=[Section("The runs", [TableBlock(_cost_table(ladder, seconds))])],
        resamples=saved.draws.samples if saved.draws is not None else 0,
        footer=f"python -m experiments.ladder all --preset {ladder.name}",
    )
    page.write(directory / "report.html")
    write_json(
        directory / "report.json",
        {
            "environment": environment(),
            "summary": summary,
            "prediction_written": written["written"],
            "target_was_trained": written["target_was_trained"],
            "compute_ratio": _ratio(ladder),
            "results": table.to_dict("index"),
            "seconds": dict(seconds),
        },
    )
    total = sum(seconds.values())
    console.print(f"{directory / 'report.html'} ({total:.0f} s in all stages)", highlight=False)


def _runs(ladder: Ladder, directory: pathlib.Path) -> list[scaling.Run]:
    return [scaling.read_run(directory / RUNS / f"{rung.name}.csv") for rung in ladder.rungs()]


def _target(ladder: Ladder) -> scaling.Target:
    rung = ladder.target_rung()
    shape = rung.shape
    return scaling.Target(rung.name, shape.parameters, float(rung.tokens), shape.flops_per_token)


def _ratio(ladder: Ladder) -> float:
    """Compute of the target over that of the dearest run, 6ND."""
    target = ladder.target_rung()
    largest = max(rung.shape.parameters * rung.tokens for rung in ladder.rungs())
    return target.shape.parameters * target.tokens / largest


def _cost_table(ladder: Ladder, seconds: Mapping[str, float]) -> Table:
    rows = []
    for rung in [*ladder.rungs(), ladder.target_rung()]:
        stage = f"train/{rung.name}" if f"train/{rung.name}" in seconds else f"target/{rung.name}"
        rows.append(
            [
                rung.name,
                rung.shape.parameters,
                rung.tokens,
                rung.batch_size,
                f"{rung.learning_rate:.2e}",
                rung.steps,
                f"{rung.flops:.2e}",
                seconds[stage],
            ]
        )
    columns = ["run", "N", "D", "batch", "peak LR", "steps", "FLOPs", Column("seconds", digits=1)]
    return Table(columns, rows, title="Runs", strong_rows=[len(rows) - 1])
