"""Fitting a ladder and predicting from it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from olmax.errors import UserError
from olmax.scaling import reference
from olmax.scaling.laws import LAWS, Law
from olmax.scaling.prepare import TaskData, prepare
from olmax.scaling.procedure import PUBLISHED, Procedure
from olmax.scaling.runs import Run, final_value
from olmax.scaling.tasks import Task, find_tasks

EXCESS = 0.01
"""Share by which a better objective elsewhere counts as a fit that has not converged."""


@dataclasses.dataclass(frozen=True)
class LawFit:
    """One fitted law."""

    law: str
    parameters: dict[str, float]
    objective: float
    fit_error: float
    """Mean of |fitted / observed - 1| over the fitted points."""
    points: int
    """Helper points not counted."""
    at_bounds: tuple[str, ...]
    excess: float | None = None
    """Share by which the objective lies above the best one of many starts; None: not checked."""
    message: str = ""
    """The optimiser's own words."""

    @property
    def converged(self) -> bool:
        """Whether the objective is a number and no other start led to a clearly better fit."""
        return bool(np.isfinite(self.objective)) and (self.excess is None or self.excess <= EXCESS)

    @property
    def vector(self) -> np.ndarray:
        """float64 [P]."""
        return np.array(list(self.parameters.values()))

    def __call__(self, *inputs: Any) -> np.ndarray:
        return LAWS[self.law](self.vector, *inputs)

    def status(self) -> str:
        """What a reader has to know before using the fit; empty when nothing."""
        notes = []
        if not np.isfinite(self.objective):
            notes.append("not converged (the objective is not a number where it stopped)")
        elif not self.converged:
            notes.append(
                f"not converged (objective {self.excess:.1%} above the best of many starts)"
            )
        if self.at_bounds:
            notes.append(f"at a bound: {', '.join(self.at_bounds)}")
        return "; ".join(notes)


@dataclasses.dataclass(frozen=True)
class TaskFit:
    """Both steps of one task."""

    task: Task
    step1: LawFit
    step2: LawFit | None

    def feature(self, inputs: np.ndarray) -> np.ndarray:
        """What step 1 predicts at inputs [inputs, ...]."""
        return self.step1(*inputs)

    def accuracy(self, inputs: np.ndarray) -> np.ndarray:
        """Predicted accuracy at inputs [inputs, ...]."""
        value = self.feature(inputs)
        return value if self.step2 is None else self.step2(value)


@dataclasses.dataclass(frozen=True)
class Target:
    """A model to predict."""

    name: str
    parameters: float
    tokens: float
    flops_per_token: float | None = None
    """6 N when not given."""

    def inputs(self, procedure: Procedure) -> np.ndarray:
        """float64 [inputs]: for step 1."""
        if procedure.step1 == "power_c":
            per_token = self.flops_per_token or 6 * self.parameters
            return np.array([per_token * self.tokens])
        return np.array([self.parameters, self.tokens])

    @classmethod
    def of(cls, run: Run) -> "Target":
        """The model that a run trained."""
        return cls(run.name, run.parameters, float(run.tokens[-1]), run.flops_per_token)


@dataclasses.dataclass(frozen=True)
class LadderFit:
    """All tasks of a ladder, fitted alike."""

    procedure: Procedure
    tasks: dict[str, TaskFit]
    runs: tuple[dict[str, Any], ...]
    """Provenance: `Run.summary()` of every fitted run."""
    warnings: tuple[str, ...] = ()

    def predict(self, target: Target) -> pd.DataFrame:
        """One row per task: `feature` (nan without a step 2) and `accuracy`."""
        x = target.inputs(self.procedure)
        rows = []
        for name, fit in self.tasks.items():
            feature = float(fit.feature(x))
            accuracy = float(fit.accuracy(x))
            rows.append((name, feature if fit.step2 else np.nan, accuracy))
        return pd.DataFrame(rows, columns=["task", "feature", "accuracy"]).set_index("task")

    def compare(self, run: Run) -> pd.DataFrame:
        """Predictions beside what a run scored.

        Columns: `feature`, `feature_actual`, `accuracy` (chained), `step2` (from the actual
        feature), `actual`, `error` (accuracy - actual) and `relative_error` (its share, unsigned).
        """
        table = self.predict(Target.of(run))
        for name, fit in self.tasks.items():
            p = self.procedure
            actual = final_value(run, fit.task, p.accuracy, p.last)
            table.loc[name, "actual"] = actual
            if fit.step2 is not None:
                feature = final_value(run, fit.task, p.feature, p.last)
                table.loc[name, "feature_actual"] = feature
                table.loc[name, "step2"] = float(fit.step2(feature))
        table["error"] = table["accuracy"] - table["actual"]
        table["relative_error"] = (table["error"] / table["actual"]).abs()
        return table


