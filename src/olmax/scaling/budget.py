"""What a planned model will score, and the cheapest (N, D) that would score the same."""

import dataclasses
import sys
from typing import Any

import numpy as np
from rich.console import Console

from olmax.errors import UserError
from olmax.models.presets import get_preset
from olmax.reporting.files import jsonable
from olmax.reporting.tables import Column, Table
from olmax.scaling.fit import LadderFit, Target
from olmax.scaling.saved import SavedLadder

ALL = "mean of the tasks"
_SIZES = 401  # of the search over N


@dataclasses.dataclass(frozen=True)
class SameScore:
    """The least compute that reaches a score on the fitted surface."""

    score: float
    """Accuracy asked for."""
    parameters: float
    tokens: float
    compute_ratio: float
    """N D over that of the plan: its share of the cost at equal utilisation."""
    at_edge: bool
    """The optimum lies at the end of the sizes that were searched: cheaper ones may exist, but far
    from anything that was fitted."""


def same_score(fit: LadderFit, target: Target, tasks: tuple[str, ...]) -> SameScore:
    """Minimises N D among the models whose mean accuracy over `tasks` is that of `target`.

    Sizes from a tenth of the smallest fitted one to ten times the larger of target and largest are
    searched; for each the tokens follow from the score.

    Raises:
      UserError: the fit is over compute alone, so no size is better than another.
    """
    if fit.procedure.step1 == "power_c":
        raise UserError(
            "this ladder was fitted over FLOPs alone, which say nothing about how to share them "
            "between N and D; fit it over N and D"
        )
    wanted = float(_mean_accuracy(fit, tasks, target.parameters, target.tokens))
    sizes = [run["parameters"] for run in fit.runs]
    low, high = min(sizes) / 10, 10 * max(*sizes, target.parameters)
    n = np.geomspace(low, high, _SIZES)
    d = _tokens_for(fit, tasks, n, wanted, target)
    best = int(np.argmin(n * d))
    at_edge = best in (0, len(n) - 1)
    if not at_edge:
        # Once more between the neighbours of the best.
        n = np.geomspace(n[best - 1], n[best + 1], _SIZES)
        d = _tokens_for(fit, tasks, n, wanted, target)
        best = int(np.argmin(n * d))
    ratio = float(n[best] * d[best] / (target.parameters * target.tokens))
    return SameScore(wanted, float(n[best]), float(d[best]), min(ratio, 1.0), at_edge)


def _mean_accuracy(fit: LadderFit, tasks: tuple[str, ...], n, d) -> np.ndarray:
    inputs = np.stack(np.broadcast_arrays(np.asarray(n, float), np.asarray(d, float)))
    return np.mean([fit.tasks[name].accuracy(inputs) for name in tasks], axis=0)


def _tokens_for(
    fit: LadderFit, tasks: tuple[str, ...], n: np.ndarray, wanted: float, target: Target
) -> np.ndarray:
    """float64 [sizes]: fewest tokens with which each size reaches `wanted`; inf where none do."""
    low = np.full_like(n, np.log(target.tokens) - np.log(1e4))
    high = np.full_like(n, np.log(target.tokens) + np.log(1e4))
    reachable = _mean_accuracy(fit, tasks, n, np.exp(high)) >= wanted
    for _ in range(60):
        middle = (low + high) / 2
        enough = _mean_accuracy(fit, tasks, n, np.exp(middle)) >= wanted
        high, low = np.where(enough, middle, high), np.where(enough, low, middle)
    return np.where(reachable, np.exp(high), np.inf)


@dataclasses.dataclass(frozen=True)
class Outlook:
    """Scores of a planned model beside its price."""

    target: Target
    predictions: dict[str, dict[str, float]]
    """By task: `accuracy` and, when the ladder was resampled, `low` and `high`."""
    same_score: dict[str, SameScore]
    """By task, and for `ALL`."""
    price: float | None
    """Of the plan, US dollars."""
    warnings: tuple[str, ...]


