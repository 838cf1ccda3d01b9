"""From runs to the arrays that both steps are fitted to."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from olmax.errors import UserError
from olmax.scaling.laws import Law
from olmax.scaling.procedure import Procedure
from olmax.scaling.runs import Run, final_value, trajectory
from olmax.scaling.tasks import Task


def step1_inputs(procedure: Procedure, runs: Sequence[Run]) -> np.ndarray:
    """float64 [inputs, runs]: (N, D), or C = D times FLOPs per token.

    Raises:
      UserError: FLOPs are needed and a run's are not known.
    """
    if procedure.step1 == "power_c":
        for run in runs:
            if run.flops_per_token is None:
                raise UserError(
                    f"{run.source}: FLOPs per token are not known; give a column 'flops_per_token' "
                    "or fit over N and D"
                )
        return np.array([[run.tokens[-1] * (run.flops_per_token or 0) for run in runs]])
    return np.array([[run.parameters for run in runs], [run.tokens[-1] for run in runs]], float)


@dataclasses.dataclass(frozen=True)
class TaskData:
    """What one task's two steps are fitted to."""

    task: Task
    step1_law: Law
    inputs: np.ndarray
    """float64 [inputs, R]."""
    values: np.ndarray
    """float64 [R]."""
    weights: np.ndarray
    """float64 [R]."""
    step2_law: Law | None = None
    x: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    """float64 [M]: features of the pooled checkpoints, helper points last."""
    y: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    """float64 [M]: accuracies."""
    groups: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, int))
    """int [M]: run of each checkpoint; helper points are in groups of their own after the runs."""
    group_weights: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    """float64 [G]: weight of every checkpoint of a group."""

    @property
    def runs(self) -> int:
        """Number of runs."""
        return len(self.values)

    def resampled(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights of both steps when run r is drawn counts[b, r] times: [B, R] and [B, G]."""
        helpers = np.ones((len(counts), len(self.group_weights) - self.runs))
        both = (
            np.concatenate([counts, helpers], 1) if self.step2_law else np.zeros((len(counts), 0))
        )
        return counts * self.weights, both * self.group_weights


def prepare(runs: Sequence[Run], task: Task, procedure: Procedure) -> TaskData:
    """Selects and smooths rows as `procedure` says.

    Raises:
      UserError: fewer runs than parameters, or columns that do not hold what is needed.
    """
    law = procedure.step1_law(task)
    if len(runs) < len(law.parameters):
        raise UserError(
            f"{len(runs)} runs cannot determine the {len(law.parameters)} parameters of "
            f"{law.formula!r}; give more runs"
            + ("" if procedure.step1 == "power_c" else " or fit over FLOPs (3 parameters)")
        )
    inputs = step1_inputs(procedure, runs)
    values = np.array([final_value(r, task, procedure.step1_metric, procedure.last) for r in runs])
    zero = np.flatnonzero(values <= 0)
    if len(zero):
        raise UserError(f"{runs[zero[0]].source}: accuracy 0 at the end has no logarithm to fit")
    weights = np.ones(len(runs))
    if procedure.step1_weights == "size":
        log_c = np.log([r.parameters * r.tokens[-1] for r in runs])
        span = max(float(np.ptp(log_c)), 1e-9)
        weights = 1 + 2 * (log_c - log_c.min()) / span
    law2 = procedure.step2_law(task)
    if law2 is None:
        return TaskData(task, law, inputs, values, weights)
    xs, ys, groups, group_weights = [], [], [], []
    for number, run in enumerate(runs):
        x, y = trajectory(
            run,
            task,
            procedure.feature,
            procedure.accuracy,
            skip=procedure.skip,
            window=procedure.window,
        )
        xs.append(x)
        ys.append(y)
        groups.append(np.full(len(x), number))
        group_weights.append(1.0 if procedure.weights == "checkpoints" else 1.0 / len(x))
    if procedure.weights == "runs":
        # Keep the total: helper points then count as they do among single checkpoints.
        factor = sum(map(len, xs)) / len(runs)
        group_weights = [w * factor for w in group_weights]
    helpers = []
    if procedure.perfect_point:
        helpers.append((0.0, 1.0, 1.0))
    if procedure.chance_points:
        helpers.append((max(x.max() for x in xs), task.chance, float(procedure.chance_points)))
    for number, (x, y, weight) in enumerate(helpers, start=len(runs)):
        xs.append(np.array([x]))
        ys.append(np.array([y]))
        groups.append(np.array([number]))
        group_weights.append(weight)
    return TaskData(
        task,
        law,
        inputs,
        values,
        weights,
        law2,
        np.concatenate(xs),
        np.concatenate(ys),
        np.concatenate(groups),
        np.array(group_weights),
    )
