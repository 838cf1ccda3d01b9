"""Where the released ladder runs are, and which of them the paper fits and predicts."""

import json
import os
import pathlib
from collections.abc import Sequence

from etils import epath

from olmax.errors import UserError
from olmax.scaling import Run, read_run

FITTED = tuple(
    f"{size}-{length}xC" for size in ("190M", "370M", "760M", "1B") for length in (1, 2, 5, 10)
)
"""Files of the sixteen runs of the paper's fit."""
TARGETS = {"7B-4T": "peteish7_eval_anneal", "13B-5T": "peteish13_eval_final"}
"""Files of the targets by the paper's names."""
SOURCE = "https://github.com/allenai/OLMo-ladder, src/scripts/paper/data/ladder-runs"


def default_directory() -> str:
    """Folder of the released CSV files: in OLMAX_DATA_DIR, or beside the repository."""
    root = os.environ.get("OLMAX_DATA_DIR")
    base = (
        pathlib.Path(root)
        if root
        else pathlib.Path(__file__).resolve().parents[3] / "shared" / "data"
    )
    return str(base / "ladder" / "raw" / "ladder-runs")


def read_released(directory: str, names: Sequence[str] = FITTED) -> list[Run]:
    """The released runs of these names.

    Raises:
      UserError: the folder is absent; the message says where to get it.
    """
    path = epath.Path(directory)
    if not path.is_dir():
        raise UserError(f"{directory}: no such folder; it should hold the CSV files of {SOURCE}")
    return [read_run(path / f"{name}.csv") for name in names]


def published() -> dict:
    """Contents of published.json."""
    return json.loads((pathlib.Path(__file__).parent / "published.json").read_text())
