"""What is to run, and what a runner makes of it."""

import dataclasses
import re
import shlex
from collections.abc import Mapping

from olmax.errors import UserError

CHECKPOINTS = "{checkpoints}"
"""Stands in a job's command for the place of its checkpoints."""

_NAME = re.compile(r"[a-z](?:[-a-z0-9]{0,38}[a-z0-9])?")
_BUCKET = re.compile(r"gs://[a-z0-9][-_.a-z0-9]+(/.*)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclasses.dataclass(frozen=True)
class Job:
    """A command for every host, one process each."""

    name: str
    """Lower-case letters, digits and dashes, at most 40: it names cloud resources."""
    command: tuple[str, ...]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    bucket: str | None = None
    """`gs://...` under which the job keeps its checkpoints and, if needed, its source."""
    max_restarts: int = 10
    """Restarts after a preemption or a failure; the trainer continues from its last checkpoint."""
    directory: str = "launch"
    """Where its files lie; the commands run in the directory above."""

    def __post_init__(self):
        if not _NAME.fullmatch(self.name):
            raise UserError(
                f"job name {self.name!r}: use up to 40 lower-case letters, digits and dashes, "
                "a letter first"
            )
        if not self.command:
            raise UserError("no command to launch: write it after `--`, such as -- python -m ...")
        if self.max_restarts < 0:
            raise UserError(f"max restarts must be 0 or more, is {self.max_restarts}")
        if self.bucket is not None and not _BUCKET.fullmatch(self.bucket):
            raise UserError(f"bucket {self.bucket!r}: write gs://NAME, optionally with a folder")
        for variable in self.environment:
            if not _VARIABLE.fullmatch(variable):
                raise UserError(f"environment variable {variable!r}: not a variable name")
        if self.bucket is None and any(CHECKPOINTS in word for word in self.command):
            raise UserError(f"the command names {CHECKPOINTS}: say where with --bucket gs://...")

    def path(self, file: str) -> str:
        """Of one of its files, as the commands name it."""
        return f"{self.directory}/{file}"

    @property
    def folder(self) -> str | None:
        """Of this job in the bucket."""
        return None if self.bucket is None else f"{self.bucket.rstrip('/')}/{self.name}"

    @property
    def resolved_command(self) -> tuple[str, ...]:
        """The command with the place of the checkpoints filled in."""
        if self.folder is None:
            return self.command
        place = f"{self.folder}/checkpoints"
        return tuple(word.replace(CHECKPOINTS, place) for word in self.command)

    @property
    def shell_command(self) -> str:
        """The same as one line for a shell."""
        return shlex.join(self.resolved_command)


@dataclasses.dataclass(frozen=True)
class Step:
    """A command the user runs, or `olmax launch --yes` for them."""

    what: str
    argv: tuple[str, ...]

    @property
    def text(self) -> str:
        """For a shell, one option a line."""
        lines, current = [], []
        for word in self.argv:
            if word.startswith("--") and current:
                lines.append(" ".join(current))
                current = []
            current.append(shlex.quote(word))
        return " \\\n  ".join([*lines, " ".join(current)])


@dataclasses.dataclass(frozen=True)
class Rendered:
    """What a runner made of a job."""

    files: Mapping[str, str]
    """Text by file name."""
    steps: tuple[Step, ...]
    """In this order."""
    afterwards: tuple[Step, ...] = ()
    """To watch, stop or clean up; never run for the user."""


def parse_environment(items: tuple[str, ...]) -> dict[str, str]:
    """From `NAME=value` items.

    Raises:
      UserError: an item without `=`.
    """
    pairs = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"environment {item!r}: write NAME=value")
        pairs[name] = value
    return pairs
