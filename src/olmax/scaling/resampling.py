"""Uncertainty of a ladder's predictions: whole runs are resampled and both steps refitted.

Checkpoints of one run are dependent, so a run is drawn with all of them or not at all; a run drawn
twice counts twice in both steps. All tasks share the draws, which keeps them comparable.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from olmax.scaling import batched
from olmax.scaling.fit import LadderFit, Target, TaskFit
from olmax.scaling.laws import LAWS
from olmax.scaling.prepare import TaskData, prepare
from olmax.scaling.procedure import Procedure
from olmax.scaling.runs import Run

SAMPLES = 1000
LEVEL = 0.9


@dataclasses.dataclass(frozen=True)
class TaskDraws:
    """Refits of one task."""

    step1: np.ndarray
    """float64 [B, P]."""
    step2: np.ndarray | None
    """float64 [B, P]."""
    objective1: np.ndarray | None
    """float64 [B]; None when read from a file."""
    objective2: np.ndarray | None
    failed: np.ndarray
    """bool [B]: a step did not converge or is not finite."""
    noise1: np.ndarray
    """float64 [R]: log residuals of the runs in step 1, widened for the fitted parameters."""
    noise2: np.ndarray
    """float64 [R]: what each run's final accuracy has left over after step 2."""


@dataclasses.dataclass(frozen=True)
class Draws:
    """Refits of a ladder."""

    procedure: Procedure
    laws: dict[str, tuple[str, str | None]]
    """Names of both steps' laws by task."""
    counts: np.ndarray
    """int [B, R]: how often each run was drawn."""
    tasks: dict[str, TaskDraws]
    seed: int

    @property
    def samples(self) -> int:
        """B."""
        return len(self.counts)

    def failures(self) -> dict[str, int]:
        """Number of refits by task that did not converge. They stay among the draws if finite."""
        return {name: int(task.failed.sum()) for name, task in self.tasks.items()}

    def accuracies(self, name: str, target: Target, *, noise: bool = True) -> np.ndarray:
        """float64 [B]: draws of a task's accuracy at a target.

        Args:
          name: the task.
          target: the model.
          noise: add what single runs scatter around both fits, because the target will be a single
            run as well; without it the draws are of the expected score.
        """
        task = self.tasks[name]
        law1, law2 = self.laws[name]
        rng = np.random.default_rng([self.seed, 1])
        value = LAWS[law1](task.step1, *target.inputs(self.procedure))
        pick = rng.integers(task.noise1.size, size=(2, self.samples))
        if noise:
            value = value * np.exp(task.noise1[pick[0]])
        if law2 is None or task.step2 is None:
            return value
        accuracy = LAWS[law2](task.step2, value)
        return accuracy + task.noise2[pick[1]] if noise else accuracy

    def features(self, name: str, target: Target) -> np.ndarray:
        """float64 [B]: draws of step 1's expected value at a target."""
        return LAWS[self.laws[name][0]](self.tasks[name].step1, *target.inputs(self.procedure))

    def interval(
        self, name: str, target: Target, *, level: float = LEVEL, noise: bool = True
    ) -> tuple[float, float]:
        """Central interval of `accuracies`, cut to what an accuracy can be."""
        values = self.accuracies(name, target, noise=noise)
        values = values[np.isfinite(values)]
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        return max(float(low), 0.0), min(float(high), 1.0)

    def table(self, target: Target, *, level: float = LEVEL) -> pd.DataFrame:
        """One row per task: `low`, `high` (of the score of one run), `expected_low`,
        `expected_high` (of its mean) and `failures`.
        """
        rows = {}
        for name, task in self.tasks.items():
            rows[name] = (
                *self.interval(name, target, level=level),
                *self.interval(name, target, level=level, noise=False),
                int(task.failed.sum()),
            )
        columns = ["low", "high", "expected_low", "expected_high", "failures"]
        return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def draw_counts(runs: int, samples: int, seed: int) -> np.ndarray:
    """int [B, R]: `samples` draws of `runs` runs with replacement."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(runs, np.full(runs, 1 / runs), size=samples)


def resample(
    runs: Sequence[Run],
    fit: LadderFit,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Draws:
    """Refits a ladder to resamples of its runs.

    Step 1 starts from the published start and the full ladder's fit, then from the best solutions
    of other resamples, until that changes nothing any more: a resample is a small change of the
    data, so the pool of optima covers each one's basins.

    Args:
      runs: those of `fit`.
      fit: the full ladder's.
      samples: number of resamples B.
      seed: of the draws.
      progress: called with a sentence now and then.
    """
    counts = draw_counts(len(runs), samples, seed)
    prepared = [prepare(runs, task.task, fit.procedure) for task in fit.tasks.values()]
    full = list(fit.tasks.values())
    refits = refit(prepared, full, counts, fit.procedure, progress=progress)
    tasks = dict(zip(fit.tasks, refits, strict=True))
    laws = {
        name: (task.step1.law, task.step2.law if task.step2 else None)
        for name, task in fit.tasks.items()
    }
    return Draws(fit.procedure, laws, counts, tasks, seed)


def refit(
    prepared: Sequence[TaskData],
    full: Sequence[TaskFit],
    counts: np.ndarray,
    procedure: Procedure,
    *,
    progress: Callable[[str], None] | None = None,
) -> list[TaskDraws]:
    """Both steps on resamples given by their counts [B, R].

    `prepared` has data over the same runs (sizes and lengths), `full` the fit to each.
    """
    say = progress or (lambda _: None)
    samples = len(counts)
    say(f"step 1: {samples} resamples of {len(prepared)} tasks")
    first = _refit_step1(prepared, full, counts, procedure.delta)
    draws = []
    for number, (data, task) in enumerate(zip(prepared, full, strict=True)):
        part = slice(number * samples, (number + 1) * samples)
        step1 = first.parameters[part]
        failed = ~first.converged[part] | ~np.isfinite(step1).all(1)
        second = None
        if data.step2_law is not None and task.step2 is not None:
            say(f"step 2: {samples} resamples of {data.task.name}")
            starts = np.array([data.step2_law.start, task.step2.vector])
            _, weights = data.resampled(counts)
            second = batched.solve_squares(
                data.step2_law, data.x[None], data.y, data.groups, weights, starts
            )
            failed = failed | ~second.converged | ~np.isfinite(second.parameters).all(1)
        noise1, noise2 = residuals(data, task)
        draws.append(
            TaskDraws(
                step1,
                second.parameters if second else None,
                first.objective[part],
                second.objective if second else None,
                failed,
                noise1,
                noise2,
            )
        )
    return draws


def _refit_step1(prepared, full, counts, delta: float) -> batched.BatchSolution:
    law, inputs = prepared[0].step1_law, prepared[0].inputs
    samples = len(counts)
    weights = np.concatenate([data.resampled(counts)[0] for data in prepared])
    values = np.concatenate([np.broadcast_to(d.values, counts.shape) for d in prepared])
    starts = np.concatenate(
        [
            np.broadcast_to([d.step1_law.start, t.step1.vector], (samples, 2, len(law.start)))
            for d, t in zip(prepared, full, strict=True)
        ]
    )
    best = batched.solve_huber(law, inputs, values, weights, starts, delta=delta)
    for _ in range(3):
        lent = []
        for number, data in enumerate(prepared):
            part = slice(number * samples, (number + 1) * samples)
            pool = best.parameters[part]
            scores = batched.huber_objectives(law, inputs, data.values, weights[part], pool, delta)
            lent.append(pool[np.argsort(scores, 1)[:, :3]])
        found = batched.polish_huber(
            law, inputs, values, weights, np.concatenate(lent), delta=delta
        )
        improved = found.objective < best.objective * (1 - 1e-7)
        best = found.better(best)
        if not improved.any():
            break
    return best


def residuals(data: TaskData, fit) -> tuple[np.ndarray, np.ndarray]:
    """(log residuals of step 1 [R], residuals of the final accuracy in step 2 [R]).

    Both are centred and widened by sqrt(R / (R - parameters)), at most twofold.
    """
    runs = data.runs
    log1 = np.log(data.values) - np.log(fit.step1(*data.inputs))
    noise1 = _widened(log1, len(data.step1_law.parameters))
    if fit.step2 is None or data.step2_law is None:
        return noise1, np.zeros(runs)
    last = np.array([np.flatnonzero(data.groups == r)[-1] for r in range(runs)])
    left = data.y[last] - fit.step2(data.x[last])
    return noise1, _widened(left, len(data.step2_law.parameters))


def _widened(values: np.ndarray, parameters: int) -> np.ndarray:
    runs = len(values)
    return (values - values.mean()) * min(2.0, np.sqrt(runs / max(runs - parameters, 1)))
