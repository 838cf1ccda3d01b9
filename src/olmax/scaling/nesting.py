"""How the error at a target falls as runs are added, cheapest first."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from olmax.scaling.fit import fit_ladder
from olmax.scaling.identifiability import design_warnings
from olmax.scaling.procedure import PUBLISHED, Procedure
from olmax.scaling.runs import Run
from olmax.scaling.tasks import Task


def nested_errors(
    runs: Sequence[Run],
    target: Run,
    tasks: Sequence[Task],
    *,
    procedure: Procedure = PUBLISHED,
) -> pd.DataFrame:
    """Fits the cheapest 5, 6, ... runs and predicts the target.

    Returns:
      One row per ladder: `last` (the run added), `runs`, `flops` (of all fitted runs, 6 N D),
      `error` (mean absolute over tasks, points), `identified` (whether its sizes and lengths can
      determine the parameters) and one column per task with its unsigned relative error.
    """
    cost = np.array([6.0 * run.parameters * run.tokens[-1] for run in runs])
    order = np.argsort(cost)
    least = len(procedure.step1_law(tasks[0]).parameters)
    rows = []
    for count in range(least, len(runs) + 1):
        chosen = [runs[i] for i in order[:count]]
        table = fit_ladder(chosen, tasks=tasks, procedure=procedure, check=False).compare(target)
        rows.append(
            {
                "last": chosen[-1].name,
                "runs": count,
                "flops": cost[order[:count]].sum(),
                "error": 100 * table["error"].abs().mean(),
                "identified": not design_warnings(chosen, procedure),
                **table["relative_error"].to_dict(),
            }
        )
    return pd.DataFrame(rows)
