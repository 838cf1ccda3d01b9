"""`python -m experiments.olmoe <stage> --preset NAME [overrides]`."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro
from rich.console import Console

from experiments.olmoe.presets import get_recipe
from experiments.olmoe.recipe import Recipe
from olmax import cpu_tuning
from olmax.cli import options
from olmax.errors import UserError

Stage = Literal["all", "prepare", "train", "evaluate", "routing", "report", "published"]


@dataclasses.dataclass(frozen=True)
class Command:
    """OLMoE: a mixture of experts beside its dense twin and other variants, and its routing.

    A stage that is complete is reused, one that was interrupted continues. All options below the
    first ones belong to the preset and can be overridden.
    """

    stage: Annotated[Stage, tyro.conf.Positional]
    """`all` runs prepare to report; `published` prints the paper's routing tables from the counts
    that were released with it."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    preset: str = "tiny"
    """The recipe to start from: tiny, smoke, olmoe-1b-7b, or an ablation such as
    olmoe-ablation-32e."""
    dry_run: bool = False
    """Print the resolved configuration, parameter counts, FLOPs, learning rates and tokens, and do
    nothing."""
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
    default = dataclasses.replace(Command(stage="all", recipe=recipe), stage=tyro.MISSING)
    return options.one_line(
        lambda: tyro.cli(
            Command,
            default=default,
            args=argv,
            prog="python -m experiments.olmoe",
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
        if command.stage == "published":
            from experiments.olmoe.published import print_routing_tables

            print_routing_tables(console)
            return 0
        if command.dry_run:
            from experiments.olmoe.dry_run import print_plan

            print_plan(command.recipe, console)
            return 0
        from experiments.olmoe import pipeline
        from olmax import distributed

        distributed.initialize()
        pipeline.run(command.recipe, command.stage, console, overwrite=command.overwrite)
    except UserError as error:
        print(f"experiments.olmoe: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("experiments.olmoe: interrupted; run again to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
