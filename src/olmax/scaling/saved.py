"""A fitted ladder as one JSON file: laws, provenance, and the draws behind its intervals."""

import dataclasses
import json
from typing import Any

import numpy as np
import pandas as pd
from etils import epath

from olmax.errors import UserError
from olmax.reporting.files import write_text
from olmax.scaling.fit import LadderFit, LawFit, Target, TaskFit
from olmax.scaling.procedure import Procedure
from olmax.scaling.runs import Run
from olmax.scaling.tasks import Task

FORMAT = 1
"""Version of the file's layout."""


@dataclasses.dataclass(frozen=True)
class SavedLadder:
    """A fit and, when it was resampled, its draws."""

    fit: LadderFit
    draws: Any = None
    """`olmax.scaling.resampling.Draws`."""

    def predict(self, target: Target, *, level: float = 0.9) -> pd.DataFrame:
        """One row per task: `feature`, `accuracy` and, with draws, `low`, `high`, `expected_low`,
        `expected_high` and `failures`.
        """
        table = self.fit.predict(target)
        return table if self.draws is None else table.join(self.draws.table(target, level=level))

    def compare(self, run: Run, *, level: float = 0.9) -> pd.DataFrame:
        """As `LadderFit.compare`, with the columns of the draws when there are any."""
        table = self.fit.compare(run)
        if self.draws is None:
            return table
        return table.join(self.draws.table(Target.of(run), level=level))

    def warnings(self, target: Target) -> list[str]:
        """The fit's warnings and what this target adds to them."""
        return [*self.fit.warnings, *target_warnings(self.fit, target)]


def target_warnings(fit: LadderFit, target: Target) -> list[str]:
    """Sentences on a target that the runs cannot speak for, or need not predict."""
    sizes = [run["parameters"] for run in fit.runs]
    tokens = [run["tokens"] for run in fit.runs]
    found = []
    if target.parameters <= max(sizes) and target.tokens <= max(tokens):
        found.append(
            f"{target.name}: N={target.parameters:.3g}, D={target.tokens:.3g} lies inside the "
            f"fitted range (N up to {max(sizes):.3g}, D up to {max(tokens):.3g}): this is no "
            "extrapolation, its error says little about larger models"
        )
    compute = target.parameters * target.tokens
    factor = compute / max(n * d for n, d in zip(sizes, tokens, strict=True))
    if factor > 1000:
        found.append(
            f"{target.name}: {factor:,.0f} times the compute of the largest run; intervals cover "
            "the scatter of the runs, not a change of the law so far out"
        )
    if fit.procedure.step1 == "power_c" and target.flops_per_token is None:
        found.append(f"{target.name}: FLOPs per token not given, taken as 6 N")
    return found


def save(path: epath.PathLike, fit: LadderFit, draws: Any = None) -> epath.Path:
    """Writes a fit (and its draws) and returns the path."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "procedure": _finite(dataclasses.asdict(fit.procedure)),
        "runs": list(fit.runs),
        "warnings": list(fit.warnings),
        "tasks": {
            name: {
                "task": dataclasses.asdict(task.task),
                "step1": dataclasses.asdict(task.step1),
                "step2": dataclasses.asdict(task.step2) if task.step2 else None,
            }
            for name, task in fit.tasks.items()
        },
    }
    if draws is not None:
        content["draws"] = {
            "seed": draws.seed,
            "counts": draws.counts.tolist(),
            "tasks": {
                name: {
                    "step1": _rounded(task.step1),
                    "step2": None if task.step2 is None else _rounded(task.step2),
                    "failed": np.flatnonzero(task.failed).tolist(),
                    "noise1": task.noise1.tolist(),
                    "noise2": task.noise2.tolist(),
                }
                for name, task in draws.tasks.items()
            },
        }
    return write_text(path, json.dumps(content) + "\n")


def load(path: epath.PathLike) -> SavedLadder:
    """Reads what `save` wrote.

    Raises:
      UserError: absent, or not such a file.
    """
    path = epath.Path(path)
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise UserError(
                f"{path}: format {content['format']}, this version reads {FORMAT}; fit again"
            )
        procedure = content["procedure"]
        procedure["delta"] = np.inf if procedure["delta"] is None else procedure["delta"]
        tasks = {
            name: TaskFit(
                _task(t["task"]), _law_fit(t["step1"]), t["step2"] and _law_fit(t["step2"])
            )
            for name, t in content["tasks"].items()
        }
        fit = LadderFit(
            Procedure(**procedure), tasks, tuple(content["runs"]), tuple(content["warnings"])
        )
        return SavedLadder(fit, _draws(content["draws"], fit) if "draws" in content else None)
    except UserError:
        raise
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a fitted ladder ({type(error).__name__}: {error}); make one with "
            "`olmax ladder fit`"
        ) from error


def _draws(content: dict[str, Any], fit: LadderFit):
    # Not at the top: reading a fit without draws needs no jax.
    from olmax.scaling.resampling import Draws, TaskDraws

    counts = np.array(content["counts"], int)
    tasks = {}
    for name, task in content["tasks"].items():
        failed = np.zeros(len(counts), bool)
        failed[task["failed"]] = True
        tasks[name] = TaskDraws(
            step1=np.array(task["step1"]),
            step2=None if task["step2"] is None else np.array(task["step2"]),
            objective1=None,
            objective2=None,
            failed=failed,
            noise1=np.array(task["noise1"]),
            noise2=np.array(task["noise2"]),
        )
    laws = {n: (t.step1.law, t.step2.law if t.step2 else None) for n, t in fit.tasks.items()}
    return Draws(fit.procedure, laws, counts, tasks, content["seed"])


def _task(content: dict[str, Any]) -> Task:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
    return Task(**values)


def _law_fit(content: dict[str, Any]) -> LawFit:
    return LawFit(**{**content, "at_bounds": tuple(content["at_bounds"])})


def _rounded(values: np.ndarray) -> list:
    # Ten digits: the draws are a sample, and the file stays near a megabyte.
    return [[float(f"{v:.10g}") for v in row] for row in values]


def _finite(content: dict[str, Any]) -> dict[str, Any]:
    return {k: None if v == np.inf else v for k, v in content.items()}
