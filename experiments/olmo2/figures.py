"""Figures of the report, and the one that opens the README."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter, MaxNLocator

from experiments.olmo2.comparison import AFTER, BEFORE, ingredients
from experiments.olmo2.evaluate import accuracy, answer_bits, bits_per_byte
from experiments.olmo2.suite import WORDED_TASKS
from olmax.reporting.figures import (
    BLUE,
    FAINT,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    label_lines,
    panels,
    save_png,
    style,
)

Rows = Sequence[Mapping[str, Any]]
RUN_COLORS = (VERMILLION, ORANGE, PURPLE, SKY, GREEN)
SOURCE_COLORS = {"arithmetic": VERMILLION, "docs": BLUE, "code": GREEN, "tests": GREY}


def series(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (millions) and values of a metric, where it was recorded."""
    known = {row["step"]: row["tokens"] for row in rows if "tokens" in row}
    found = [(known[row["step"]] / 1e6, row[name]) for row in rows if row.get(name) is not None]
    if not found:
        return np.zeros(0), np.zeros(0)
    x, y = zip(*found, strict=True)
    return np.asarray(x), np.asarray(y)


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values at each point (fewer at the start)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(sums))
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def training_figure(pretrain: Rows, anneals: Mapping[str, Rows]) -> Figure:
    """Training loss, learning rate and gradient norm of pretraining and of the annealing runs."""
    with style():
        figure, axes = panels(3, 1, height=1.9, sharex=True)
        _loss_panel(axes[0], pretrain, anneals)
        for axis, name, title in (
            (axes[1], "learning_rate", "Learning rate"),
            (axes[2], "grad_norm", "Gradient norm before clipping"),
        ):
            for _, x, y, color in _runs(pretrain, anneals, name):
                axis.plot(x, y, color=color, linewidth=1.0 if name == "grad_norm" else 1.5)
            axis.set_title(title)
        axes[1].set_ylim(bottom=0)
        axes[1].yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes[2].set_yscale("log")
        axes[2].yaxis.set_major_formatter(LogFormatter())
        axes[2].yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        axes[2].set_xlabel("tokens (millions)")
        return figure


def held_out_figure(pretrain: Rows, anneals: Mapping[str, Rows]) -> Figure | None:
    """Bits per byte of each source while training; None where it was not looked at."""
    names = sorted({k for row in pretrain for k in row if k.startswith("held_out/")})
    if not names:
        return None
    with style():
        figure, (axis,) = panels(1, 1, height=3.4)
        labels, ends, colors = [], [], []
        for name in names:
            source = name.removeprefix("held_out/")
            color = SOURCE_COLORS.get(source, INK)
            x, y = series(pretrain, name)
            axis.plot(x, y, color=color, marker="o", markersize=3)
            last = (x[-1], y[-1])
            for rows in anneals.values():
                later_x, later_y = series(rows, name)
                axis.plot(
                    [x[-1], *(later_x + x[-1])], [y[-1], *later_y], color=color, linewidth=1.0
                )
                last = (x[-1] + later_x[-1], later_y[-1]) if len(later_x) else last
            labels.append(source)
            ends.append(last)
            colors.append(color)
        _mark_anneal(axis, series(pretrain, "loss")[0])
        label_lines(axis, labels, ends, colors)
        axis.set_title("Bits per byte on held-out text")
        axis.set_xlabel("tokens (millions)")
        axis.margins(x=0.02)
        return figure


def benchmark_figure(results: Mapping[str, Any]) -> Figure:
    """Before and after annealing by task: bits per byte of the right answers, accuracy."""
    with style():
        figure, axes = panels(1, 2, height=3.2)
        _answers_panel(axes[0], results)
        _accuracy_panel(axes[1], results)
        return figure


