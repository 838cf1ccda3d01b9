"""Figures of a fitted ladder."""

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from olmax.reporting import figures
from olmax.scaling.fit import LadderFit, Target, TaskFit
from olmax.scaling.prepare import step1_inputs
from olmax.scaling.runs import Run, final_value, trajectory
from olmax.scaling.tasks import TASKS


def _compute(runs: Sequence[Run]) -> np.ndarray:
    return np.array([6.0 * run.parameters * run.tokens[-1] for run in runs])


def _colors(runs: Sequence[Run]) -> dict[str, str]:
    sizes = sorted({run.size for run in runs}, key=lambda s: _size_of(runs, s))
    return {size: figures.PALETTE[i % len(figures.PALETTE)] for i, size in enumerate(sizes)}


def _size_of(runs: Sequence[Run], label: str) -> int:
    return next(run.parameters for run in runs if run.size == label)


_COLUMNS = 4


def _grid(count: int, *, height: float = 2.6) -> tuple[Figure, list[Axes]]:
    columns = min(_COLUMNS, count)
    figure, axes = figures.panels(
        -(-count // columns), columns, width=2.6 * columns + 0.6, height=height
    )
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, axes


def _title(axes: Axes, task: TaskFit, step: int) -> None:
    law = task.step1 if step == 1 else task.step2
    assert law is not None
    axes.set_title(task.task.title)
    axes.set_title(f"fit error {law.fit_error:.2%}", loc="right", fontsize=7, fontweight="normal")
    if law.status():
        # A fit that is not sound must not look like one. The corner is free: losses fall.
        axes.annotate(
            "\n".join(textwrap.wrap(law.status(), 30)),
            (0.98, 0.97),
            xycoords="axes fraction",
            ha="right",
            va="top",
            fontsize=7,
            color=figures.VERMILLION,
        )


def _legend(figure: Figure, colors: dict[str, str], targets: Sequence[Run]) -> None:
    """Sizes and markers once for all panels, below them."""
    handles = [
        Line2D([], [], marker="o", linestyle="", color=color, markersize=4, label=size)
        for size, color in colors.items()
    ]
    for marker, fill, label in (
        ("x", figures.INK, "target, actual"),
        ("o", "none", "target, predicted"),
    ):
        if targets:
            handles.append(
                Line2D(
                    [],
                    [],
                    marker=marker,
                    linestyle="",
                    color=figures.INK,
                    markerfacecolor=fill,
                    markersize=5,
                    label=label,
                )
            )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _label_bottom(axes: Sequence[Axes], text: str) -> None:
    """Labels the lowest panel of each column."""
    visible = [panel for panel in axes if panel.get_visible()]
    for panel in visible[-min(_COLUMNS, len(visible)) :]:
        panel.set_xlabel(text)


def step1_figure(runs: Sequence[Run], fit: LadderFit, targets: Sequence[Run] = ()) -> Figure:
    """Step 1 over training compute 6 N D: runs, fitted curve of every size, targets."""
    procedure, colors = fit.procedure, _colors(runs)
    with figures.style():
        figure, axes = _grid(len(fit.tasks))
        for panel, task in zip(axes, fit.tasks.values(), strict=False):
            for size, color in colors.items():
                group = [run for run in runs if run.size == size]
                values = [
                    final_value(r, task.task, procedure.step1_metric, procedure.last) for r in group
                ]
                panel.plot(_compute(group), values, "o", color=color, markersize=4, label=size)
                tokens = np.geomspace(
                    min(r.tokens[-1] for r in group) / 1.5, max(r.tokens[-1] for r in group) * 3, 60
                )
                curve = [
                    float(task.feature(_target(group[0], d).inputs(procedure))) for d in tokens
                ]
                panel.plot(6 * group[0].parameters * tokens, curve, "--", color=color, linewidth=1)
            for run in targets:
                x = _compute([run])
                actual = final_value(run, task.task, procedure.step1_metric, procedure.last)
                predicted = task.feature(step1_inputs(procedure, [run]))
                panel.plot(x, actual, "x", color=figures.INK, markersize=6)
                panel.plot(x, predicted, "o", mfc="none", color=figures.INK, markersize=5)
            panel.set_xscale("log")
            _title(panel, task, 1)
        _label_bottom(axes, "training FLOPs, 6ND")
        axes[0].set_ylabel(_feature_name(fit))
        _legend(figure, colors, targets)
    return figure


def _target(run: Run, tokens: float) -> Target:
    return Target(run.size, run.parameters, float(tokens), run.flops_per_token)


def _feature_name(fit: LadderFit) -> str:
    if not fit.procedure.chained:
        return "accuracy"
    return {
        "task_loss": "task loss (bits per byte)",
        "c4": "C4 loss (nats per token)",
        "task_ce": "TaskCE (nats)",
    }[fit.procedure.feature]


def step2_figure(runs: Sequence[Run], fit: LadderFit, targets: Sequence[Run] = ()) -> Figure | None:
    """Step 2: the checkpoints that were fitted, the curve, and where the targets lie.

    None where the procedure has no second step.
    """
    procedure, colors = fit.procedure, _colors(runs)
    if not procedure.chained:
        return None
    with figures.style():
        figure, axes = _grid(len(fit.tasks))
        for panel, task in zip(axes, fit.tasks.values(), strict=False):
            assert task.step2 is not None
            seen = []
            for run in runs:
                x, y = trajectory(
                    run,
                    task.task,
                    procedure.feature,
                    procedure.accuracy,
                    skip=procedure.skip,
                    window=procedure.window,
                )
                panel.plot(x, y, ".", color=colors[run.size], markersize=2, alpha=0.5)
                seen += [x.min(), x.max()]
            for run in targets:
                x = final_value(run, task.task, procedure.feature, procedure.last)
                predicted = float(task.feature(step1_inputs(procedure, [run]))[0])
                actual = final_value(run, task.task, procedure.accuracy, procedure.last)
                panel.plot(x, actual, "x", color=figures.INK, markersize=6)
                panel.plot(
                    predicted,
                    task.step2(predicted),
                    "o",
                    mfc="none",
                    color=figures.INK,
                    markersize=5,
                )
                seen += [x, predicted]
            grid = np.linspace(min(seen) * 0.97, max(seen), 200)
            panel.plot(grid, task.step2(grid), "-", color=figures.INK, linewidth=1.2)
            panel.axhline(task.task.chance, color=figures.GREY, linewidth=0.8, linestyle=":")
            _title(panel, task, 2)
        _label_bottom(axes, _feature_name(fit))
        axes[0].set_ylabel("accuracy")
        _legend(figure, colors, targets)
    return figure


def prediction_figure(table: pd.DataFrame, title: str) -> Figure:
    """Predicted scores with intervals beside actual ones.

    Args:
      table: by task: `accuracy`; optional `low`, `high`, `actual`.
      title: of the figure.
    """
    with figures.style():
        figure, (panel,) = figures.panels(1, 1, width=7.5, height=0.36 * len(table) + 1.1)
        y = np.arange(len(table))[::-1]
        predicted = 100 * table["accuracy"].to_numpy()
        if "low" in table:
            low, high = 100 * table["low"].to_numpy(), 100 * table["high"].to_numpy()
            panel.hlines(y, low, high, color=figures.SKY, linewidth=5, label="90% interval")
        panel.plot(predicted, y, "o", color=figures.BLUE, markersize=6, label="predicted")
        if "actual" in table:
            panel.plot(
                100 * table["actual"],
                y,
                "x",
                color=figures.VERMILLION,
                markersize=7,
                label="actual",
            )
        titles = [TASKS[n].title if n in TASKS else n for n in map(str, table.index)]
        panel.set_yticks(y, titles)
        panel.set_xlabel("accuracy (%)")
        panel.set_title(title)
        panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def compute_error_figure(errors: pd.DataFrame) -> Figure:
    """Error at a target against the compute of the runs that were fitted.

    Args:
      errors: `flops`, `error` (mean absolute, points) and `identified` by nested ladder, see
        `olmax.scaling.nesting.nested_errors`.
    """
    with figures.style():
        figure, (panel,) = figures.panels(1, 1, width=6.4, height=2.8)
        panel.plot(errors["flops"], errors["error"], "-", color=figures.FAINT)
        for identified, color, label in (
            (True, figures.BLUE, "3 sizes and lengths or more"),
            (False, figures.VERMILLION, "parameters not determined"),
        ):
            part = errors[errors["identified"] == identified]
            if len(part):
                panel.plot(part["flops"], part["error"], "o", color=color, label=label)
        panel.set_xscale("log")
        panel.set_xlabel("FLOPs of all fitted runs, 6ND")
        panel.set_ylabel("mean absolute error (points)")
        panel.set_ylim(0, 1.15 * errors["error"].to_numpy(np.float64).max())
        panel.legend()
    return figure


def holdout_figure(table: pd.DataFrame) -> Figure:
    """Leave-one-size-out: predicted against actual accuracy of every held-out run.

    Args:
      table: of `olmax.scaling.holdout.leave_one_size_out`, one procedure.
    """
    with figures.style():
        figure, (panel,) = figures.panels(1, 1, width=4.6, height=4.0)
        for i, (size, part) in enumerate(table.groupby("size", sort=False)):
            panel.plot(
                100 * part["actual"],
                100 * part["predicted"],
                "o",
                color=figures.PALETTE[i % len(figures.PALETTE)],
                markersize=4,
                label=f"without {size}: {100 * part['error'].abs().mean():.1f} points",
            )
        low = 100 * min(table["actual"].min(), table["predicted"].min())
        high = 100 * max(table["actual"].max(), table["predicted"].max())
        panel.plot([low, high], [low, high], "-", color=figures.GREY, linewidth=1)
        panel.set_xlabel("actual accuracy (%)")
        panel.set_ylabel("predicted without this size (%)")
        panel.legend(fontsize=7)
    return figure
