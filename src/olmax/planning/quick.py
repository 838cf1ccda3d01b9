"""Plans in seconds: the compiler is stopped when it has the program and before machine code.

A compilation cannot be stopped within a process, so one that is thrown away does it.
"""

import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
import traceback
from typing import TYPE_CHECKING, Any

from olmax.errors import UserError
from olmax.planning import optimised

if TYPE_CHECKING:
    from olmax.planning.plan import Plan


def plan(request: dict[str, Any]) -> "Plan":
    """`olmax.planning.plan.plan` with these arguments, with times by `roofline`.

    Raises:
      UserError: as there.
      RuntimeError: the process that plans died; the message is the end of what it wrote.
    """
    with tempfile.TemporaryDirectory(prefix="olmax-plan-") as folder:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
            f"{optimised.flags(pathlib.Path(folder))}",
        }
        done = subprocess.run(
            [sys.executable, "-m", "olmax.planning.quick", folder],
            env=environment,
            input=pickle.dumps(request),
            capture_output=True,
        )
        if done.returncode:
            raise RuntimeError(f"planning failed:\n{done.stderr.decode(errors='replace')[-2000:]}")
    answer = pickle.loads(done.stdout)
    if isinstance(answer, str):
        raise UserError(answer)
    return answer


def _main(folder: str) -> None:
    from olmax.planning.plan import compiled_plan

    # What libraries print must not mix with the answer.
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    request = pickle.load(sys.stdin.buffer)
    status = 0
    try:
        answer: Any = compiled_plan(**request, dump=pathlib.Path(folder))
    except UserError as error:
        answer = str(error)
    except Exception:
        traceback.print_exc()
        answer, status = None, 1
    answers.write(pickle.dumps(answer))
    answers.flush()
    # The thread that compiles would hold an ordinary exit up for minutes.
    os._exit(status)


if __name__ == "__main__":
    _main(sys.argv[1])
