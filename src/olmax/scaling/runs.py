"""Ladder runs: reading them, checking them, and the numbers that a fit takes from them."""

import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from etils import epath

from olmax.errors import UserError
from olmax.scaling.compute import known_size
from olmax.scaling.tasks import Metric, Task

TOKENS = "throughput/total_tokens"
STEP = "_step"
BATCH = "batch_size_in_tokens"
PARAMETERS = "parameters"
FLOPS_PER_TOKEN = "flops_per_token"

_FILE_NAME = re.compile(r"(?P<size>peteish\d+|[0-9.]+[KMBT])(?:[-_](?P<length>[0-9.]+xC|[^.]*))?")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run: a row per evaluated checkpoint, in the order of training.

    `table` has the columns of the released runs (see `olmax.scaling.tasks`); tokens come from
    `throughput/total_tokens`, else from `_step` times `batch_size_in_tokens`.
    """

    name: str
    size: str
    """Label of the model size; runs of one label are held out together."""
    parameters: int
    """N: parameters without the input embedding, output head included."""
    table: pd.DataFrame
    length: str = ""
    """Label of the length, such as `5xC`."""
    flops_per_token: float | None = None
    """Training FLOPs per token; None when not known."""
    path: str = ""
    sha256: str = ""
    """Of the file, as provenance of every prediction; empty for a table from memory."""

    @property
    def source(self) -> str:
        """What to call the run in messages."""
        return self.path or self.name

    @property
    def tokens(self) -> np.ndarray:
        """float64 [rows]: training tokens seen at each checkpoint."""
        if TOKENS in self.table:
            return self.table[TOKENS].to_numpy(np.float64)
        return self.table[STEP].to_numpy(np.float64) * self.table[BATCH].to_numpy(np.float64)

    def require(self, columns: Sequence[str], kind: str) -> None:
        """Checks that `columns` are there, full, and within what `kind` allows.

        Args:
          columns: column names.
          kind: `accuracy` (0 to 1), `loss` (positive), `log` (negative) or `number`.

        Raises:
          UserError: names the file, the column and the line.
        """
        for column in columns:
            if column not in self.table:
                raise UserError(
                    f"{self.source}: no column {column!r}; a ladder run has one row per checkpoint "
                    "with the columns of the released runs"
                )
            values = self.table[column]
            if not pd.api.types.is_numeric_dtype(values):
                numbers = pd.Series(pd.to_numeric(values, errors="coerce"))
                bad = np.isnan(numbers.to_numpy(np.float64))
                raise UserError(
                    f"{self.source}:{_line(bad)}: column {column!r} is not a number: "
                    f"{values.iloc[int(np.argmax(bad))]!r}"
                )
            x = values.to_numpy(np.float64)
            self._refuse(~np.isfinite(x), column, x, "is empty or not finite; delete the row")
            if kind == "accuracy":
                self._refuse(x > 1, column, x, "is above 1; accuracies are fractions, not percent")
                self._refuse(x < 0, column, x, "is negative; accuracies are fractions from 0 to 1")
            elif kind == "loss":
                self._refuse(x <= 0, column, x, "is not positive; losses must be")
            elif kind == "log":
                self._refuse(x >= 0, column, x, "is not negative; it holds mean log-probabilities")

    def _refuse(self, bad: np.ndarray, column: str, values: np.ndarray, why: str) -> None:
        if bad.any():
            value = values[int(np.argmax(bad))]
            raise UserError(f"{self.source}:{_line(bad)}: column {column!r} = {value:g} {why}")

    def values(self, task: Task, metric: Metric) -> np.ndarray:
        """float64 [rows]: `metric` of `task` at each checkpoint.

        Raises:
          UserError: a column is absent or holds what the metric cannot be.
        """
        columns = task.columns(metric)
        kind = {"task_loss": "loss", "c4": "loss", "task_ce": "log"}.get(metric, "accuracy")
        self.require(columns, kind)
        weights = np.asarray(task.weights if len(columns) > 1 else (1.0,))
        values = self.table[list(columns)].to_numpy(np.float64)
        mean = (values * weights).sum(1) / weights.sum()
        return -mean if metric == "task_ce" else mean

    def summary(self) -> dict[str, Any]:
        """Provenance: name, file, checksum, N, D and number of checkpoints."""
        return {
            "name": self.name,
            "size": self.size,
            "length": self.length,
            "file": self.path.rsplit("/", 1)[-1],
            "sha256": self.sha256,
            "parameters": self.parameters,
            "flops_per_token": self.flops_per_token,
            "tokens": float(self.tokens[-1]),
            "rows": len(self.table),
        }


def _line(bad: np.ndarray) -> int:
    # Line of a CSV file: the header is line 1.
    return int(np.argmax(bad)) + 2


def run_from_frame(
    table: pd.DataFrame,
    *,
    name: str,
    parameters: int | None = None,
    size: str | None = None,
    length: str | None = None,
    flops_per_token: float | None = None,
    path: str = "",
    sha256: str = "",
) -> Run:
    """A run from a table in memory.

    N comes from `parameters`, else from a column `parameters`, else from the size in `name`
    (`<size>-<length>`) when that is one of the released sizes. FLOPs per token likewise, from a
    column `flops_per_token`.

    Raises:
      UserError: no rows, no way to count tokens or parameters, or rows out of order.
    """
    source = path or name
    if table.empty:
        raise UserError(f"{source}: no rows; a ladder run has one row per evaluated checkpoint")
    match = _FILE_NAME.match(name)
    label = size or (match["size"] if match else name)
    known = known_size(label)
    if known:
        label = known[0]
    if parameters is None and PARAMETERS in table:
        parameters = int(_constant(table, PARAMETERS, source))
    if parameters is None and known:
        parameters = known[1].parameters
    if parameters is None:
        raise UserError(
            f"{source}: how many parameters has size {label!r}? Give them as {label}=N, in a "
            f"column {PARAMETERS!r}, or in a configuration file"
        )
    if parameters <= 0:
        raise UserError(f"{source}: {parameters} parameters; N must be positive")
    if flops_per_token is None and FLOPS_PER_TOKEN in table:
        flops_per_token = _constant(table, FLOPS_PER_TOKEN, source)
    if flops_per_token is None and known and known[1].parameters == parameters:
        flops_per_token = known[1].flops_per_token
    run = Run(
        name=name,
        size=label,
        parameters=int(parameters),
        table=table.reset_index(drop=True),
        length=length if length is not None else (match["length"] or "" if match else ""),
        flops_per_token=flops_per_token,
        path=path,
        sha256=sha256,
    )
    if TOKENS in table:
        run.require([TOKENS], "loss")
    elif STEP in table and BATCH in table:
        run.require([STEP, BATCH], "loss")
    else:
        raise UserError(f"{source}: no column {TOKENS!r} and no {STEP!r} with {BATCH!r}")
    falling = np.diff(run.tokens, prepend=-np.inf) <= 0
    if falling.any():
        raise UserError(
            f"{source}:{_line(falling)}: {run.tokens[np.argmax(falling)]:.0f} tokens are not more "
            "than in the row before; rows must be in the order of training, one per checkpoint"
        )
    return run


def _constant(table: pd.DataFrame, column: str, source: str) -> float:
    """The one positive number that a column repeats."""
    values = np.asarray(pd.to_numeric(table[column], errors="coerce"), np.float64)
    bad = ~(np.isfinite(values) & (values > 0)) | (values != values[0])
    if bad.any():
        raise UserError(
            f"{source}:{_line(bad)}: column {column!r} is {table[column].iloc[int(np.argmax(bad))]}"
            "; it must hold the same positive number in every row"
        )
    return float(values[0])


def read_run(
    path: epath.PathLike,
    *,
    parameters: int | None = None,
    size: str | None = None,
    flops_per_token: float | None = None,
) -> Run:
    """Reads one CSV in the released format; see `run_from_frame` for N.

    Raises:
      UserError: the file is absent, not a CSV, or not a run.
    """
    path = epath.Path(path)
    if not path.exists() or path.is_dir():
        raise UserError(f"{path}: no such file; give CSV files of runs")
    content = path.read_bytes()
    try:
        # Exact from pandas 3.1 on; a last bit would move where fits in flat valleys stop.
        table = pd.read_csv(io.BytesIO(content))
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a CSV file: {str(error).splitlines()[0]}") from error
    return run_from_frame(
        table,
        name=path.name.removesuffix(".csv"),
        parameters=parameters,
        size=size,
        flops_per_token=flops_per_token,
        path=str(path),
        sha256=hashlib.sha256(content).hexdigest(),
    )


def read_runs(
    paths: Sequence[epath.PathLike], *, sizes: Mapping[str, int] | None = None
) -> list[Run]:
    """Reads several runs.

    Args:
      paths: CSV files, or directories of them.
      sizes: N by size label, for labels that are not of the released ladder.

    Raises:
      UserError: as `read_run`; or two files are the same run.
    """
    files: list[epath.Path] = []
    for item in map(epath.Path, paths):
        if item.is_dir():
            inside = sorted(p for p in item.iterdir() if p.name.endswith(".csv"))
            if not inside:
                raise UserError(f"{item}: no CSV files in this directory")
            files.extend(inside)
        else:
            files.append(item)
    runs = []
    for file in files:
        match = _FILE_NAME.match(file.name)
        label = match["size"] if match else file.name.removesuffix(".csv")
        runs.append(read_run(file, parameters=(sizes or {}).get(label)))
    seen: dict[str, Run] = {}
    for run in runs:
        if run.sha256 in seen:
            raise UserError(f"{run.path}: same content as {seen[run.sha256].path}; give it once")
        seen[run.sha256] = run
    return runs


def read_config(path: epath.PathLike) -> tuple[list[Run], list[Run]]:
    """Reads a configuration in the released format: runs to fit and runs to predict.

    It maps a size's name to `paths`, `mode` (`train` or `eval`), `n` and optionally `flops`. A path
    is looked up as it stands, beside the configuration, and in a folder `ladder-runs` beside the
    configuration's folder.

    Raises:
      UserError: not such a file, or a run is missing.
    """
    path = epath.Path(path)
    try:
        config = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a readable ladder configuration: {error}") from error
    fitted, targets = [], []
    for size, entry in config.items():
        if not isinstance(entry, dict) or not {"paths", "mode", "n"} <= set(entry):
            raise UserError(f"{path}: {size!r} must have 'paths', 'mode' and 'n'")
        for item in entry["paths"]:
            name = item.rsplit("/", 1)[-1]
            places = [
                epath.Path(item),
                path.parent / item,
                path.parent / name,
                path.parent.parent / "ladder-runs" / name,
            ]
            file = next((place for place in places if place.exists()), None)
            if file is None:
                raise UserError(f"{path}: run {item!r} of {size!r} was not found")
            run = read_run(
                file, parameters=entry["n"], size=size, flops_per_token=entry.get("flops")
            )
            (targets if entry["mode"] == "eval" else fitted).append(run)
    return fitted, targets


def trailing_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the last `window` values at each place; leading places average what there is."""
    total = np.cumsum(np.concatenate([[0.0], np.asarray(values, np.float64)]))
    end = np.arange(1, len(total))
    start = np.maximum(end - window, 0)
    return (total[end] - total[start]) / (end - start)


def final_value(run: Run, task: Task, metric: Metric, last: int) -> float:
    """Mean of `metric` over the last `last` checkpoints."""
    return float(run.values(task, metric)[-last:].mean())


def trajectory(
    run: Run, task: Task, feature: Metric, accuracy: Metric, *, skip: float, window: int
) -> tuple[np.ndarray, np.ndarray]:
    """(feature [rows], accuracy [rows]) of a run for the second step.

    The first ceil(skip * rows) checkpoints go first, then both columns are smoothed.
    """
    x, y = run.values(task, feature), run.values(task, accuracy)
    start = int(np.ceil(skip * len(x)))
    return trailing_mean(x[start:], window), trailing_mean(y[start:], window)
