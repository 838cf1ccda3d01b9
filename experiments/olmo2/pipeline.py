"""The stages in order, each done once."""

import contextlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console

from experiments.olmo2 import training_stages
from experiments.olmo2.evaluate import evaluate_model
from experiments.olmo2.preparation import (
    DATA,
    HELD_OUT,
    REQUESTS,
    TOKENIZER,
    data_directory,
    load_tokenizer,
    prepare_corpus,
    prepare_held_out,
)
from experiments.olmo2.recipe import Recipe, ingredient_name
from experiments.stages import Stages
from olmax import sharding
from olmax.data.prepared import Manifest
from olmax.errors import UserError
from olmax.models.config import Execution
from olmax.models.decoder import Decoder
from olmax.reporting.files import write_json
from olmax.training import config_json
from olmax.training.run_directory import locked

MAIN = ("prepare", "pretrain", "anneal", "soup", "evaluate", "report")
"""What `all` runs."""
EVALUATION, COMPILED = "evaluation", "compiled"


def run(recipe: Recipe, stage: str, console: Console, *, overwrite: bool = False) -> None:
    """Runs one stage, or all of them.

    Args:
      recipe: checked here.
      stage: a name in `MAIN`, `all`, `microanneal` or `stability`.
      console: where progress and results are printed.
      overwrite: see `Stages`.

    Raises:
      UserError: a recipe or run directory that cannot be used, or a stage whose inputs are missing.
    """
    recipe.check()
    directory = pathlib.Path(recipe.directory)
    if jax.process_count() > 1 and stage not in ("pretrain", "anneal"):
        raise UserError(
            f"stage {stage} runs in one process; on several hosts run pretrain and anneal, and the "
            "other stages on one host with the same --run-dir"
        )
    if stage in ("all", "pretrain", "anneal", "microanneal"):
        # Now, and not only after the stages before it.
        mesh = sharding.make_mesh(recipe.pretrain.mesh)
        sharding.check_divisible(recipe.pretrain.model, mesh)
    # The hosts share the directory; the first one writes what is written once.
    with locked(directory) if jax.process_index() == 0 else contextlib.nullcontext():
        if recipe.pretrain.compilation_cache is None:
            # The annealing runs are one program, and so are the evaluations of all models.
            jax.config.update("jax_compilation_cache_dir", str(directory.absolute() / COMPILED))
        pipeline = _Pipeline(recipe, directory, console, overwrite)
        for name in MAIN if stage == "all" else (stage,):
            pipeline.stage(name)


