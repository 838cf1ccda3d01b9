"""The stages of a ladder in order, each done once: data, runs, prediction, target, report."""

import contextlib
import pathlib
import shutil

import jax
from rich.console import Console

from experiments.ladder.prediction import FIT, PREDICTION, RUNS, TARGET, predict, report
from experiments.ladder.presets import Ladder
from experiments.ladder.questions import write_questions
from experiments.ladder.recipe import Rung
from experiments.olmo2.preparation import (
    DATA,
    REQUESTS,
    TOKENIZER,
    data_directory,
    load_tokenizer,
    open_loader,
    prepare_corpus,
)
from experiments.stages import Stages
from olmax.data.loader import DataLoader, LoaderOptions
from olmax.data.prepared import Manifest, open_prepared
from olmax.errors import UserError
from olmax.evaluation.requests import read_tasks
from olmax.evaluation.suite import Suite
from olmax.reporting.files import write_json
from olmax.scaling import recording
from olmax.training import config_json
from olmax.training.recorder import METRICS
from olmax.training.run_directory import locked
from olmax.training.trainer import Evaluator, Trainer

MAIN = ("prepare", "train", "predict", "target", "report")
"""What `all` runs."""
TRAINING, COMPILED = "training", "compiled"


def run(ladder: Ladder, stage: str, console: Console, *, overwrite: bool = False) -> None:
    """Runs one stage, or all of them.

    Args:
      ladder: checked here.
      stage: a name in `MAIN`, or `all`.
      console: where progress and results are printed.
      overwrite: see `Stages`.

    Raises:
      UserError: a ladder or run directory that cannot be used, or a stage whose inputs are missing.
    """
    ladder.check()
    directory = pathlib.Path(ladder.directory)
    if jax.process_count() > 1 and stage not in ("train", "target"):
        raise UserError(
            f"stage {stage} runs in one process; on several hosts run train and target, and the "
            "other stages on one host with the same directory"
        )
    with locked(directory) if jax.process_index() == 0 else contextlib.nullcontext():
        jax.config.update("jax_compilation_cache_dir", str(directory.absolute() / COMPILED))
        pipeline = _Pipeline(ladder, directory, console, overwrite)
        for name in MAIN if stage == "all" else (stage,):
            pipeline.stage(name)


