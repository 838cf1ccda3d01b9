"""`python -m experiments.ladder <stage> [options]`."""

import dataclasses
import functools
import operator
import os
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from rich.console import Console

from experiments.ladder.presets import Ladder, get_ladder
from experiments.ladder.released import default_directory
from olmax import cpu_tuning
from olmax.cli import options
from olmax.errors import UserError


def _console() -> Console:
    console = Console()
    # A log file has no width of its own; tables should not be squeezed into 80 columns there.
    return console if console.is_terminal else Console(width=200)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class Stage:
    """Train a ladder, predict a larger model, train that one, and compare.

    A stage that is complete is reused, one that was interrupted continues. Options under `ladder`
    belong to the preset and can be overridden.
    """

    ladder: Ladder
    name: tyro.conf.Suppress[str] = "all"
    preset: str = "tiny"
    """The ladder to start from: tiny, smoke or paper."""
    dry_run: bool = False
    """Print the whole ladder with its compute and its time on TPUs, and do nothing."""
    overwrite: bool = False
    """Do trained runs anew whose settings have changed; what they left is removed."""

    def run(self) -> None:
        """Runs the stage."""
        if self.dry_run:
            from experiments.ladder.dry_run import print_plan

            print_plan(self.ladder, _console())
            return
        from experiments.ladder import pipeline
        from olmax import distributed

        distributed.initialize()
        pipeline.run(self.ladder, self.name, _console(), overwrite=self.overwrite)


STAGES = {
    "all": "Everything: prepare, train, predict, target, report.",
    "prepare": "Tokenizer, packed data, questions.",
    "train": "The runs that are fitted, each into a CSV file in the released format.",
    "predict": "Fit the runs and write down what the target will score.",
    "target": "Train the target; needs the prediction.",
    "report": "Set prediction and target side by side.",
}


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Reproduce the paper's predictions for 7B-4T and 13B-5T from the released ladder runs.

    Prints our numbers beside the printed ones and writes ladder.json and report.html.
    """

    runs: str = dataclasses.field(default_factory=default_directory)
    """Folder of the released CSV files."""
    run_dir: str = "runs/ladder-reproduce"
    """Where results go."""
    resamples: int = 1000
    """Resamples of the runs behind the intervals; 0 for none."""
    seed: int = 0
    """Of the resamples."""

    def run(self) -> None:
        """Fits, resamples, prints, writes."""
        from experiments.ladder.reproduce import multiple_choice, reproduce
        from olmax import scaling
        from olmax.reporting.document import Section, TableBlock
        from olmax.scaling.identifiability import flat_warnings
        from olmax.scaling.nesting import nested_errors
        from olmax.scaling.report import ladder_report, prediction_table

        began = time.perf_counter()
        found = reproduce(self.runs, progress=_say)
        fit = found.fits["task_loss"]
        draws = None
        if self.resamples:
            start = time.perf_counter()
            draws = scaling.resample(found.runs, fit, samples=self.resamples, seed=self.seed)
            took = time.perf_counter() - start
            _say(f"{self.resamples} resamples of both steps: {took:.1f} s")
        console = _console()
        predictions, tables = {}, []
        for name, run in found.targets.items():
            tables += [found.prediction_table(name), found.variant_table(name)]
            predictions[name] = found.compare(name)
            if draws is not None:
                target = scaling.Target.of(run)
                predictions[name] = predictions[name].join(draws.table(target))
        tables.append(found.scatter_table())
        for table in tables:
            console.print(table.rich())
        for name, table in predictions.items():
            console.print(prediction_table(table, name).rich())
        for name, row in multiple_choice(self.runs).iterrows():
            print(
                f"MMLU, multiple choice, {name}: predicted {100 * row.accuracy:.2f}, actual "
                f"{100 * row.actual:.2f}"
            )
        tasks = [task.task for task in fit.tasks.values()]
        nesting = {
            name: nested_errors(found.runs, run, tasks) for name, run in found.targets.items()
        }
        flat = flat_warnings(found.runs, fit, list(map(scaling.Target.of, found.targets.values())))
        scaling.save(f"{self.run_dir}/ladder.json", fit, draws)
        report = ladder_report(
            fit,
            title="Task scaling laws: the released ladder",
            runs=found.runs,
            target_runs=list(found.targets.values()),
            predictions=predictions,
            warnings=[*fit.warnings, *flat],
            nesting=nesting,
            extra=[Section("Beside the printed numbers", [TableBlock(t) for t in tables])],
            resamples=self.resamples,
            footer="python -m experiments.ladder reproduce",
        )
        report.write(f"{self.run_dir}/report.html")
        print(f"{self.run_dir}: ladder.json, report.html ({time.perf_counter() - began:.0f} s)")


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How often the intervals hold on simulated ladders of the released shape."""

    runs: str = dataclasses.field(default_factory=default_directory)
    """Folder of the released CSV files."""
    simulations: int = 320
    """Simulated ladders, shared among the tasks."""
    samples: int = 200
    """Resamples of each."""
    seed: int = 0
    """Of everything."""

    def run(self) -> None:
        """Simulates and prints shares."""
        from experiments.ladder.released import TARGETS, read_released
        from experiments.ladder.studies import coverage_tables
        from olmax import scaling

        runs = read_released(self.runs)
        targets = [
            dataclasses.replace(scaling.Target.of(run), name=name)
            for name, run in zip(
                TARGETS, read_released(self.runs, tuple(TARGETS.values())), strict=True
            )
        ]
        fit = scaling.fit_ladder(runs, tasks=scaling.get_tasks(scaling.MAIN_TASKS), check=False)
        study = scaling.coverage_study(
            runs,
            fit,
            targets,
            simulations=self.simulations,
            samples=self.samples,
            seed=self.seed,
            progress=_say,
        )
        for table in coverage_tables(study):
            _console().print(table.rich())


