"""Task scaling laws: predict a benchmark score from a ladder of small runs.

runs = scaling.read_runs(["runs/"])
fit = scaling.fit_ladder(runs)
draws = scaling.resample(runs, fit)
draws.table(scaling.Target("7B", 6.9e9, 3.9e12))
"""

from typing import TYPE_CHECKING

from olmax.scaling.fit import LadderFit, Target, fit_ladder
from olmax.scaling.procedure import PUBLISHED, VARIANTS, Procedure
from olmax.scaling.runs import Run, read_config, read_run, read_runs, run_from_frame
from olmax.scaling.saved import SavedLadder, load, save
from olmax.scaling.tasks import MAIN_TASKS, TASKS, Task, find_tasks, get_tasks

if TYPE_CHECKING:
    from olmax.scaling.chinchilla import fit_isoflop, fit_surface
    from olmax.scaling.coverage import coverage_study
    from olmax.scaling.holdout import leave_one_size_out
    from olmax.scaling.identifiability import equally_good_range
    from olmax.scaling.resampling import Draws, resample

# These import jax, which a plain fit or a prediction from a file does not need.
_LAZY = {
    "Draws": "resampling",
    "coverage_study": "coverage",
    "equally_good_range": "identifiability",
    "fit_isoflop": "chinchilla",
    "fit_surface": "chinchilla",
    "leave_one_size_out": "holdout",
    "resample": "resampling",
}


def __getattr__(name: str):
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f"olmax.scaling.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "MAIN_TASKS",
    "PUBLISHED",
    "TASKS",
    "VARIANTS",
    "Draws",
    "LadderFit",
    "Procedure",
    "Run",
    "SavedLadder",
    "Target",
    "Task",
    "coverage_study",
    "equally_good_range",
    "find_tasks",
    "fit_isoflop",
    "fit_ladder",
    "fit_surface",
    "get_tasks",
    "leave_one_size_out",
    "load",
    "read_config",
    "read_run",
    "read_runs",
    "resample",
    "run_from_frame",
    "save",
]
