"""Whether the runs can tell the parameters apart, and how far equally good fits disagree."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from olmax.scaling.fit import LadderFit, Target
from olmax.scaling.prepare import TaskData, prepare
from olmax.scaling.procedure import Procedure
from olmax.scaling.reference import huber_objective
from olmax.scaling.runs import Run

CLOSE = 0.02
"""Sizes, lengths or tokens per parameter that differ by less than this share count as one."""
EQUALLY_GOOD = 0.01
"""Share of the objective within which two fits count as equally good."""
WIDE = 0.05
"""Relative width of equally good predictions that is worth a warning."""


def _distinct(values: Sequence[float]) -> int:
    ordered = np.sort(np.log(np.asarray(values, np.float64)))
    return 1 + int(np.sum(np.diff(ordered) > CLOSE))


def design_warnings(runs: Sequence[Run], procedure: Procedure) -> list[str]:
    """What the choice of sizes and lengths alone rules out, in sentences.

    A power law with an offset takes three levels of its variable. With tokens proportional to
    parameters the two terms of L(N, D) cannot be told apart, whatever the number of runs.
    """
    found = []
    if procedure.step1 == "power_c":
        levels = _distinct([run.parameters * run.tokens[-1] for run in runs])
        if levels < 3:
            found.append(
                f"{levels} levels of compute cannot determine A, alpha and E; give 3 or more"
            )
        return found
    sizes = _distinct([run.parameters for run in runs])
    lengths = _distinct([run.tokens[-1] for run in runs])
    if sizes < 3:
        what = "a single size" if sizes == 1 else f"{sizes} sizes"
        found.append(
            f"{what} ({', '.join(sorted({run.size for run in runs}))}) cannot determine A, alpha "
            "and E of L(N, D); give at least 3 sizes"
        )
    if lengths < 3:
        found.append(
            f"{lengths} lengths cannot determine B, beta and E of L(N, D); give at least 3"
        )
    if len(runs) > 2 and _distinct([run.tokens[-1] / run.parameters for run in runs]) == 1:
        found.append(
            "tokens are proportional to parameters in all runs: the terms of N and of D cannot be "
            "told apart; add runs of another length"
        )
    return found


@dataclasses.dataclass(frozen=True)
class EquallyGood:
    """Predictions of step 1 at a target that fit the runs equally well."""

    best: float
    low: float
    high: float

    @property
    def relative_width(self) -> float:
        """(high - low) / best."""
        return (self.high - self.low) / self.best

    @property
    def flat(self) -> bool:
        """Whether the objective leaves the prediction open."""
        return self.relative_width > WIDE


def equally_good_range(
    prepared: Sequence[TaskData],
    target: np.ndarray,
    *,
    delta: float,
    tolerance: float = EQUALLY_GOOD,
    points: int = 25,
    span: float = 3.0,
    refinement: int = 15,
) -> list[EquallyGood]:
    """Range of step 1's prediction at `target` over fits within `tolerance` of the best objective.

    A value is forced at the target by a heavy extra point, and everything else is refitted around
    it: the profile of the objective. It is taken at `points` values between best / span and
    best * span, and finely between the last value that fits and the first that does not.

    Args:
      prepared: tasks over the same runs.
      target: float64 [inputs].
      delta: of the Huber objective.
      tolerance: share of the objective.
      points: of the profile; odd, so that the best value is one of them.
      span: furthest factor that is looked at; an end there is open.
      refinement: values between those two.
    """
    from olmax.scaling import batched

    law, inputs = prepared[0].step1_law, prepared[0].inputs
    weights = np.stack([data.weights for data in prepared])
    starts = batched.shared_starts(law)
    best = batched.solve_huber(
        law, inputs, np.stack([data.values for data in prepared]), weights, starts, delta=delta
    )
    centres = law(best.parameters, *target)
    profile = _Profile(prepared, target, delta)
    # Fine near the best value, coarse further out.
    steps = np.linspace(-1, 1, points)
    logs = np.log(centres)[:, None] + np.log(span) * np.sign(steps) * np.abs(steps) ** 2
    tasks = np.repeat(np.arange(len(prepared)), points)
    near = np.repeat(best.parameters[:, None], points, 0)
    spread = np.broadcast_to(starts[:4], (len(near), *starts[:4].shape))
    found = profile.solve(tasks, logs.ravel(), np.concatenate([near, spread], 1))
    for _ in range(2):
        # The profile is continuous, so a neighbour's solution is a good start.
        grid = found.reshape(len(prepared), points, -1)
        lent = np.stack([np.roll(grid, shift, 1) for shift in (-1, 1)], 2)
        found = profile.polish(tasks, logs.ravel(), found, lent.reshape(len(tasks), 2, -1))
    # Few runs can be fitted nearly exactly; residuals of 1e-4 are then as good as none.
    limits = best.objective * (1 + tolerance) + 0.5e-8 * weights.sum(1)
    inside = (profile.objective(tasks, found) <= limits[tasks]).reshape(len(prepared), points)
    grid = found.reshape(len(prepared), points, -1)
    middle = points // 2
    inside[:, middle], grid[:, middle] = True, best.parameters
    # At each end of each task once more, finely, from `good`, which fits, to `bad`, which does not.
    ends = np.array([[np.flatnonzero(row)[0], np.flatnonzero(row)[-1]] for row in inside])
    good = ends.ravel()
    bad = np.clip(np.add(ends, [-1, 1]), 0, points - 1).ravel()
    both = np.repeat(np.arange(len(prepared)), 2)
    fits = grid[both, good]
    shares = np.arange(1, refinement + 1) / (refinement + 1)
    between = logs[both, good][:, None] * (1 - shares) + logs[both, bad][:, None] * shares
    tasks = np.repeat(both, refinement)
    sides = np.repeat(np.stack([fits, grid[both, bad]], 1), refinement, 0)
    found = profile.polish(tasks, between.ravel(), sides[:, 0], sides[:, 1:])
    fine = (profile.objective(tasks, found) <= limits[tasks]).reshape(len(both), refinement)
    furthest = np.where(fine.any(1), refinement - 1 - np.argmax(fine[:, ::-1], 1), -1)
    steps = found.reshape(len(both), refinement, -1)
    fits = np.where((furthest >= 0)[:, None], steps[np.arange(len(both)), furthest], fits)
    reached = law(fits, *target).reshape(-1, 2)
    return [
        EquallyGood(float(c), float(min(c, a)), float(max(c, b)))
        for c, (a, b) in zip(centres, reached, strict=True)
    ]


def flat_warnings(runs: Sequence[Run], fit: LadderFit, targets: Sequence[Target]) -> list[str]:
    """Tasks whose objective leaves a target open, with the range of equally good predictions."""
    found = []
    prepared = [prepare(runs, task.task, fit.procedure) for task in fit.tasks.values()]
    for target in targets:
        ranges = equally_good_range(
            prepared, target.inputs(fit.procedure), delta=fit.procedure.delta
        )
        found += [
            f"{name} at {target.name}: fits within 1% of the best objective predict "
            f"{span.low:.4g} to {span.high:.4g} in step 1 (best {span.best:.4g})"
            for name, span in zip(fit.tasks, ranges, strict=True)
            if span.flat
        ]
    return found


class _Profile:
    """Refits of step 1 with a value forced at the target."""

    def __init__(self, prepared: Sequence[TaskData], target: np.ndarray, delta: float):
        self._law, self._delta = prepared[0].step1_law, delta
        self._plain = prepared[0].inputs
        self._inputs = np.concatenate([prepared[0].inputs, target[:, None]], 1)
        self._values = np.stack([data.values for data in prepared])
        self._weights = np.stack([data.weights for data in prepared])

    def _problem(self, tasks: np.ndarray, logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weights = self._weights[tasks]
        values = np.column_stack([self._values[tasks], np.exp(logs)])
        return values, np.column_stack([weights, 1e3 * weights.sum(1)])

    def solve(self, tasks: np.ndarray, logs: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Parameters [R, P] of task `tasks[r]` with exp(logs[r]) at the target."""
        from olmax.scaling import batched

        values, weights = self._problem(tasks, logs)
        found = batched.solve_huber(
            self._law, self._inputs, values, weights, starts, delta=self._delta
        )
        return self.polish(tasks, logs, found.parameters, starts)

    def polish(
        self, tasks: np.ndarray, logs: np.ndarray, known: np.ndarray, starts: np.ndarray
    ) -> np.ndarray:
        """As `solve`, downhill from `known` [R, P] and `starts` [R, S, P]."""
        from olmax.scaling import batched

        values, weights = self._problem(tasks, logs)
        starts = np.concatenate([known[:, None], starts], 1)
        return batched.polish_huber(
            self._law, self._inputs, values, weights, starts, delta=self._delta
        ).parameters

    def objective(self, tasks: np.ndarray, parameters: np.ndarray) -> np.ndarray:
        """float64 [R]: what the runs alone make of parameters [R, P]."""
        return np.array(
            [
                huber_objective(
                    self._law, p, self._plain, self._values[t], self._weights[t], self._delta
                )
                for t, p in zip(tasks, parameters, strict=True)
            ]
        )
