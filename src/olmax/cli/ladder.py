"""`olmax ladder`: fit a ladder of small runs and predict the scores of a larger one."""

import dataclasses
import json
import re
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from olmax.errors import UserError

if TYPE_CHECKING:
    from olmax.scaling import LadderFit, Run, Target

_SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_NUMBER = re.compile(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)([KMBT]?)")


def parse_number(text: str, what: str) -> float:
    """A positive number such as `7B`, `3.9T` or `6887575552`.

    Raises:
      UserError: it is not one.
    """
    match = _NUMBER.fullmatch(text.strip())
    try:
        value = float(match[1]) * _SUFFIXES.get(match[2], 1) if match else 0.0
    except ValueError:
        value = 0.0
    if value <= 0:
        raise UserError(f"{what} {text!r}: give a positive number such as 7B, 3.9T or 6887575552")
    return value


def parse_target(text: str) -> "Target":
    """`N,D` or `N,D,FLOPS_PER_TOKEN`, optionally after `NAME=`.

    Raises:
      UserError: it is not of that form.
    """
    from olmax.scaling import Target

    name, found, numbers = text.rpartition("=")
    parts = numbers.split(",")
    if len(parts) not in (2, 3):
        raise UserError(f"--target {text!r}: give N,D (parameters, tokens), for example 7B,4T")
    values = [parse_number(part, "--target") for part in parts]
    return Target(
        name if found else f"N={parts[0]}, D={parts[1]}",
        values[0],
        values[1],
        values[2] if len(values) == 3 else None,
    )


def parse_pairs(items: tuple[str, ...], option: str) -> dict[str, float]:
    """`NAME=NUMBER` options as a dict.

    Raises:
      UserError: an item is not of that form.
    """
    found = {}
    for item in items:
        name, equals, number = item.partition("=")
        if not equals or not name:
            raise UserError(f"{option} {item!r}: give NAME=NUMBER")
        found[name] = parse_number(number, option)
    return found


@dataclasses.dataclass(frozen=True)
class Fit:
    """Fit both steps to ladder runs, resample them, and predict targets.

    Example: olmax ladder fit runs/*.csv --target 7B,3.9T --output ladder.json
    """

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """CSV files of runs in the released format, or directories of them."""
    config: str | None = None
    """Configuration in the released format instead: which runs are fitted, which are targets."""
    sizes: tuple[str, ...] = ()
    """N of sizes that are not of the released ladder, as SIZE=N; SIZE starts a file's name."""
    tasks: tuple[str, ...] = ()
    """Names of released tasks; the paper's eight, or those found in the columns, when left out."""
    chance: tuple[str, ...] = ()
    """Chance accuracy of own tasks, as TASK=0.25 (0.25 when left out)."""
    variant: Literal[
        "task_loss", "flops", "c4", "task_ce", "single_step", "direct_accuracy", "multiple_choice"
    ] = "task_loss"
    """Which of the paper's procedures; task_loss is that of its main results."""
    chance_floor: bool = False
    """Keep the second step from falling below chance."""
    run_weights: bool = False
    """Give every run the same weight in step 2, not every checkpoint."""
    chance_points: int = 0
    """Helper points of step 2: this many at chance, at the largest loss seen."""
    many_starts: bool = False
    """Search both steps from many starts and keep the best, not from the published one alone."""
    target: tuple[str, ...] = ()
    """Models to predict, as N,D or NAME=N,D[,FLOPS_PER_TOKEN]; suffixes K, M, B and T are read."""
    target_runs: tuple[str, ...] = ()
    """CSV files of finished target runs, to compare with."""
    resamples: int = 1000
    """Resamples of the runs behind the intervals; 0 for none."""
    seed: int = 0
    """Of the resamples."""
    output: str = "ladder.json"
    """File to write the fit to."""

    def run(self) -> None:
        """Fits, prints and saves."""
        from olmax import scaling
        from olmax.scaling.identifiability import flat_warnings
        from olmax.scaling.report import coefficient_tables, prediction_table

        if self.resamples < 0:
            raise UserError(f"--resamples {self.resamples}: give 0 or more")
        # Mistakes in options come out before any work is done.
        targets = [parse_target(text) for text in self.target]
        console = _console()
        runs, held = self._read()
        tasks = scaling.get_tasks(self.tasks) if self.tasks else None
        if tasks is None and runs:
            chances = parse_pairs(self.chance, "--chance")
            tasks = scaling.find_tasks(runs[0].table.columns, chances) or None
        fit = scaling.fit_ladder(runs, tasks=tasks, procedure=self._procedure())
        draws = None
        if self.resamples:
            with console.status("resampling") as status:
                draws = scaling.resample(
                    runs, fit, samples=self.resamples, seed=self.seed, progress=status.update
                )
        scaling.save(self.output, fit, draws)
        for table in coefficient_tables(fit):
            console.print(table.rich())
        saved = scaling.SavedLadder(fit, draws)
        flat = flat_warnings(runs, fit, [*targets, *map(scaling.Target.of, held)])
        for target in targets:
            console.print(prediction_table(saved.predict(target), target.name).rich())
        for run in held:
            console.print(prediction_table(saved.compare(run), run.name).rich())
        warnings = [*fit.warnings, *flat]
        for target in [*targets, *map(scaling.Target.of, held)]:
            warnings += scaling.saved.target_warnings(fit, target)
        _warn(warnings)
        print(f"{self.output}: {len(fit.tasks)} tasks fitted to {len(runs)} runs")
        if draws is not None and any(draws.failures().values()):
            failed = ", ".join(f"{n} {c}" for n, c in draws.failures().items() if c)
            print(f"refits that did not converge, of {self.resamples} a task: {failed}")

    def _read(self) -> tuple[list["Run"], list["Run"]]:
        from olmax import scaling

        if self.config and self.runs:
            raise UserError("give runs or --config, not both")
        sizes = {n: round(v) for n, v in parse_pairs(self.sizes, "--sizes").items()}
        runs, held = scaling.read_config(self.config) if self.config else ([], [])
        if not self.config:
            runs = scaling.read_runs(self.runs, sizes=sizes)
        return runs, held + scaling.read_runs(self.target_runs, sizes=sizes)

    def _procedure(self):
        from olmax.scaling import VARIANTS

        procedure = VARIANTS[self.variant]
        if self.chance_floor:
            procedure = dataclasses.replace(procedure, floor="chance")
        if self.run_weights:
            procedure = dataclasses.replace(procedure, weights="runs")
        if self.chance_points:
            procedure = dataclasses.replace(procedure, chance_points=self.chance_points)
        if self.many_starts:
            procedure = dataclasses.replace(procedure, search="many")
        return procedure


