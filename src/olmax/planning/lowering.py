"""What the compiler logs while it makes machine code of a program, operation by operation.

An operation's estimated cycles are there before its machine code is: those of a product when the
compiler has chosen its tiles, a fraction of a second after it began, those of the others when they
are done. Machine code of products is nine tenths of a compilation, so the cycles of a whole program
are known in a fraction of its time, if the compiler begins all operations at once (`environment`)
and those whose cycles are known step back behind the others (`Log.read`).
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Mapping

# Operations that the compiler has in work at once; more than a step of any model here has.
_AT_ONCE = 512

_MODULES = "spatial_major_convolution=2,lowering_emitter=2,hlo_deduplication=2"

_LINE = re.compile(r"[IWEF]\d{4} [\d:.]+ +(\d+) \S+\] (.*)")
_BEGUN = re.compile(r"Started lowering (\S+)")
_CHOOSING = re.compile(r"SpatialMajorConvolution::ComputeWindowConfigInternal called for (\S+)")
_CHOSEN = re.compile(
    r"SpatialMajorConvolution::ComputeWindowConfigInternal returning .*cycles=(\d+)"
)
# After a failure, too, if another choice of tiles then succeeds.
_MADE = re.compile(r"Final Successful Config for (\S+) (?:.*? estimated_cycles: (\d+))?")
_SAME = re.compile(r"Found duplicate of %(\S+) = .*?: %(\S+) = ")

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = ")
_CONFIGURATION = "backend_config={"


def environment(of: Mapping[str, str]) -> dict[str, str]:
    """Variables of a process whose compiler shall log to its standard error, and begin everything
    at once, beside those it has already.

    Args:
      of: the environment that the process would have.
    """
    flags = f"--vmodule={_MODULES} --fibers_default_domain_concurrency={_AT_ONCE}"
    return {
        "TPU_MIN_LOG_LEVEL": "0",
        "TPU_STDERR_LOG_LEVEL": "0",
        # The compiler takes it for the number of processors.
        "NPROC": str(_AT_ONCE),
        "LIBTPU_INIT_ARGS": f"{of.get('LIBTPU_INIT_ARGS', '')} {flags}".strip(),
    }


def without_log(text: str) -> str:
    """Of what such a process wrote to its standard error, what is not the compiler's log."""
    return "\n".join(line for line in text.splitlines() if not _LINE.match(line))


class Log:
    """What a compiler of this process has logged so far."""

    def __init__(self) -> None:
        self.cycles: dict[str, int] = {}
        """Estimated cycles of the operations that have any."""
        self._begun: set[str] = set()
        self._done: set[str] = set()
        self._same_as: dict[str, str] = {}
        self._chooses: dict[str, str] = {}
        self._rest = ""

    def read(self, text: str) -> None:
        """Takes the next part of the log. A thread whose operation has its cycles and now makes
        machine code is left what processor time the others do not want.
        """
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            match = _LINE.match(line)
            if match:
                self._read(*match.groups())

    def _read(self, thread: str, message: str) -> None:
        if match := _BEGUN.match(message):
            self._begun.add(match[1])
        elif match := _CHOOSING.match(message):
            self._chooses[thread] = match[1]
        elif match := _CHOSEN.match(message):
            name = self._chooses.pop(thread, None)
            if name is not None:
                self.cycles[name] = int(match[1])
                self._done.add(name)
                _step_back(int(thread))
        elif match := _MADE.match(message):
            self._done.add(match[1])
            if match[2]:
                self.cycles[match[1]] = int(match[2])
        elif match := _SAME.match(message):
            self._same_as[match[1]] = match[2]

    def complete(self, names: Iterable[str]) -> bool:
        """Whether all operations are done that the compiler has begun, these among them. One that
        it fails on never is.
        """
        done = all(self._same_as.get(name, name) in self._done for name in names)
        return done and self._begun <= self._done

    def annotated(self, program: str) -> str:
        """The text of a program with the cycles where the compiler writes them in the end."""
        return "\n".join(self._annotated(line) for line in program.split("\n"))

    def _annotated(self, line: str) -> str:
        match = _INSTRUCTION.match(line)
        if not match:
            return line
        cycles = self.cycles.get(self._same_as.get(match[1], match[1]))
        if cycles is None:
            return line
        field = f'"window_config":{{"estimated_cycles":"{cycles}"}}'
        if _CONFIGURATION in line:
            return line.replace(_CONFIGURATION, f"{_CONFIGURATION}{field},", 1)
        return f"{line}, {_CONFIGURATION}{field}}}"


def _step_back(thread: int) -> None:
    # Threads have priorities of their own on Linux, and nowhere else is there a compiler for TPUs.
    # It may have ended meanwhile.
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, 19)
