"""Dispatch of `olmax <verb>`.

A verb is a dataclass in a module of its own with a `run` method. Those modules import nothing heavy
at their top, so that `olmax --help` is quick; jax comes in when a verb runs.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from olmax import cpu_tuning
from olmax.cli import options
from olmax.cli.convert import Convert
from olmax.cli.eval import Eval
from olmax.cli.generate import Generate
from olmax.cli.ladder import Ladder
from olmax.cli.launch import Launch
from olmax.cli.merge import Merge
from olmax.cli.mixes import Mixes
from olmax.cli.plan import Plan
from olmax.cli.prepare import Prepare
from olmax.cli.routing import Routing
from olmax.cli.score import Score
from olmax.cli.upcycle import Upcycle
from olmax.errors import UserError

VERBS: dict[str, type] = {
    "convert": Convert,
    "eval": Eval,
    "generate": Generate,
    "ladder": Ladder,
    "launch": Launch,
    "merge": Merge,
    "mixes": Mixes,
    "plan": Plan,
    "prepare": Prepare,
    "routing": Routing,
    "score": Score,
    "upcycle": Upcycle,
}


def run(verb: Any) -> int:
    """Runs a parsed verb and returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    # TensorFlow (behind seqio) greets on standard error when it is imported.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    cpu_tuning.apply()
    try:
        verb.run()
    except UserError as error:
        print(f"olmax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("olmax: interrupted", file=sys.stderr)
        return 130
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parses `argv` (the process's arguments when None) and runs the verb."""
    try:
        verb = options.one_line(
            lambda: tyro.extras.subcommand_cli_from_dict(
                VERBS,
                prog="olmax",
                description="Fully open language models in JAX.",
                args=argv,
            )
        )
    except UserError as error:
        print(f"olmax: {error}", file=sys.stderr)
        return 2
    return run(verb)


def console() -> None:
    """Entry point of the `olmax` command."""
    sys.exit(main())


if __name__ == "__main__":
    console()