def main_figure(
    pretrain: Rows, anneals: Mapping[str, Rows], results: Mapping[str, Any],
    labels: Mapping[str, str],
) -> Figure:  # fmt: skip
    """The whole run at a glance: training, held-out text, right answers."""
    with style():
        figure, axes = panels(
            1, 3, width=11.0, height=3.3, gridspec_kw={"width_ratios": [1.35, 0.9, 1.15]}
        )
        _loss_panel(axes[0], pretrain, anneals)
        axes[0].set_xlabel("tokens (millions)")
        rate = axes[0].twinx()
        for _, x, y, _ in _runs(pretrain, anneals, "learning_rate"):
            rate.fill_between(x, y, color=FAINT, linewidth=0, alpha=0.55)
        peak = series(pretrain, "learning_rate")[1].max()
        rate.set_ylim(0, 3.2 * peak)
        rate.axis("off")
        axes[0].set_zorder(rate.get_zorder() + 1)
        axes[0].patch.set_visible(False)
        x, y = series(pretrain, "learning_rate")
        rate.annotate(
            "learning rate", (0.28 * x[-1], 0.35 * y[len(x) // 4]), fontsize=8, color=GREY,
        )  # fmt: skip
        _bits_panel(axes[1], results, labels)
        _answers_panel(axes[2], results)
        axes[2].legend(loc="upper center", bbox_to_anchor=(0.0, -0.22), ncols=3, handletextpad=0.2)
        return figure


def write_main_figure(report_json: epath.PathLike, path: epath.PathLike) -> epath.Path:
    """Draws the main figure from a finished run's report.json as a PNG below 120 kB."""
    report = json.loads(epath.Path(report_json).read_text())
    curves = report["curves"]
    figure = main_figure(
        curves["pretrain"], curves["anneal"], report["evaluation"], report["shares"]
    )
    return save_png(figure, path, dpi=110)


def _runs(pretrain: Rows, anneals: Mapping[str, Rows], name: str):
    """(run, tokens, values, colour), annealing runs shifted to where pretraining ends."""
    x, y = series(pretrain, name)
    end = x[-1]
    yield "pretraining", x, y, BLUE
    for number, (run, rows) in enumerate(anneals.items()):
        x, y = series(rows, name)
        yield run, x + end, y, RUN_COLORS[number % len(RUN_COLORS)]


def _loss_panel(axis: Axes, pretrain: Rows, anneals: Mapping[str, Rows]) -> None:
    lows, highs = [], []
    window = max(1, len(series(pretrain, "loss")[0]) // 40)
    for run, x, y, color in _runs(pretrain, anneals, "cross_entropy"):
        axis.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
        axis.plot(x, smoothed(y, window), color=color, label=run)
        lows.append(y.min())
        highs.append(np.quantile(y, 0.95))
    axis.set_ylim(0.92 * min(lows), 1.05 * max(highs))
    axis.set_title("Training loss (nats per token)")
    axis.legend(loc="upper right")
    _mark_anneal(axis, series(pretrain, "loss")[0])


def _mark_anneal(axis: Axes, x: np.ndarray) -> None:
    if len(x):
        axis.axvline(x[-1], color=GREY, linewidth=0.8, linestyle=(0, (3, 3)))


def _dumbbells(axis: Axes, names, before, singles, after, *, errors) -> None:
    """One row a name: before, ingredients, after."""
    rows = np.arange(len(names))[::-1]
    for row, b, s, a, e in zip(rows, before, singles, after, errors, strict=True):
        axis.plot([b, a], [row, row], color=FAINT, linewidth=4, solid_capstyle="round", zorder=1)
        axis.errorbar(a, row, xerr=e, color=VERMILLION, linewidth=1.2, capsize=0, zorder=2)
        axis.scatter(s, [row] * len(s), s=12, color=ORANGE, zorder=3, linewidth=0)
    axis.scatter(before, rows, s=34, color=BLUE, zorder=4, label="pretrained")
    axis.scatter([], [], s=12, color=ORANGE, label="annealing runs")
    axis.scatter(after, rows, s=34, color=VERMILLION, zorder=5, label="soup")
    axis.set_yticks(rows, names)
    axis.grid(axis="y", visible=False)
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.xaxis.set_major_locator(MaxNLocator(5))


def _bits_panel(axis: Axes, results: Mapping[str, Any], labels: Mapping[str, str]) -> None:
    sources = list(results[BEFORE]["sources"])
    before = [bits_per_byte(results[BEFORE], s).value for s in sources]
    after = [bits_per_byte(results[AFTER], s).value for s in sources]
    singles = [[bits_per_byte(results[i], s).value for i in ingredients(results)] for s in sources]
    names = [f"{s}\n{labels[s]}" if labels.get(s) else s for s in sources]
    _dumbbells(axis, names, before, singles, after, errors=[0.0] * len(sources))
    axis.set_title("Bits per byte, held-out text")
    axis.set_xlabel("lower is better")


def _answers_panel(axis: Axes, results: Mapping[str, Any]) -> None:
    tasks = list(WORDED_TASKS)
    before = [answer_bits(results[BEFORE], t).value for t in tasks]
    after = [answer_bits(results[AFTER], t).value for t in tasks]
    singles = [[answer_bits(results[i], t).value for i in ingredients(results)] for t in tasks]
    names = [t.removesuffix("_rc").replace("_", "\n", 1) for t in tasks]
    _dumbbells(axis, names, before, singles, after, errors=[0.0] * len(tasks))
    axis.set_title("Bits per byte, right answers")
    axis.set_xlabel("lower is better")


def _accuracy_panel(axis: Axes, results: Mapping[str, Any]) -> None:
    tasks = list(results[BEFORE]["tasks"])
    before = [accuracy(results[BEFORE], t).value for t in tasks]
    found = [accuracy(results[AFTER], t) for t in tasks]
    singles = [[accuracy(results[i], t).value for i in ingredients(results)] for t in tasks]
    names = [t.replace("_", " ") for t in tasks]
    _dumbbells(
        axis, names, before, singles, [a.value for a in found], errors=[a.stderr for a in found]
    )
    chance = [100 * np.mean(results[BEFORE]["tasks"][t]["chance"]) for t in tasks]
    rows = np.arange(len(tasks))[::-1]
    axis.scatter(chance, rows, marker="|", s=120, color=GREY, zorder=2, label="guessing")
    axis.set_title("Accuracy (%)")
    axis.set_xlabel("higher is better; bars: one standard error")
    axis.legend(loc="upper center", bbox_to_anchor=(-0.3, -0.2), ncols=4, handletextpad=0.2)
