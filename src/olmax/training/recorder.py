"""Where metrics go: metrics.jsonl, TensorBoard, and Weights & Biases when asked for."""

import hashlib
import json
import os
import pathlib
from typing import Any, Protocol

from olmax.errors import UserError

METRICS = "metrics.jsonl"

Row = dict[str, Any]


class Writer(Protocol):
    """A place for rows of metrics; every row has a `step`."""

    def write(self, rows: list[Row]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One row a line in `metrics.jsonl`."""

    def __init__(self, directory: pathlib.Path, resumed_step: int):
        """Keeps the rows up to `resumed_step`, so that a resumed run leaves the same file as an
        uninterrupted one.
        """
        path = directory / METRICS
        kept = [line for line in _lines(path) if _step(line) <= resumed_step]
        temporary = directory / f"{METRICS}.tmp"
        temporary.write_text("".join(f"{line}\n" for line in kept))
        os.replace(temporary, path)
        self._file = open(path, "a")  # noqa: SIM115 (open as long as the run)

    def write(self, rows: list[Row]) -> None:
        """Appends rows; they are in the file when this returns.

        Raises:
          UserError: the disk is full.
        """
        try:
            self._file.write("".join(json.dumps(row) + "\n" for row in rows))
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self._file.name}: {error.strerror}") from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _lines(path: pathlib.Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # A line cut short by a kill.


def read_metrics(run_directory: str | os.PathLike) -> list[Row]:
    """Rows of a run's metrics, oldest first.

    Raises:
      UserError: the run has none.
    """
    path = pathlib.Path(run_directory) / METRICS
    if not path.exists():
        raise UserError(f"no metrics at {path}")
    return [json.loads(line) for line in _lines(path) if _step(line) < float("inf")]


class TensorBoard:
    """Scalars in `tensorboard/`."""

    def __init__(self, directory: pathlib.Path, resumed_step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(
            str(directory / "tensorboard"), purge_step=resumed_step + 1 if resumed_step else None
        )

    def write(self, rows: list[Row]) -> None:
        """Queues the numbers of the rows."""
        for row in rows:
            for name, value in row.items():
                if name != "step" and isinstance(value, (int, float)):
                    self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Writes what is queued."""
        self._writer.close()


class WeightsAndBiases:
    """A run of a Weights & Biases project; resuming the directory resumes the run."""

    def __init__(self, directory: pathlib.Path, project: str, config: dict[str, Any]):
        """Raises UserError where wandb is not installed."""
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError(
                f"wandb_project={project!r} needs wandb: pip install 'olmax[wandb]'"
            ) from None
        identity = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
        self._run = wandb.init(
            project=project,
            name=directory.name,
            id=identity,
            resume="allow",
            dir=str(directory),
            config=config,
        )

    def write(self, rows: list[Row]) -> None:
        """Logs the rows under their steps."""
        for row in rows:
            self._run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()
