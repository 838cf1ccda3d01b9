"""Command lines through tyro, with mistakes told in one line."""

import contextlib
import io
import re
import sys
from collections.abc import Callable

from olmax.errors import UserError


def one_line[T](parse: Callable[[], T]) -> T:
    """`parse()`, which calls tyro, with tyro's framed messages told in one line.

    Raises:
      UserError: the command line is wrong; the message says what and what was meant.
      SystemExit: 0 after `--help`.
    """
    framed = io.StringIO()
    try:
        with contextlib.redirect_stderr(framed):
            return parse()
    except SystemExit as end:
        if end.code != 2:
            sys.stderr.write(framed.getvalue())
            raise
    raise UserError(f"{summary(framed.getvalue())}; --help lists the options")


def summary(framed: str) -> str:
    """What tyro's message says: the mistake, and the names of the options it proposes.

    Args:
      framed: the message as printed, in boxes whose sections are separated by rules.
    """
    sections: list[list[str]] = [[]]
    for line in framed.splitlines():
        # With a frame in box characters, or set in by two columns where the encoding has none.
        text = line.strip("│ ")
        is_title = line.startswith("╭") or re.match(r" \S", line)
        if is_title or not text.strip("─-╰╯"):
            sections.append([])
        else:
            sections[-1].append(text)
    told = []
    for lines in filter(None, sections):
        text = " ".join(lines)
        if text.startswith(("For full helptext", "Perhaps you meant", "Similar")):
            names = [found for line in lines if (found := re.match(r"--[\w.-]+", line))]
            text = f"did you mean {names[0].group()}?" if names else ""
        elif text.startswith("Argument helptext"):
            text = ""
        elif text.startswith("Missing"):
            names = [found.group() for line in lines if (found := re.match(r"--[\w.-]+", line))]
            text = f"{lines[0].rstrip(':')}: {', '.join(names) or ' '.join(lines[1:])}"
        if text:
            told.append(text.rstrip("."))
    return "; ".join(told) or "the command line cannot be read"
