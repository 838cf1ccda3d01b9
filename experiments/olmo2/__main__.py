"""`python -m experiments.olmo2 <stage> --preset NAME [overrides]`."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro
from rich.console import Console

from experiments.olmo2.presets import get_recipe
from experiments.olmo2.recipe import Recipe
from olmax import cpu_tuning
from olmax.cli import options
from olmax.errors import UserError

Stage = Literal[
    "all",
    "prepare",
    "pretrain",
    "anneal",
    "soup",
    "evaluate",
    "report",
    "microanneal",
    "stability",
]


@dataclasses.dataclass(frozen=True)
class Command:
    """OLMo 2's recipe: tokenizer and data, pretraining, annealing runs, soup, evaluation, report.

    A stage that is complete is reused, one that was interrupted continues. All options below the
    first ones belong to the preset and can be overridden.
    """

    stage: Annotated[Stage, tyro.conf.Positional]
    """`all` runs prepare to report; microanneal and stability are studies beside them."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    preset: str = "tiny"
    """The recipe to start from: tiny, smoke, olmo2-1b, olmo2-7b, olmo2-13b or olmo2-32b."""
    dry_run: bool = False
    """Print the resolved configuration, parameter counts, FLOPs, learning rates, tokens and mixes,
    and do nothing."""
    overwrite: bool = False
    """Do trained stages anew whose settings have changed; what they left is removed."""


def parse(argv: Sequence[str] | None = None) -> Command:
    """The command line with the preset filled in.

    Raises:
      UserError: unknown preset, or options that cannot be read.
      SystemExit: 0 after --help.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    recipe = get_recipe(_preset(argv))
    default = Command(stage="all", recipe=recipe)
    # Dataclasses of a preset are filled from its values; only the stage must be given.
    default = dataclasses.replace(default, stage=tyro.MISSING)
    return options.one_line(
        lambda: tyro.cli(
            Command,
            default=default,
            args=argv,
            prog="python -m experiments.olmo2",
            config=(tyro.conf.AvoidSubcommands,),
        )
    )


def _preset(argv: Sequence[str]) -> str:
    """The value of --preset, needed before the options can be built from it."""
    for number, word in enumerate(argv):
        if word == "--preset" and number + 1 < len(argv):
            return argv[number + 1]
        if word.startswith("--preset="):
            return word.partition("=")[2]
    return "tiny"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; the exit status is 0, 2 for bad input, 130 when interrupted."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    cpu_tuning.apply()
    # A log file has no width of its own; tables should not be squeezed into 80 columns there.
    console = Console(width=None if sys.stdout.isatty() else 130)
    try:
        command = parse(argv)
        if command.dry_run:
            from experiments.olmo2.dry_run import print_plan

            print_plan(command.recipe, console)
            return 0
        from experiments.olmo2 import pipeline
        from olmax import distributed

        distributed.initialize()
        pipeline.run(command.recipe, command.stage, console, overwrite=command.overwrite)
    except UserError as error:
        print(f"experiments.olmo2: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("experiments.olmo2: interrupted; run again to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
