"""Running stages once: each leaves a marker that says what it was made from, written last."""

import contextlib
import hashlib
import json
import pathlib
import shutil
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console

from olmax.errors import UserError
from olmax.reporting.files import jsonable, write_json


class Stages:
    """The stages of one run directory.

    `stages/<stage>.json` holds the inputs of a stage (its settings and the fingerprints of the
    stages it reads), and once it is complete its wall time.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        console: Console,
        *,
        overwrite: bool = False,
        primary: bool = True,
    ):
        """
        Args:
          directory: the run directory.
          console: where stages are announced.
          overwrite: redo trained stages whose settings changed, instead of refusing.
          primary: whether this process writes markers and removes results; of several hosts one.
        """
        self.directory = directory
        self._primary = primary
        self._console = console
        self._overwrite = overwrite

    def _marker(self, stage: str) -> pathlib.Path:
        return self.directory / "stages" / f"{stage.replace('/', '-')}.json"

    def read(self, stage: str) -> dict[str, Any] | None:
        """The marker of a stage, complete or begun; None when it never began."""
        try:
            return json.loads(self._marker(stage).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def fingerprint(self, stage: str) -> str:
        """What a complete stage was made from, 16 hexadecimal digits.

        Raises:
          UserError: the stage is not complete.
        """
        marker = self.read(stage)
        if marker is None or not marker["complete"]:
            raise UserError(
                f"{self.directory}: stage {stage} is not complete; run it first, or `all`"
            )
        return marker["fingerprint"]

    def seconds(self, stage: str) -> float:
        """Wall time of a complete stage, of its last start if it was interrupted."""
        self.fingerprint(stage)
        marker = self.read(stage)
        assert marker is not None
        return marker["seconds"]

    @contextlib.contextmanager
    def run(
        self,
        stage: str,
        settings: Any,
        *,
        after: Sequence[str] = (),
        outputs: Sequence[str] = (),
        costly: bool = False,
    ) -> Iterator[bool]:
        """Inside, do the stage if the yielded value is true; otherwise it is done already.

        Args:
          stage: its name.
          settings: what determines its result, JSON-able.
          after: stages whose results it reads.
          outputs: paths in the run directory that it writes; removed when it has to start anew.
          costly: refuse to remove results made with other settings unless overwriting is asked for.

        Raises:
          UserError: a stage in `after` is not complete, or a costly one would be redone.
        """
        inputs = {
            "settings": jsonable(settings),
            "after": {name: self.fingerprint(name) for name in after},
        }
        content = json.dumps(inputs, sort_keys=True).encode()
        fingerprint = hashlib.sha256(content).hexdigest()[:16]
        found = self.read(stage)
        if found is not None and found["fingerprint"] == fingerprint and found["complete"]:
            if all((self.directory / path).exists() for path in outputs):
                self._console.print(f"[dim]{stage}: done before, reused[/]")
                yield False
                return
        elif found is not None and found["fingerprint"] != fingerprint:
            changes = "; ".join(_changes(found["inputs"], inputs)) or "its inputs"
            if costly and not self._overwrite:
                raise UserError(
                    f"{self.directory}: stage {stage} was made with other settings ({changes}); "
                    "choose another --run-dir, or --overwrite to do it anew"
                )
            self._console.print(f"{stage}: anew, because of changes ({changes})", highlight=False)
            for path in outputs if self._primary else ():
                _remove(self.directory / path)
        self._console.rule(f"[bold]{stage}", align="left", style="dim")
        marker = {"stage": stage, "fingerprint": fingerprint, "inputs": inputs, "complete": False}
        if self._primary:
            write_json(self._marker(stage), marker)
        began = time.monotonic()
        yield True
        seconds = time.monotonic() - began
        if self._primary:
            marker |= {"complete": True, "seconds": round(seconds, 3)}
            write_json(self._marker(stage), marker)
        self._console.print(f"[dim]{stage}: {seconds:.1f} s[/]", highlight=False)


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _changes(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Dotted names of what differs, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            inner = key if name in ("", "settings") else f"{name}.{key}"
            yield from _changes(old.get(key), new.get(key), inner)
    elif old != new:
        yield f"{name}: {json.dumps(old)} -> {json.dumps(new)}"