def outlook(saved: SavedLadder, target: Target, *, price: float | None = None) -> Outlook:
    """Predicts a planned model and looks for cheaper ones with the same scores.

    Args:
      saved: a fitted ladder.
      target: the planned model: N without the input embedding, tokens of the run.
      price: of the plan.
    """
    table = saved.predict(target)
    columns = [name for name in ("accuracy", "low", "high") if name in table]
    predictions = {
        str(task): {name: float(table.loc[task, name]) for name in columns} for task in table.index
    }
    names = tuple(saved.fit.tasks)
    warnings = list(saved.warnings(target))
    cheaper: dict[str, SameScore] = {}
    if saved.fit.procedure.step1 == "power_c":
        warnings.append("no cheaper (N, D) sought: this ladder was fitted over FLOPs alone")
    else:
        cheaper = {name: same_score(saved.fit, target, (name,)) for name in names}
        if len(names) > 1:
            cheaper[ALL] = same_score(saved.fit, target, names)
    return Outlook(target, predictions, cheaper, price, tuple(warnings))


def add_outlook(
    saved: SavedLadder, plan: dict[str, Any], model: str, sequence_length: int, console: Console
) -> None:
    """Prints the outlook of a plan and puts it into the plan under `ladder`.

    Args:
      saved: a fitted ladder.
      plan: what `olmax plan` found, as JSON types: `tokens` and `price` are read.
      model: name of the architecture.
      sequence_length: tokens of a sequence.
      console: where tables go; warnings go to stderr.
    """
    config = get_preset(model)
    target = Target(
        model,
        config.num_non_embedding_params,
        plan["tokens"],
        config.flops_per_token(sequence_length),
    )
    found = outlook(saved, target, price=plan["price"])
    for table in outlook_tables(found):
        console.print(table.rich())
    for sentence in found.warnings:
        print(f"olmax: warning: {sentence}", file=sys.stderr)
    plan["ladder"] = jsonable(found)


def outlook_tables(found: Outlook) -> list[Table]:
    """Predicted scores, and the same scores for less."""
    intervals = any("low" in row for row in found.predictions.values())
    columns = [Column("task", align="left"), Column("predicted %", digits=1)]
    if intervals:
        columns += [Column("from", digits=1), Column("to", digits=1)]
    keys = ["accuracy", "low", "high"][: len(columns) - 1]
    rows = [[task, *(100 * row[key] for key in keys)] for task, row in found.predictions.items()]
    caption = (
        "Intervals: 90%, for the score of one run."
        if intervals
        else "No intervals: the ladder was fitted without resamples."
    )
    t = found.target
    scores = Table(
        columns,
        rows,
        title=t.name,
        caption=f"Predicted for N={_short(t.parameters)}, D={_short(t.tokens)}. {caption}",
    )
    if not found.same_score:
        return [scores]
    columns = [
        Column("same score on", align="left"),
        Column("score %", digits=1),
        "N",
        "D",
        Column("D / N", digits=0),
        Column("compute, % of the plan", digits=0),
    ]
    if found.price is not None:
        columns.append(Column("price, $", digits=0))
    edges = any(best.at_edge for best in found.same_score.values())
    if edges:
        columns.append(Column("remark", align="left"))
    rows = []
    for name, best in found.same_score.items():
        row: list = [
            name,
            100 * best.score,
            _short(best.parameters),
            _short(best.tokens),
            best.tokens / best.parameters,
            100 * best.compute_ratio,
        ]
        if found.price is not None:
            row.append(found.price * best.compute_ratio)
        if edges:
            row.append("at the edge of the search" if best.at_edge else "")
        rows.append(row)
    less = Table(
        columns,
        rows,
        title="The same score for less",
        caption="The least N D on the fitted surface; cost in proportion to N D.",
        strong_rows=[len(rows) - 1] if len(rows) > 1 else [],
    )
    return [scores, less]


def _short(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
