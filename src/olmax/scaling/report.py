"""The HTML report of a fitted ladder."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from olmax.reporting.document import Figure, KeyNumbers, Report, Section, TableBlock, Text
from olmax.reporting.tables import Column, Table
from olmax.scaling import plots
from olmax.scaling.fit import LadderFit
from olmax.scaling.laws import LAWS
from olmax.scaling.runs import Run


def ladder_report(
    fit: LadderFit,
    *,
    title: str,
    runs: Sequence[Run] = (),
    target_runs: Sequence[Run] = (),
    predictions: dict[str, pd.DataFrame] | None = None,
    warnings: Sequence[str] = (),
    holdout: pd.DataFrame | None = None,
    nesting: dict[str, pd.DataFrame] | None = None,
    extra: Sequence[Section] = (),
    resamples: int = 0,
    footer: str = "",
) -> Report:
    """Puts a ladder's results on one page.

    Args:
      fit: the fit.
      title: of the page.
      runs: fitted runs; the figures of both steps need them.
      target_runs: runs that the figures show as targets.
      predictions: tables of predictions by target name (`accuracy`, with `low`, `high`, `actual`
        where known).
      warnings: sentences to read first.
      holdout: of `leave_one_size_out`, one procedure.
      nesting: of `nested_errors` by target.
      extra: further sections before the coefficients.
      resamples: how many there are behind the intervals.
      footer: versions and commands.
    """
    sections = []
    if warnings:
        sections.append(Section("Read this first", [Text(sentence) for sentence in warnings]))
    for name, table in (predictions or {}).items():
        sections.append(
            Section(f"Predictions for {name}", _prediction_blocks(name, table, resamples))
        )
    if runs:
        sections.append(
            Section(
                "Step 1: size and length to loss" if fit.procedure.chained else "The fit",
                [
                    Figure(
                        plots.step1_figure(runs, fit, target_runs),
                        "Dots: final value of each run. Dashed: the fit at each size. Fit error: "
                        "mean relative error of the fitted points.",
                        "Fitted loss over training compute, one panel per task",
                    )
                ],
            )
        )
        second = plots.step2_figure(runs, fit, target_runs)
        if second is not None:
            sections.append(
                Section(
                    "Step 2: loss to accuracy",
                    [
                        Figure(
                            second,
                            "Dots: checkpoints that were fitted. Line: the fit; dotted: chance.",
                            "Accuracy over loss, one panel per task",
                        )
                    ],
                )
            )
    for name, errors in (nesting or {}).items():
        caption = (
            "The cheapest five runs, then one more each time. Where the runs cannot determine the "
            "parameters, a small error is luck."
        )
        block = Figure(plots.compute_error_figure(errors), caption, "Error over fitted compute")
        sections.append(Section(f"Compute and error at {name}", [block]))
    if holdout is not None:
        sections.append(
            Section(
                "Leave one size out",
                [
                    Figure(
                        plots.holdout_figure(holdout),
                        "Every run predicted from the runs of the other sizes.",
                        "Predicted over actual accuracy of held-out runs",
                    )
                ],
            )
        )
    sections.extend(extra)
    sections.append(Section("Coefficients", [TableBlock(t) for t in coefficient_tables(fit)]))
    if fit.runs:
        sections.append(Section("Runs", [TableBlock(runs_table(fit))]))
    subtitle = f"{len(fit.tasks)} tasks, {len(fit.runs)} runs"
    return Report(title, subtitle, sections, footer)


def _prediction_blocks(name: str, table: pd.DataFrame, resamples: int) -> list:
    blocks: list = []
    if "actual" in table:
        error = (table["accuracy"] - table["actual"]).abs()
        items = [
            (f"{100 * error.mean():.2f}", "mean absolute error, points"),
            (f"{100 * (error / table['actual']).mean():.2f}%", "mean relative error"),
        ]
        if "low" in table:
            inside = ((table["low"] <= table["actual"]) & (table["actual"] <= table["high"])).sum()
            items.append((f"{inside} of {len(table)}", "scores inside their 90% interval"))
        blocks.append(KeyNumbers(items))
    blocks.append(
        Figure(
            plots.prediction_figure(table, name),
            f"Intervals: 5% to 95% of {resamples:,} refits of both steps to resampled runs, with "
            "the scatter of a single run."
            if "low" in table
            else "Point predictions; no intervals were computed.",
            "Predicted scores with intervals",
        )
    )
    blocks.append(TableBlock(prediction_table(table, name)))
    return blocks


def prediction_table(table: pd.DataFrame, name: str) -> Table:
    """Scores in percent, intervals and errors where known."""
    shown = {
        "feature": ("predicted loss", 1, 4),
        "feature_actual": ("actual loss", 1, 4),
        "accuracy": ("predicted %", 100, 2),
        "low": ("from", 100, 1),
        "high": ("to", 100, 1),
        "actual": ("actual %", 100, 2),
        "error": ("error, points", 100, 2),
        "relative_error": ("relative %", 100, 1),
        "failures": ("failed refits", 1, 0),
    }
    used = [k for k in shown if k in table and np.isfinite(table[k].to_numpy(np.float64)).any()]
    columns = [Column("task", align="left")]
    columns += [Column(shown[key][0], digits=shown[key][2]) for key in used]
    values = table[used].to_numpy(float) * [shown[key][1] for key in used]
    rows = [[str(task), *row] for task, row in zip(table.index, values.tolist(), strict=True)]
    return Table(columns, rows, title=name)


def coefficient_tables(fit: LadderFit) -> list[Table]:
    """One table per step: parameters, fit error and what is wrong with a fit."""
    tables = []
    for step in (1, 2):
        fits = {name: task.step1 if step == 1 else task.step2 for name, task in fit.tasks.items()}
        present = {name: law for name, law in fits.items() if law is not None}
        if not present:
            continue
        law = LAWS[next(iter(present.values())).law]
        columns = [Column("task", align="left")]
        columns += [Column(p, digits=5) for p in law.parameters]
        columns += [Column("fit error %", digits=2), Column("remarks", align="left")]
        rows = [
            [name, *found.parameters.values(), 100 * found.fit_error, found.status()]
            for name, found in present.items()
        ]
        tables.append(Table(columns, rows, title=f"Step {step}: {law.formula}"))
    return tables


def runs_table(fit: LadderFit) -> Table:
    """Provenance of the fitted runs."""
    columns = [Column("run", align="left"), "N", "D", "checkpoints", Column("sha256", align="left")]
    rows = [
        [r["name"], int(r["parameters"]), int(r["tokens"]), int(r["rows"]), r["sha256"][:12]]
        for r in fit.runs
    ]
    return Table(columns, rows, title="Fitted runs")
