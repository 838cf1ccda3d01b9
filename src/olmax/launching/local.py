"""Several processes of one job on this machine, as on a pod: a rehearsal."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

from olmax.launching.job import Job, Rendered, Step

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 20.0


def environments(job: Job, processes: int, port: int) -> list[dict[str, str]]:
    """What each process finds in its environment beyond this one's."""
    shared = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        **job.environment,
    }
    return [{**shared, "JAX_PROCESS_ID": str(index)} for index in range(processes)]


def render(job: Job, processes: int, port: int) -> Rendered:
    """The same as commands for a shell, one a process."""
    steps = []
    for index, environment in enumerate(environments(job, processes, port)):
        words = [f"{name}={value}" for name, value in environment.items()]
        steps.append(Step(f"process {index}", ("env", *words, *job.resolved_command)))
    return Rendered({}, tuple(steps))


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(job: Job, processes: int, *, out: IO[str] = sys.stdout) -> int:
    """Starts the processes, prefixes their output with their index, restarts all when one fails.

    Returns:
      0, or the exit status of the process that failed when restarts are used up.
    """
    for attempt in range(job.max_restarts + 1):
        status = _once(job, processes, out)
        if status in (0, 130):
            return status
        if attempt < job.max_restarts:
            print(f"[launch] status {status}; restart {attempt + 1}", file=out, flush=True)
    return status


def _once(job: Job, processes: int, out: IO[str]) -> int:
    lock = threading.Lock()
    children: list[subprocess.Popen] = []
    readers: list[threading.Thread] = []
    try:
        for index, environment in enumerate(environments(job, processes, free_port())):
            child = subprocess.Popen(
                job.resolved_command,
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            children.append(child)
            reader = threading.Thread(target=_copy, args=(child, index, out, lock), daemon=True)
            reader.start()
            readers.append(reader)
        while True:
            codes = [child.poll() for child in children]
            failed = [code for code in codes if code]
            if failed:
                # A process killed by a signal has a negative code; shells say 128 + signal.
                return failed[0] if failed[0] > 0 else 128 - failed[0]
            if all(code == 0 for code in codes):
                return 0
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        return 130
    finally:
        _stop(children)
        for reader in readers:
            reader.join(timeout=_GRACE_SECONDS)


def _copy(child: subprocess.Popen, index: int, out: IO[str], lock: threading.Lock) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        with lock:
            out.write(f"[{index}] {line}")
            out.flush()


def _stop(children: Sequence[subprocess.Popen]) -> None:
    for child in children:
        if child.poll() is None:
            child.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
