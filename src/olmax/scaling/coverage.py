"""How often the intervals hold: ladders simulated from a known truth, fitted like real ones.

A simulated ladder has the released one's sizes, lengths and checkpoints. Its truth is the two laws
fitted to a released task; around them lie, with the sizes measured on that task, a deviation of
each run's loss and accuracy and independent noise of each checkpoint. The shape of a run's loss
over training is the released run's, smoothed.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from olmax.scaling.fit import LadderFit, Target, TaskFit, fit_task
from olmax.scaling.prepare import prepare
from olmax.scaling.procedure import Procedure
from olmax.scaling.resampling import LEVEL, Draws, draw_counts, refit, residuals
from olmax.scaling.runs import TOKENS, Run, trailing_mean
from olmax.scaling.tasks import Task


@dataclasses.dataclass(frozen=True)
class Truth:
    """What one task's simulated ladders are drawn from."""

    fit: TaskFit
    """Of two steps."""
    procedure: Procedure
    runs: tuple[Run, ...]
    shapes: tuple[np.ndarray, ...]
    """Per run float64 [rows]: smooth log ratio of the loss to its final value."""
    run_loss: float
    """SD of a run's log loss."""
    run_accuracy: float
    """SD of a run's accuracy."""
    row_loss: float
    """SD of a checkpoint's log loss."""
    row_accuracy: float
    """SD of a checkpoint's accuracy."""

    @property
    def task(self) -> Task:
        """The task as simulated: one column for each metric."""
        return Task(
            self.fit.task.name, self.fit.task.title, self.fit.task.chance, ("loss",), ("accuracy",)
        )

    def ladder(self, rng: np.random.Generator) -> list[Run]:
        """One simulated ladder."""
        simulated = []
        for run, shape in zip(self.runs, self.shapes, strict=True):
            x = Target.of(run).inputs(self.procedure)
            deviation = self.run_loss * rng.standard_normal()
            loss = float(self.fit.feature(x)) * np.exp(deviation + shape)
            accuracy = self._accuracy(loss) + self.run_accuracy * rng.standard_normal()
            rows = len(shape)
            table = pd.DataFrame(
                {
                    TOKENS: run.tokens,
                    "loss": loss * np.exp(self.row_loss * rng.standard_normal(rows)),
                    "accuracy": np.clip(
                        accuracy + self.row_accuracy * rng.standard_normal(rows), 1e-3, 1.0
                    ),
                }
            )
            simulated.append(dataclasses.replace(run, table=table, path="", sha256=""))
        return simulated

    def score(self, target: Target, rng: np.random.Generator) -> tuple[float, float]:
        """(expected accuracy, accuracy of one run) of a target."""
        expected_loss = float(self.fit.feature(target.inputs(self.procedure)))
        loss = expected_loss * np.exp(self.run_loss * rng.standard_normal())
        one = float(self._accuracy(loss)) + self.run_accuracy * rng.standard_normal()
        return float(self._accuracy(expected_loss)), one

    def _accuracy(self, loss: np.ndarray | float) -> np.ndarray:
        assert self.fit.step2 is not None
        return self.fit.step2(loss)


def truth_of(runs: Sequence[Run], fit: LadderFit, name: str) -> Truth:
    """A fitted task as the truth of simulations, with its measured noise."""
    task, procedure = fit.tasks[name], fit.procedure
    if task.step2 is None:
        raise ValueError("coverage is of two-step procedures")
    noise1, noise2 = residuals(prepare(runs, task.task, procedure), task)
    shapes, row_loss, row_accuracy = [], [], []
    for run in runs:
        log_loss = np.log(run.values(task.task, procedure.feature))
        accuracy = run.values(task.task, procedure.accuracy)
        smooth = trailing_mean(log_loss[::-1], 5)[::-1]
        shapes.append(smooth - smooth[-procedure.last :].mean())
        # Differences of neighbours leave the trend out; late ones also the fast early descent.
        half = len(log_loss) // 2
        row_loss.append(np.diff(log_loss[half:]).std() / np.sqrt(2))
        row_accuracy.append(np.diff(accuracy[half:]).std() / np.sqrt(2))
    return Truth(
        fit=task,
        procedure=procedure,
        runs=tuple(runs),
        shapes=tuple(shapes),
        run_loss=float(noise1.std()),
        run_accuracy=float(noise2.std()),
        row_loss=float(np.median(row_loss)),
        row_accuracy=float(np.median(row_accuracy)),
    )


def coverage_study(
    runs: Sequence[Run],
    fit: LadderFit,
    targets: Sequence[Target],
    *,
    simulations: int = 320,
    samples: int = 300,
    seed: int = 0,
    level: float = LEVEL,
    progress: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """Simulates ladders, fits and resamples each, and looks where the truth lies.

    Args:
      runs: the ladder whose shape and noise are simulated.
      fit: its fit; the tasks take turns as truth.
      targets: models to predict.
      simulations: ladders in total, at least one a task.
      samples: resamples of each.
      seed: of everything.
      level: nominal coverage.

    Returns:
      One row per simulation and target: `task`, `target`, `expected`, `one_run` (truths),
      `predicted`, `low`, `high`, `expected_low`, `expected_high`, `covers_run`, `covers_expected`
      and `failures`.
    """
    say = progress or (lambda _: None)
    per_task = -(-simulations // len(fit.tasks))
    counts = draw_counts(len(runs), samples, seed)
    rows = []
    for number, name in enumerate(fit.tasks):
        truth = truth_of(runs, fit, name)
        rng = np.random.default_rng([seed, number])
        prepared = [prepare(truth.ladder(rng), truth.task, fit.procedure) for _ in range(per_task)]
        fits = [fit_task(data, fit.procedure) for data in prepared]
        say(f"{name}: {per_task} simulated ladders fitted")
        refits = refit(prepared, fits, counts, fit.procedure)
        for one, task_draws in zip(fits, refits, strict=True):
            assert one.step2 is not None
            laws: dict[str, tuple[str, str | None]] = {name: (one.step1.law, one.step2.law)}
            draws = Draws(fit.procedure, laws, counts, {name: task_draws}, seed)
            for target in targets:
                expected, single = truth.score(target, rng)
                low, high = draws.interval(name, target, level=level)
                elow, ehigh = draws.interval(name, target, level=level, noise=False)
                rows.append(
                    {
                        "task": name,
                        "target": target.name,
                        "expected": expected,
                        "one_run": single,
                        "predicted": float(one.accuracy(target.inputs(fit.procedure))),
                        "low": low,
                        "high": high,
                        "expected_low": elow,
                        "expected_high": ehigh,
                        "covers_run": low <= single <= high,
                        "covers_expected": elow <= expected <= ehigh,
                        "failures": int(task_draws.failed.sum()),
                    }
                )
    return pd.DataFrame(rows)
