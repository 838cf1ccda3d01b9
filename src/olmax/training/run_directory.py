"""A run directory belongs to one process at a time."""

import contextlib
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

from olmax.errors import UserError

LOCK = "run.lock"


@contextlib.contextmanager
def locked(directory: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Creates the directory if need be and holds its lock.

    The operating system frees the lock when the process ends, however it ends.

    Raises:
      UserError: another process holds it, or the directory cannot be written.
    """
    directory = pathlib.Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / LOCK, "a+")  # noqa: SIM115 (closed below, after the caller's work)
    except OSError as error:
        raise UserError(f"cannot write run directory {directory}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"run directory {directory} is being written by {holder}; wait until it ends or "
                "choose another directory"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield directory
