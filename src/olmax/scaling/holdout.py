"""Choosing a procedure by the ladder alone: every size is held out in turn and predicted.

Nothing here sees a target. A held-out size is predicted from the other sizes, so the error is of
extrapolation to the largest size, of interpolation, and of going back to the smallest.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from olmax.errors import UserError
from olmax.scaling.fit import LadderFit, fit_ladder, fit_step1, fit_step2
from olmax.scaling.prepare import prepare, step1_inputs
from olmax.scaling.procedure import PUBLISHED, Procedure
from olmax.scaling.runs import Run, final_value
from olmax.scaling.tasks import Task


def candidates() -> dict[str, Procedure]:
    """Procedures that are compared, by a name that says how they differ from the published one."""
    found = {}
    for base, delta, weights1, weights2, floor, skip in itertools.product(
        ("task_loss", "flops", "c4"),
        (PUBLISHED.delta, 1e-2),
        ("equal", "size"),
        ("checkpoints", "runs"),
        ("free", "chance"),
        (0.1, 0.5),
    ):
        name = [base]
        name += ["delta 0.01"] * (delta != PUBLISHED.delta)
        name += ["step 1 by size"] * (weights1 == "size")
        name += ["runs weighted"] * (weights2 == "runs")
        name += ["chance floor"] * (floor == "chance")
        name += ["last half"] * (skip == 0.5)
        found[", ".join(name)] = Procedure(
            feature="c4" if base == "c4" else "task_loss",
            step1="power_c" if base == "flops" else "power_nd",
            delta=delta,
            step1_weights=weights1,
            weights=weights2,
            floor=floor,
            skip=skip,
        )
    return found


def leave_one_size_out(
    runs: Sequence[Run],
    tasks: Sequence[Task],
    procedures: Mapping[str, Procedure],
    *,
    progress: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """Predicts every run from the runs of the other sizes.

    Returns:
      One row per procedure, task and run: `procedure`, `task`, `size`, `run`, `predicted`,
      `actual`, `error` (predicted - actual).

    Raises:
      UserError: fewer than four sizes, of which three must remain.
    """
    sizes = list(dict.fromkeys(run.size for run in runs))
    if len(sizes) < 4:
        raise UserError(
            f"leaving one size out needs at least 4 sizes, three to fit; there are {len(sizes)}"
        )

    # Many procedures share a step, so each step is fitted once.
    @functools.cache
    def first(size: str, task: Task, key: tuple) -> Callable:
        procedure = _first_of(key)
        data = prepare([run for run in runs if run.size != size], task, procedure)
        found = fit_step1(data, procedure)
        return lambda inputs: found(*inputs)

    @functools.cache
    def second(size: str, task: Task, key: tuple) -> Callable:
        procedure = _second_of(key)
        data = prepare([run for run in runs if run.size != size], task, procedure)
        return fit_step2(data, procedure)

    actuals = {}
    for procedure in procedures.values():
        accuracy, last = procedure.accuracy, procedure.last
        for run, task in itertools.product(runs, tasks):
            key = (run.name, task.name, accuracy, last)
            if key not in actuals:
                actuals[key] = final_value(run, task, accuracy, last)
    rows = []
    for size in sizes:
        held = [run for run in runs if run.size == size]
        for name, procedure in procedures.items():
            if progress:
                progress(f"without {size}: {name}")
            inputs = step1_inputs(procedure, held)
            for task in tasks:
                predicted = first(size, task, _first_key(procedure))(inputs)
                if procedure.chained:
                    predicted = second(size, task, _second_key(procedure))(predicted)
                for run, value in zip(held, predicted, strict=True):
                    actual = actuals[run.name, task.name, procedure.accuracy, procedure.last]
                    rows.append((name, task.name, size, run.name, float(value), actual))
    columns = ["procedure", "task", "size", "run", "predicted", "actual"]
    table = pd.DataFrame(rows, columns=columns)
    table["error"] = table["predicted"] - table["actual"]
    return table


_FIRST = ("feature", "step1", "delta", "step1_weights", "last", "accuracy", "search")
_SECOND = ("feature", "step2", "weights", "floor", "skip", "window", "last", "accuracy")
_SECOND += ("perfect_point", "chance_points", "search")


def _first_key(procedure: Procedure) -> tuple:
    return tuple(getattr(procedure, name) for name in _FIRST)


def _first_of(key: tuple) -> Procedure:
    return Procedure(**dict(zip(_FIRST, key, strict=True)))


def _second_key(procedure: Procedure) -> tuple:
    return tuple(getattr(procedure, name) for name in _SECOND)


def _second_of(key: tuple) -> Procedure:
    return Procedure(**dict(zip(_SECOND, key, strict=True)))


def ranking(table: pd.DataFrame, *, averages: int = 3) -> pd.DataFrame:
    """Mean absolute error in points by procedure, best first.

    Columns: `all` (mean over the held-out sizes), and one per size. Means of the best procedures of
    different kinds (first word of the name) compete too: two procedures that err differently.

    Args:
      table: of `leave_one_size_out`.
      averages: how many of the best of each kind are paired.
    """
    scores = _score(table)
    kinds: dict[str, list[str]] = {}
    for name in scores.index:
        kinds.setdefault(name.split(",")[0], []).append(name)
    pairs = []
    for a, b in itertools.combinations(kinds.values(), 2):
        for one, other in itertools.product(a[:averages], b[:averages]):
            index = ["task", "size", "run"]
            left = table[table.procedure == one].set_index(index)
            right = table[table.procedure == other].set_index(index)
            mean = left.copy()
            mean["predicted"] = (left.predicted + right.predicted.reindex(left.index)) / 2
            mean["error"] = mean.predicted - mean.actual
            mean["procedure"] = f"mean of ({one}) and ({other})"
            pairs.append(mean.reset_index())
    if pairs:
        scores = pd.concat([scores, _score(pd.concat(pairs))]).sort_values("all")
    return scores


def _score(table: pd.DataFrame) -> pd.DataFrame:
    points = table.assign(points=100 * table["error"].abs())
    by_size = points.pivot_table(index="procedure", columns="size", values="points", sort=False)
    by_size.insert(0, "all", by_size.mean(axis=1))
    return by_size.sort_values(by="all", kind="stable")


def fit_chosen(
    runs: Sequence[Run], tasks: Sequence[Task], name: str, procedures: Mapping[str, Procedure]
) -> list[LadderFit]:
    """Fits to the whole ladder of what a name in `ranking` stands for; predictions are averaged."""
    if name.startswith("mean of ("):
        parts = name.removeprefix("mean of (").removesuffix(")").split(") and (")
    else:
        parts = [name]
    return [
        fit_ladder(runs, tasks=tasks, procedure=procedures[part], check=False) for part in parts
    ]


def mean_absolute_error(fits: Sequence[LadderFit], run: Run) -> tuple[float, np.ndarray]:
    """(mean absolute error in points over the tasks, signed errors [tasks]) of averaged fits."""
    errors = np.mean([fit.compare(run)["error"].to_numpy() for fit in fits], axis=0) * 100
    return float(np.abs(errors).mean()), errors
