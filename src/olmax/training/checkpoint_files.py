"""The files of a checkpoint, without the arrays inside.

<step>/state/          arrays, written by Orbax, one flat dict of dotted names
<step>/config.json     the resolved configuration of the run
<step>/loader.json     where the data loader stands
<step>/metadata.json   written last and removed first: without it the rest is not a checkpoint
"""

import dataclasses
import json
from typing import Any

from etils import epath

from olmax.errors import UserError
from olmax.training import config_json

STATE = "state"
CONFIG = "config.json"
LOADER = "loader.json"
METADATA = "metadata.json"


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What is known of a checkpoint without reading its arrays."""

    step: int
    permanent: bool
    """Whether it stays when newer ones come (up to `max_to_keep`)."""
    arrays: dict[str, dict[str, Any]]
    """By dotted name: `shape`, `dtype`, `checksum`."""


def read_metadata(directory: epath.Path) -> Metadata:
    """Metadata of the checkpoint in `directory`.

    Raises:
      FileNotFoundError: there is none, so this is no (complete) checkpoint.
      ValueError: it is damaged.
    """
    text = (directory / METADATA).read_text()
    try:
        value = json.loads(text)
        return Metadata(int(value["step"]), bool(value["permanent"]), dict(value["arrays"].items()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{METADATA} is not readable") from error


def write_metadata(directory: epath.Path, metadata: Metadata) -> None:
    """Makes `directory` a valid checkpoint."""
    config_json.write_text(directory / METADATA, json.dumps(dataclasses.asdict(metadata)))


def holds_model_only(directory: epath.Path) -> bool:
    """Whether a checkpoint has parameters and no optimizer state."""
    try:
        arrays = read_metadata(directory).arrays
    except (OSError, ValueError):
        return False
    return not any(name.startswith("opt_state.") for name in arrays)


def step_directories(root: epath.Path) -> list[epath.Path]:
    """Directories named like a step, oldest first, complete or not."""
    if not root.exists():
        return []
    found = [path for path in root.iterdir() if path.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name))


def valid_checkpoints(root: epath.Path) -> list[epath.Path]:
    """Complete checkpoints under `root`, oldest first."""
    return [path for path in step_directories(root) if (path / METADATA).exists()]


def candidates(path: str | epath.Path) -> list[epath.Path]:
    """Checkpoints that a path means, best first.

    Args:
      path: a run directory or its checkpoint directory (its checkpoints, newest first), or one
        checkpoint.

    Raises:
      UserError: there is no complete checkpoint.
    """
    path = epath.Path(path)
    if (path / METADATA).exists():
        return [path]
    if (path / STATE).exists():
        raise UserError(f"{path} is an incomplete checkpoint; use an earlier one")
    roots = [path, path / "checkpoints"]
    if (path / CONFIG).exists():
        # The file may be another kind of model's configuration.
        checkpoint = getattr(config_json.load(path / CONFIG), "checkpoint", None)
        elsewhere = getattr(checkpoint, "directory", None)
        roots += [epath.Path(elsewhere)] if elsewhere else []
    for root in roots:
        if found := valid_checkpoints(root):
            return found[::-1]
    raise UserError(f"no checkpoint at {path}; expected a run directory or a checkpoint of one")


def absolute(path: epath.Path) -> epath.Path:
    """`path` as Orbax takes it: local ones absolute, remote ones as they are."""
    return path if path.is_absolute() else path.absolute()


def remove(directory: epath.Path) -> None:
    """Removes a checkpoint; interrupted at any point it is either whole or not valid."""
    (directory / METADATA).unlink(missing_ok=True)
    directory.rmtree(missing_ok=True)
