"""Output directories that appear whole or not at all."""

import contextlib
import os
from collections.abc import Iterator

from etils import epath

from olmax.errors import UserError


@contextlib.contextmanager
def new_directory(path: str | os.PathLike) -> Iterator[epath.Path]:
    """A directory under a temporary name that becomes `path` at the end, or goes away on an error.

    What an interrupted process left under the temporary name is removed first.

    Raises:
      UserError: `path` exists and is not empty, or it cannot be written (full disk, permissions).
    """
    target = epath.Path(path)
    if "://" not in os.fspath(path):  # epath would take a remote path for a relative one
        target = target.expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists already; choose another output directory or remove it")
    partial = target.parent / f".{target.name}.incomplete"
    try:
        partial.rmtree(missing_ok=True)
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException as error:
        partial.rmtree(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(
                f"{target}: cannot be written ({error.strerror or error}); nothing was left there"
            ) from error
        raise