@dataclasses.dataclass(frozen=True)
class Report:
    """Write the HTML report of a fitted ladder.

    Example: olmax ladder report ladder.json --runs runs/*.csv --target 7B,3.9T
    """

    fit: tyro.conf.Positional[str]
    """File that `olmax ladder fit` wrote."""
    runs: tuple[str, ...] = ()
    """The runs that were fitted, for the figures of both steps."""
    sizes: tuple[str, ...] = ()
    """As in `olmax ladder fit`."""
    target: tuple[str, ...] = ()
    """Models to predict, as N,D."""
    target_runs: tuple[str, ...] = ()
    """CSV files of finished target runs."""
    leave_one_size_out: bool = False
    """Also predict every run from the runs of the other sizes (needs --runs)."""
    output: str = "ladder.html"
    """File to write."""

    def run(self) -> None:
        """Writes the report."""
        from olmax import scaling
        from olmax.scaling.report import ladder_report

        saved = scaling.load(self.fit)
        targets = [parse_target(text) for text in self.target]
        sizes = {n: round(v) for n, v in parse_pairs(self.sizes, "--sizes").items()}
        runs = scaling.read_runs(self.runs, sizes=sizes)
        _check_provenance(self.fit, saved.fit, runs)
        held = scaling.read_runs(self.target_runs, sizes=sizes)
        predictions = {target.name: saved.predict(target) for target in targets}
        predictions |= {run.name: saved.compare(run) for run in held}
        warnings = list(saved.fit.warnings)
        for target in [*targets, *map(scaling.Target.of, held)]:
            warnings += scaling.saved.target_warnings(saved.fit, target)
        holdout = None
        if self.leave_one_size_out:
            if not runs:
                raise UserError("--leave-one-size-out needs the runs; give them with --runs")
            tasks = [task.task for task in saved.fit.tasks.values()]
            holdout = scaling.leave_one_size_out(runs, tasks, {"this": saved.fit.procedure})
        report = ladder_report(
            saved.fit,
            title="Ladder",
            runs=runs,
            target_runs=held,
            predictions=predictions,
            warnings=warnings,
            holdout=holdout,
            resamples=saved.draws.samples if saved.draws else 0,
            footer=f"olmax ladder report {self.fit}",
        )
        report.write(self.output)
        print(f"{self.output}: report of {len(saved.fit.tasks)} tasks")


@dataclasses.dataclass(frozen=True)
class Predict:
    """Predict scores from a fitted ladder.

    Example: olmax ladder predict ladder.json --target 7B,3.9T
    """

    fit: tyro.conf.Positional[str]
    """File that `olmax ladder fit` wrote."""
    target: tuple[str, ...]
    """Models to predict, as N,D or NAME=N,D[,FLOPS_PER_TOKEN]."""
    level: float = 0.9
    """Nominal coverage of the intervals."""
    json: bool = False
    """Print JSON for programs."""

    def run(self) -> None:
        """Prints predictions."""
        from olmax import scaling
        from olmax.reporting.files import jsonable
        from olmax.scaling.report import prediction_table

        if not 0 < self.level < 1:
            raise UserError(f"--level {self.level}: give a share between 0 and 1, such as 0.9")
        targets = [parse_target(text) for text in self.target]
        saved = scaling.load(self.fit)
        if self.json:
            content = {
                target.name: {
                    "predictions": saved.predict(target, level=self.level).to_dict("index"),
                    "warnings": saved.warnings(target),
                }
                for target in targets
            }
            print(json.dumps(jsonable(content), indent=1))
            return
        for target in targets:
            table = saved.predict(target, level=self.level)
            _console().print(prediction_table(table, target.name).rich())
            _warn(saved.warnings(target))


@dataclasses.dataclass(frozen=True)
class Ladder:
    """Task scaling laws: predict benchmark scores from a ladder of small runs."""

    command: Annotated[Fit | Report | Predict, tyro.conf.OmitSubcommandPrefixes]

    def run(self) -> None:
        """Runs the subcommand."""
        self.command.run()


def _console():
    from rich.console import Console

    console = Console()
    # A file or a pipe has no width of its own; tables must not be cut there.
    return console if console.is_terminal else Console(width=130)


def _check_provenance(file: str, fit: "LadderFit", runs: list["Run"]) -> None:
    known = {run["sha256"] for run in fit.runs}
    for run in runs:
        if run.sha256 not in known:
            raise UserError(f"{run.path}: is not among the runs of {file}; fit again with it")


def _warn(warnings: list[str]) -> None:
    import sys

    for sentence in dict.fromkeys(warnings):
        print(f"olmax: warning: {sentence}", file=sys.stderr)
