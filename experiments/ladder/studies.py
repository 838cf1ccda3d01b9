"""Studies around the reproduction: coverage, choice of a procedure, speed."""

import dataclasses
import math
import sys
import time

import numpy as np
import pandas as pd

from experiments.ladder.released import TARGETS, read_released
from experiments.ladder.reproduce import binomial_range
from olmax import scaling
from olmax.reporting.tables import Column, Table
from olmax.scaling import reference
from olmax.scaling.holdout import (
    candidates,
    fit_chosen,
    leave_one_size_out,
    mean_absolute_error,
    ranking,
)
from olmax.scaling.prepare import prepare
from olmax.scaling.resampling import resample


def coverage_tables(study: pd.DataFrame) -> list[Table]:
    """Shares of simulations whose interval held, by target and by task."""
    study = study.assign(
        below=study["one_run"] < study["low"],
        above=study["one_run"] > study["high"],
        width=100 * (study["high"] - study["low"]),
        bias=100 * (study["predicted"] - study["expected"]),
    )
    columns = [
        Column("", align="left"),
        "intervals",
        Column("holds, one run %", digits=1),
        Column("95% range", align="right"),
        Column("holds, expected %", digits=1),
        Column("score below %", digits=1),
        Column("score above %", digits=1),
        Column("width, points", digits=1),
        Column("bias, points", digits=2, signed=True),
        "failed refits",
    ]
    tables = []
    for by in ("target", "task"):
        groups = [("all", study), *study.groupby(by, sort=False)]
        rows = []
        for name, part in groups:
            held = int(part["covers_run"].sum())
            low, high = binomial_range(held, len(part))
            rows.append(
                [
                    str(name),
                    len(part),
                    100 * held / len(part),
                    f"{100 * low:.1f} to {100 * high:.1f}",
                    100 * part["covers_expected"].mean(),
                    100 * part["below"].mean(),
                    100 * part["above"].mean(),
                    part["width"].mean(),
                    part["bias"].mean(),
                    int(part["failures"].sum()),
                ]
            )
        simulated = len(study) // study["target"].nunique()
        tables.append(
            Table(
                columns,
                rows,
                title=f"Coverage of nominal 90% intervals by {by}",
                caption=f"{simulated} simulated ladders, each predicting every target.",
                strong_rows=[0],
            )
        )
    return tables


def choose_tables(directory: str, best: int) -> list[Table]:
    """The ranking by leave-one-size-out, then errors at the targets of default and choice."""
    runs = read_released(directory)
    tasks = scaling.get_tasks(scaling.MAIN_TASKS)
    procedures = candidates()
    table = leave_one_size_out(
        runs, tasks, procedures, progress=lambda text: print(text, file=sys.stderr)
    )
    ranked = ranking(table)
    chosen = str(ranked.index[0])
    columns = [Column("procedure", align="left"), *map(str, ranked.columns)]
    shown = list(dict.fromkeys([*ranked.index[:best], "task_loss", "flops", "c4"]))
    rows = [[name, *ranked.loc[name].astype(float)] for name in shown]
    first = Table(
        columns,
        rows,
        title="Leave one size out: mean absolute error in points",
        caption=f"{len(ranked)} candidates; `task_loss` is the paper's default.",
        strong_rows=[0],
    )
    rows = []
    for name in ("task_loss", chosen):
        fits = fit_chosen(runs, tasks, name, procedures)
        row: list = [name]
        for file in TARGETS.values():
            (run,) = read_released(directory, (file,))
            error, signed = mean_absolute_error(fits, run)
            row += [error, 100 * np.mean(np.abs(signed / 100) / _actuals(fits, run))]
        rows.append(row)
    columns = [Column("procedure", align="left")]
    for target in TARGETS:
        columns += [f"{target}, points", f"{target}, relative %"]
    second = Table(columns, rows, title="Mean absolute error at the targets")
    return [first, second]


def _actuals(fits, run) -> np.ndarray:
    return fits[0].compare(run)["actual"].to_numpy()


@dataclasses.dataclass
class _Excess:
    worst: float = -math.inf
    worse: int = 0
    better: int = 0
    count: int = 0

    def add(self, ours: float, theirs: float) -> None:
        """Counts one refit: more than 1e-6 above or below scipy's objective."""
        excess = ours / theirs - 1
        self.worst = max(self.worst, excess)
        self.worse += excess > 1e-6
        self.better += excess < -1e-6
        self.count += 1


def speed_table(directory: str, samples: int, compare: int, seed: int) -> Table:
    """Seconds of the batched refits, and how their objectives compare with scipy's."""
    runs = read_released(directory)
    tasks = scaling.get_tasks(scaling.MAIN_TASKS)
    fit = scaling.fit_ladder(runs, tasks=tasks, check=False)
    wall, cpu = time.perf_counter(), time.process_time()
    draws = resample(runs, fit, samples=samples, seed=seed)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    excess = {1: _Excess(), 2: _Excess()}
    began = time.process_time()
    for task in tasks:
        data = prepare(runs, task, fit.procedure)
        weights1, weights2 = data.resampled(draws.counts[:compare])
        full, mine = fit.tasks[task.name], draws.tasks[task.name]
        assert data.step2_law is not None and full.step2 is not None
        assert mine.objective1 is not None and mine.objective2 is not None
        for b in range(min(compare, samples)):
            kept = weights1[b] > 0
            found = [
                reference.minimise_huber(
                    data.step1_law,
                    data.inputs[:, kept],
                    data.values[kept],
                    weights1[b][kept],
                    start=tuple(start),
                ).objective
                for start in (data.step1_law.start, full.step1.vector)
            ]
            excess[1].add(float(mine.objective1[b]), min(found))
            w = weights2[b][data.groups]
            kept = w > 0
            found = [
                reference.minimise_squares(
                    data.step2_law, data.x[None, kept], data.y[kept], w[kept], tuple(start)
                ).objective
                for start in (data.step2_law.start, _inside(data.step2_law, full.step2.vector))
            ]
            excess[2].add(float(mine.objective2[b]), min(found))
    each = (time.process_time() - began) / max(excess[1].count, 1)
    rows = [
        ["wall-clock seconds, batched", f"{wall:.1f}"],
        ["processor seconds, batched", f"{cpu:.1f}"],
        [
            "processor seconds, scipy from the same starts (extrapolated)",
            f"{each * samples * 8:.0f}",
        ],
        ["refits that did not converge", str(sum(draws.failures().values()))],
    ]
    for step, e in excess.items():
        rows.append([f"step {step}: refits compared", str(e.count)])
        rows.append([f"step {step}: worse than scipy by more than 1e-6", str(e.worse)])
        rows.append([f"step {step}: better than scipy by more than 1e-6", str(e.better)])
        rows.append([f"step {step}: largest relative excess", f"{e.worst:.1e}"])
    return Table(
        [Column("", align="left"), Column("", align="right")],
        rows,
        title=f"{samples} resamples of {len(runs)} runs, {len(tasks)} tasks, both steps",
    )


def _inside(law, start: np.ndarray) -> np.ndarray:
    # scipy refuses a start on a bound.
    low, high = np.array(law.lower), np.array(law.upper)
    return np.clip(start, low + 1e-9, high - 1e-9)