class _Pipeline:
    def __init__(self, ladder: Ladder, directory: pathlib.Path, console: Console, overwrite: bool):
        self.ladder = ladder
        self.directory = directory
        self.console = console
        self.recipe = ladder.data_recipe()
        self.primary = jax.process_index() == 0
        self.stages = Stages(directory, console, overwrite=overwrite, primary=self.primary)

    def stage(self, name: str) -> None:
        {
            "prepare": self._prepare,
            "train": self._train,
            "predict": self._predict,
            "target": self._target,
            "report": self._report,
        }[name]()
        # Afterwards: a stage that refuses these settings leaves the directory as it was.
        write_json(self.directory / "ladder-settings.json", config_json.to_json(self.ladder))

    def _prepare(self) -> None:
        ladder, corpus = self.ladder, self.ladder.corpus
        if corpus is None:
            # Data that was prepared elsewhere: only what it is counts.
            prepared = data_directory(self.recipe, ladder.mix, self.directory)
            settings = {
                "data": Manifest.read(prepared).fingerprint,
                "requests": list(ladder.requests),
            }
            if not ladder.requests:
                raise UserError(
                    f"preset {ladder.name}: no tasks; give request files with --ladder.requests"
                )
            with self.stages.run("prepare", settings):
                return
        settings = {"corpus": corpus, "seq_len": ladder.seq_len}
        with self.stages.run("prepare", settings, outputs=[TOKENIZER, DATA]) as wanted:
            if wanted:
                prepare_corpus(self.recipe, self.directory, self.console)
        settings = {"seed": corpus.seed, "questions": ladder.questions}
        with self.stages.run("questions", settings, outputs=[REQUESTS]) as wanted:
            if wanted:
                write_questions(self.directory / REQUESTS, ladder.questions, corpus.seed)

    def _questions(self) -> list[str]:
        """Stages that the tasks come from."""
        return ["prepare"] if self.ladder.corpus is None else ["prepare", "questions"]

    def _train(self) -> None:
        for rung in self.ladder.rungs():
            self._run(f"train/{rung.name}", rung, RUNS)

    def _target(self) -> None:
        # Before the target is trained its prediction stands in a file.
        self.stages.fingerprint("predict")
        rung = self.ladder.target_rung()
        self._run(f"target/{rung.name}", rung, TARGET)

    def _run(self, stage: str, rung: Rung, folder: str) -> None:
        config = self._config(rung)
        determining = config_json.to_json(config)
        settings = {
            "train": {k: v for k, v in determining.items() if k not in _WATCHING},
            "every": rung.evaluation_interval,
        }
        training = pathlib.Path(TRAINING) / rung.name
        table = pathlib.Path(folder) / f"{rung.name}.csv"
        with self.stages.run(
            stage,
            settings,
            after=self._questions(),
            outputs=[str(training), str(table)],
            costly=True,
        ) as wanted:
            if wanted:
                self._train_run(rung, self.directory / training, self.directory / table)

    def _config(self, rung: Rung):
        ladder = self.ladder
        return rung.train_config(
            seed=ladder.seed,
            execution=ladder.execution,
            checkpoint=ladder.checkpoint,
            mesh=ladder.mesh,
        )

    def _train_run(self, rung: Rung, output: pathlib.Path, table: pathlib.Path) -> None:
        output.mkdir(parents=True, exist_ok=True)
        if self.primary:
            tokenizer = data_directory(self.recipe, self.ladder.mix, self.directory)
            shutil.copyfile(tokenizer / "tokenizer.json", output / "tokenizer.json")
        evaluator = Evaluator(recording.EVALUATOR, rung.evaluation_interval, self._in_loop())
        with self._loader(rung) as loader:
            Trainer(self._config(rung), loader, output, evaluators=[evaluator]).fit()
        if self.primary:
            recording.write_run(
                output / METRICS,
                table,
                batch_tokens=rung.batch_tokens,
                learning_rate=rung.learning_rate,
                parameters=rung.shape.parameters,
                flops_per_token=rung.shape.flops_per_token,
            )

    def _loader(self, rung: Rung) -> DataLoader:
        ladder = self.ladder
        if ladder.corpus is not None:
            return open_loader(
                self.recipe,
                ladder.mix,
                batch_size=rung.batch_size,
                seed=ladder.seed,
                directory=self.directory,
            )
        # A prepared mix is read as it is: every instance once an epoch.
        return DataLoader(
            open_prepared(data_directory(self.recipe, ladder.mix, self.directory)),
            LoaderOptions(
                batch_size=rung.batch_size,
                seed=ladder.seed,
                vocab_size=ladder.vocab_size,
                host_index=jax.process_index(),
                host_count=jax.process_count(),
            ),
        )

    def _in_loop(self) -> recording.InLoop:
        tasks = read_tasks(self.ladder.requests or [self.directory / REQUESTS])
        suite = Suite(load_tokenizer(self.recipe, self.directory), tasks)
        # Few shapes: small models take longer to compile than to run.
        return recording.InLoop(suite, batch_tokens=32768)

    def _predict(self) -> None:
        ladder = self.ladder
        target = ladder.target_rung()
        settings = {
            "resamples": ladder.resamples,
            "last": ladder.last,
            "seed": ladder.seed,
            "target": [target.name, target.shape.parameters, target.tokens],
        }
        rungs = [rung.name for rung in ladder.rungs()]
        with self.stages.run(
            "predict",
            settings,
            after=[f"train/{name}" for name in rungs],
            outputs=[FIT, PREDICTION],
        ) as wanted:
            if wanted:
                predict(ladder, self.directory, self.console)

    def _report(self) -> None:
        self.stages.fingerprint(f"target/{self.ladder.target_rung().name}")
        names = ["prepare", *(f"train/{rung.name}" for rung in self.ladder.rungs())]
        names += ["predict", f"target/{self.ladder.target_rung().name}"]
        seconds = {name: self.stages.seconds(name) for name in names}
        report(self.ladder, self.directory, seconds, self.console)


# Settings of a training run that change how it is watched or executed, not what comes out.
_WATCHING = ("log_interval", "tensorboard", "wandb_project", "compilation_cache", "allow_changes")