@dataclasses.dataclass(frozen=True)
class Choose:
    """Choose a procedure by leaving out one size of the ladder at a time, then look at the targets.

    Everything up to the choice sees only the sixteen ladder runs.
    """

    runs: str = dataclasses.field(default_factory=default_directory)
    """Folder of the released CSV files."""
    best: int = 15
    """Rows of the ranking to print."""

    def run(self) -> None:
        """Ranks, then predicts 7B-4T and 13B-5T with the default and the chosen procedure."""
        from experiments.ladder.studies import choose_tables

        for table in choose_tables(self.runs, self.best):
            _console().print(table.rich())


@dataclasses.dataclass(frozen=True)
class Speed:
    """Time the resampling and compare refits with scipy's from the same starts."""

    runs: str = dataclasses.field(default_factory=default_directory)
    """Folder of the released CSV files."""
    samples: int = 1000
    """Resamples of the ladder, all eight tasks, both steps."""
    compare: int = 25
    """Resamples of each task that scipy refits too (about half a second each)."""
    seed: int = 0
    """Of the resamples."""

    def run(self) -> None:
        """Prints seconds, failures and the worst excess over scipy's objective."""
        from experiments.ladder.studies import speed_table

        table = speed_table(self.runs, self.samples, self.compare, self.seed)
        _console().print(table.rich())


def parse(argv: Sequence[str] | None = None) -> Any:
    """The command with the preset filled in.

    Raises:
      UserError: unknown preset, or options that cannot be read.
      SystemExit: 0 after --help.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    ladder = get_ladder(_preset(argv))
    stages = [
        Annotated[
            Stage,
            tyro.conf.subcommand(name, default=Stage(ladder, name), description=text),
        ]
        for name, text in STAGES.items()
    ]
    studies = [
        Annotated[kind, tyro.conf.subcommand(kind.__name__.lower())]
        for kind in (Reproduce, Coverage, Choose, Speed)
    ]
    commands: Any = functools.reduce(operator.or_, [*stages, *studies])
    return options.one_line(
        lambda: tyro.cli(
            commands,
            args=argv,
            prog="python -m experiments.ladder",
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
    try:
        parse(argv).run()
    except UserError as error:
        print(f"experiments.ladder: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("experiments.ladder: interrupted; run again to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
