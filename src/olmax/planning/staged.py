"""A plan in two stages: a quick one in seconds, when the compiler has the program, and the whole
one when it has the cycles of every operation; or, minutes later, all machine code.

A compilation cannot be stopped within a process, so one that can be killed does it.
"""

import contextlib
import dataclasses
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Generator, Iterator
from typing import IO, TYPE_CHECKING, Any

from olmax.errors import UserError
from olmax.planning import lowering, optimised

if TYPE_CHECKING:
    from olmax.planning.plan import Plan

# What the compiling process writes to its standard error.
_LOG = "log.txt"


def stages(request: dict[str, Any]) -> Generator["Plan"]:
    """The quick plan, the whole one and, where the request says `machine_code`, the same with all
    of that made; closing the iterator stops the compiler.

    If the compiler is done, or refuses the program, before one of these is, that is the last.

    Args:
      request: arguments of `olmax.planning.plan.prepare`.

    Raises:
      UserError: as there.
      RuntimeError: the process that plans died; the message is the end of what it wrote.
    """
    start = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="olmax-plan-") as folder,
        (pathlib.Path(folder) / _LOG).open("w+b") as errors,
        _process(pathlib.Path(folder), request, errors) as answers,
    ):
        while True:
            try:
                answer = pickle.load(answers)
            except EOFError:
                errors.seek(0)
                text = lowering.without_log(errors.read().decode(errors="replace"))
                raise RuntimeError(f"planning failed:\n{text[-2000:]}") from None
            if isinstance(answer, UserError):
                raise answer
            if answer is None:
                return
            yield dataclasses.replace(answer, plan_seconds=time.monotonic() - start)


@contextlib.contextmanager
def _process(
    folder: pathlib.Path, request: dict[str, Any], errors: IO[bytes]
) -> Iterator[IO[bytes]]:
    """Starts `_main` and gives what it answers; kills it in the end."""
    environment = {
        **os.environ,
        **lowering.environment(os.environ),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {optimised.flags(folder)}",
    }
    with subprocess.Popen(
        [sys.executable, "-m", "olmax.planning.staged", str(folder)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
    ) as process:
        assert process.stdin and process.stdout
        try:
            process.stdin.write(pickle.dumps(request))
            process.stdin.close()
            yield process.stdout
        finally:
            process.kill()


def _main(folder: str) -> None:
    from olmax.planning import compilation
    from olmax.planning.plan import answer, prepare

    # What libraries print must not mix with the answers.
    answers, sys.stdout = sys.stdout.buffer, sys.stderr

    def send(message: Any) -> None:
        answers.write(pickle.dumps(message))
        answers.flush()

    status = 0
    try:
        prepared = prepare(**pickle.load(sys.stdin.buffer))
        running = compilation.Compilation(
            prepared.step,
            prepared.batch_size,
            prepared.sequence_length,
            dump=pathlib.Path(folder),
            log=pathlib.Path(folder) / _LOG,
        )
        waits = [running.optimised, running.timed]
        if prepared.machine_code:
            waits.append(running.finished)
        for wait in waits:
            compiled = wait()
            send(answer(prepared, compiled))
            if compiled.ended:
                break
        send(None)
    except UserError as error:
        send(error)
    except BaseException:
        traceback.print_exc()
        status = 1
    # The thread that compiles would hold an ordinary exit up for minutes.
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _main(sys.argv[1])
