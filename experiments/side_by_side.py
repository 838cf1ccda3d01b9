"""Timing two programs beside each other, each in a process of its own that works when told to, and
what the numbers belong to.
"""

import datetime
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from olmax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Side:
    """A process that works when told to: it prints one JSON object when it is ready, then for every
    number of runs on its standard input one with the `seconds` of each.
    """

    def __init__(
        self, command: list[str], threads: int, environment: Mapping[str, str] | None = None
    ):
        cores = sorted(os.sched_getaffinity(0))[:threads]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "OMP_NUM_THREADS": str(threads),
                **(environment or {}),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        self.ready = self._read()

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"benchmark: {self._process.args[1]} ended early; its error is above")
        return json.loads(line)

    def run(self, steps: int, clock: str = "seconds") -> list[float]:
        """Seconds of each of `steps` runs (or of another clock that the program reads)."""
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return self._read()[clock]

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def environment(threads: int, sides: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the numbers belong to: CPU, cores, Python, date and the versions the sides told."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(
            line.partition(":")[::2] for line in cpuinfo.read_text().split("\n\n")[0].splitlines()
        )
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        flags = [f for f in fields.get("flags", "").split() if f.startswith(("avx512_bf16", "amx"))]
        cpu = " ".join([fields.get("model name", cpu), *flags])
    versions: dict[str, str] = {}
    for side in sides:
        versions |= side["versions"]
    return {
        "cpu": cpu,
        "threads": threads,
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        **versions,
    }
