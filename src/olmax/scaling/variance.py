"""How much a run's last checkpoints scatter, and whether that foretells a prediction's error."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from olmax.scaling.runs import Run
from olmax.scaling.tasks import Task

VARIANCE_TASKS = (
    "mmlu",
    "hellaswag_val",
    "arc_easy_test",
    "arc_challenge_test",
    "boolq_val",
    "csqa_val",
    "openbookqa_test",
    "piqa_val",
    "socialiqa_val",
    "winogrande_val",
)
"""The ten tasks of the published variance analysis."""


def checkpoint_scatter(run: Run, tasks: Sequence[Task], last: int = 10) -> pd.DataFrame:
    """Population SD over the last `last` checkpoints: `loss_sd`, `loss_relative`, `accuracy_sd`,
    `accuracy_relative` by task, the relative ones divided by the mean.
    """
    rows = {}
    for task in tasks:
        loss = run.values(task, "task_loss")[-last:]
        accuracy = run.values(task, "rc_accuracy")[-last:]
        rows[task.name] = (
            loss.std(),
            loss.std() / loss.mean(),
            accuracy.std(),
            accuracy.std() / accuracy.mean(),
        )
    columns = ["loss_sd", "loss_relative", "accuracy_sd", "accuracy_relative"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def correlation(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Pearson's r and its two-sided p."""
    from scipy import stats

    r, p = map(float, np.array(stats.pearsonr(np.asarray(a), np.asarray(b))))
    return r, p