def fit_ladder(
    runs: Sequence[Run],
    *,
    tasks: Sequence[Task] | None = None,
    procedure: Procedure = PUBLISHED,
    check: bool = True,
) -> LadderFit:
    """Fits every task with the published optimisers.

    Args:
      runs: the ladder.
      tasks: the paper's eight, or those found in the runs' columns, when not given.
      procedure: the published one by default.
      check: also search from many starts, to know whether the published single start sufficed.

    Raises:
      UserError: bad runs, or fewer runs than parameters.
    """
    from olmax.scaling.identifiability import design_warnings

    if not runs:
        raise UserError("no runs to fit; give CSV files of ladder runs")
    if tasks is None:
        tasks = find_tasks(runs[0].table.columns)
        if not tasks:
            raise UserError(
                f"{runs[0].source}: no column 'eval/downstream_bpb/<task>_bpb' with an accuracy "
                "'eval/downstream/<task>_len_norm' or '_acc' beside it"
            )
    fits = {}
    warnings = list(design_warnings(runs, procedure))
    prepared = [prepare(runs, task, procedure) for task in tasks]
    for data in prepared:
        fits[data.task.name] = fit_task(data, procedure)
    if check:
        fits = _checked(prepared, fits, procedure)
    for name, fit in fits.items():
        for step, law in (("step 1", fit.step1), ("step 2", fit.step2)):
            if law is not None and not law.converged:
                warnings.append(f"{name}, {step}: {law.status()}")
    return LadderFit(procedure, fits, tuple(run.summary() for run in runs), tuple(warnings))


def fit_task(data: TaskData, procedure: Procedure) -> TaskFit:
    """Both steps on prepared data, with the published optimisers, or the best of many starts where
    `procedure` says so.
    """
    step1 = fit_step1(data, procedure)
    if data.step2_law is None:
        return TaskFit(data.task, step1, None)
    return TaskFit(data.task, step1, fit_step2(data, procedure))


def fit_step1(data: TaskData, procedure: Procedure) -> LawFit:
    """The first step."""
    law = data.step1_law
    found = reference.minimise_huber(law, data.inputs, data.values, data.weights, procedure.delta)
    if procedure.search == "many":
        from olmax.scaling import batched

        starts = batched.shared_starts(law, [found.parameters])
        best = batched.solve_huber(
            law, data.inputs, data.values, data.weights[None], starts, delta=procedure.delta
        )
        found = _better(found, best.parameters[0], float(best.objective[0]))
    return _law_fit(law, found, data.inputs, data.values)


def fit_step2(data: TaskData, procedure: Procedure) -> LawFit:
    """The second step; `data` must have one."""
    law = data.step2_law
    assert law is not None
    weights = data.group_weights[data.groups]
    plain = None if np.all(weights == 1) else weights
    found = reference.minimise_squares(law, data.x[None], data.y, plain)
    if procedure.search == "many":
        from olmax.scaling import batched

        best = batched.solve_squares(
            law,
            data.x[None],
            data.y,
            data.groups,
            data.group_weights[None],
            batched.second_starts(law, data.x, data.y, found.parameters),
        )
        found = _better(found, best.parameters[0], float(best.objective[0]))
    real = data.groups < data.runs
    return _law_fit(law, found, data.x[None, real], data.y[real])


def _better(
    found: reference.Solution, parameters: np.ndarray, objective: float
) -> reference.Solution:
    if np.isfinite(found.objective) and found.objective <= objective:
        return found
    return reference.Solution(parameters, objective, "best of many starts")


def _law_fit(law: Law, found: reference.Solution, inputs, values) -> LawFit:
    return LawFit(
        law=law.name,
        parameters=dict(zip(law.parameters, map(float, found.parameters), strict=True)),
        objective=found.objective,
        fit_error=float(np.mean(np.abs(law(found.parameters, *inputs) / values - 1))),
        points=len(values),
        at_bounds=law.at_bounds(found.parameters),
        message=found.message,
    )


def _checked(prepared: list[TaskData], fits: dict[str, TaskFit], procedure: Procedure):
    from olmax.scaling import batched

    law = prepared[0].step1_law
    best1 = batched.solve_huber(
        law,
        prepared[0].inputs,
        np.stack([data.values for data in prepared]),
        np.stack([data.weights for data in prepared]),
        np.stack([batched.shared_starts(law, [fits[d.task.name].step1.vector]) for d in prepared]),
        delta=procedure.delta,
    )
    checked = {}
    for number, data in enumerate(prepared):
        fit = fits[data.task.name]
        step1 = _with_excess(fit.step1, float(best1.objective[number]))
        step2 = fit.step2
        if step2 is not None and data.step2_law is not None:
            starts = batched.second_starts(data.step2_law, data.x, data.y, step2.vector)
            best2 = batched.solve_squares(
                data.step2_law, data.x[None], data.y, data.groups, data.group_weights[None], starts
            )
            step2 = _with_excess(step2, float(best2.objective[0]))
        checked[data.task.name] = TaskFit(fit.task, step1, step2)
    return checked


def _with_excess(fit: LawFit, best: float) -> LawFit:
    if not np.isfinite(fit.objective):
        return dataclasses.replace(fit, excess=np.inf)
    return dataclasses.replace(fit, excess=max(0.0, fit.objective / max(best, 1e-300) - 1))