class _Pipeline:
    def __init__(self, recipe: Recipe, directory: pathlib.Path, console: Console, overwrite: bool):
        self.recipe = recipe
        self.directory = directory
        self.console = console
        primary = jax.process_index() == 0
        self.stages = Stages(directory, console, overwrite=overwrite, primary=primary)

    def stage(self, name: str) -> None:
        stages: dict[str, Callable[[], None]] = {
            "prepare": self._prepare,
            "pretrain": self._pretrain,
            "anneal": self._anneal,
            "soup": self._soup,
            "evaluate": self._evaluate,
            "report": self._report,
            "microanneal": self._microanneal,
            "stability": self._stability,
        }
        stages[name]()
        # Afterwards: a stage that refuses these settings leaves the directory as it was.
        write_json(self.directory / "recipe.json", config_json.to_json(self.recipe))

    def _prepare(self) -> None:
        if self.recipe.corpus is None and self.recipe.data:
            # Data that was prepared elsewhere: only what it is counts.
            mixes = [self.recipe.pretrain_mix, *(i.mix for i in self.recipe.anneal.ingredients)]
            found = {
                mix: Manifest.read(data_directory(self.recipe, mix, self.directory)).fingerprint
                for mix in mixes
            }
            with self.stages.run("prepare", found):
                return
        corpus = self.recipe.corpus
        settings = {"corpus": corpus, "seq_len": self.recipe.pretrain.seq_len}
        with self.stages.run("prepare", settings, outputs=[TOKENIZER, DATA]) as wanted:
            if wanted:
                prepare_corpus(self.recipe, self.directory, self.console)
        if corpus is None:
            return
        # Apart: other questions do not make another model.
        settings = {"seed": corpus.seed, "evaluation": self.recipe.evaluation}
        with self.stages.run(
            "held-out", settings, after=["prepare"], outputs=[HELD_OUT, REQUESTS]
        ) as wanted:
            if wanted:
                prepare_held_out(self.recipe, corpus, self.directory)

    def _pretrain(self) -> None:
        settings = {
            "pretrain": _determining(config_json.to_json(self.recipe.pretrain)),
            "mix": self.recipe.pretrain_mix,
            "data_seed": self.recipe.data_seed,
            "repetition_filter": self.recipe.repetition_filter,
        }
        with self.stages.run(
            "pretrain", settings, after=["prepare"], outputs=["pretrain"], costly=True
        ) as wanted:
            if wanted:
                training_stages.pretrain(self.recipe, self.directory)

    def _anneal(self) -> None:
        for number, ingredient in enumerate(self.recipe.anneal.ingredients):
            settings = {
                "ingredient": config_json.to_json(ingredient),
                "batch_size": self.recipe.anneal.batch_size,
                "learning_rate_step": self.recipe.anneal.learning_rate_step,
            }
            output = training_stages.ingredient_directory(self.directory, number)
            with self.stages.run(
                f"anneal/{ingredient_name(number)}",
                settings,
                after=["pretrain"],
                outputs=[str(output.relative_to(self.directory))],
                costly=True,
            ) as wanted:
                if wanted:
                    training_stages.anneal(self.recipe, number, self.directory)

    def _ingredients(self) -> list[str]:
        return [
            f"anneal/{ingredient_name(number)}"
            for number in range(len(self.recipe.anneal.ingredients))
        ]

    def _soup(self) -> None:
        settings = [ingredient.souped for ingredient in self.recipe.anneal.ingredients]
        outputs = [training_stages.SOUP]
        with self.stages.run(
            "soup", settings, after=self._ingredients(), outputs=outputs
        ) as wanted:
            if wanted:
                training_stages.make_soup(self.recipe, self.directory)

    def _models(self) -> dict[str, Callable[[], Decoder]]:
        from olmax.interop import load_model
        from olmax.training.checkpoints import restore_model

        # As `load_model` runs the soup: one program then serves all of them.
        execution = Execution(compute_dtype=self.recipe.pretrain.execution.compute_dtype)
        models: dict[str, Callable[[], Decoder]] = {
            "pretrained": lambda: restore_model(
                str(self.directory / training_stages.PRETRAIN), execution=execution
            )
        }
        for number in range(len(self.recipe.anneal.ingredients)):
            path = training_stages.ingredient_directory(self.directory, number)
            models[ingredient_name(number)] = lambda path=path: restore_model(
                str(path), execution=execution
            )
        models["soup"] = lambda: load_model(
            self.directory / training_stages.SOUP, compute_dtype=execution.compute_dtype
        )
        return models

    def _evaluate(self) -> None:
        if self.recipe.corpus is None:
            raise UserError(
                f"preset {self.recipe.name}: evaluate and report judge models of the embedded "
                f"corpus; use `olmax eval --model {self.directory / training_stages.SOUP}`"
            )
        after = ["held-out", "pretrain", *self._ingredients(), "soup"]
        settings = {"sample_tokens": self.recipe.evaluation.sample_tokens}
        with self.stages.run("evaluate", settings, after=after, outputs=[EVALUATION]) as wanted:
            if wanted:
                self._evaluate_into(EVALUATION, self._models())

    def _evaluate_into(self, folder: str, models: dict[str, Callable[[], Decoder]]) -> None:
        tokenizer = load_tokenizer(self.recipe, self.directory)
        for name, load in models.items():
            self.console.print(f"evaluating {name}")
            result = evaluate_model(load(), tokenizer, self.recipe, self.directory)
            write_json(self.directory / folder / f"{name}.json", result)

    def _report(self) -> None:
        from experiments.olmo2.report import write_report

        results = self.read_results(EVALUATION)
        write_report(self.recipe, self.directory, results, self._seconds(), self.console)

    def read_results(self, folder: str) -> dict[str, Any]:
        """Evaluation results by model, in the order of the recipe."""
        self.stages.fingerprint("evaluate")
        return {
            name: json.loads((self.directory / folder / f"{name}.json").read_text())
            for name in self._models()
        }

    def _seconds(self) -> dict[str, float]:
        names = ["prepare", "held-out", "pretrain", *self._ingredients(), "soup", "evaluate"]
        return {name: self.stages.seconds(name) for name in names}

    def _microanneal(self) -> None:
        from experiments.olmo2 import microanneal

        microanneal.run(self.recipe, self.directory, self.stages, self.console)

    def _stability(self) -> None:
        from experiments.olmo2 import stability

        stability.run(self.recipe, self.directory, self.stages, self.console)


# Settings of a training run that change how it is watched or executed, not what comes out.
_WATCHING = ("log_interval", "tensorboard", "wandb_project", "compilation_cache", "allow_changes")


def _determining(pretrain: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in pretrain.items() if name not in _WATCHING}
