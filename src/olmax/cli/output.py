"""Result files of verbs: whole or absent."""

import json
from collections.abc import Iterable
from typing import Any


def check_output(path: str) -> None:
    """Checks before any work that a file can be put at `path`.

    Raises:
      UserError: it is a directory.
    """
    from etils import epath

    from olmax.errors import UserError

    if epath.Path(path).is_dir():
        raise UserError(f"{path}: is a directory; give the name of a file")


def write_lines(path: str, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object a line.

    Raises:
      UserError: the file cannot be written.
    """
    from olmax.reporting.files import jsonable

    lines = [json.dumps(jsonable(row), ensure_ascii=False) + "\n" for row in rows]
    write(path, "".join(lines))


def write(path: str, text: str) -> None:
    """Writes a whole file, or leaves what was there.

    Raises:
      UserError: the file cannot be written.
    """
    from olmax.errors import UserError
    from olmax.reporting.files import write_text

    try:
        write_text(path, text)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path}: cannot be written ({reason}); choose another --output") from error
