"""The stages in order, each done once."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console

from experiments.embedded import (
    DATA,
    HELD_OUT,
    TOKENIZER,
    held_out_documents,
    held_out_evaluators,
    open_mix,
    prepare_corpus,
    read_held_out,
    write_held_out,
)
from experiments.olmoe.recipe import MAIN, Recipe
from experiments.stages import Stages
from olmax import sharding
from olmax.data.prepared import Manifest
from olmax.data.tokenizer import Tokenizer
from olmax.errors import UserError
from olmax.evaluation.perplexity import perplexity
from olmax.models.config import Execution
from olmax.models.decoder import Decoder
from olmax.reporting.files import write_json
from olmax.training import checkpoint_files, config_json
from olmax.training.checkpoints import restore_model
from olmax.training.config import TrainConfig
from olmax.training.run_directory import locked
from olmax.training.trainer import Trainer

ALL = ("prepare", "train", "evaluate", "routing", "report")
"""What `all` runs."""
EVALUATION, ROUTING, COMPILED = "evaluation", "routing", "compiled"
STAGES_OF_TRAINING = (1, 10, 20, 40)
"""Percent of pretraining whose checkpoints the router saturation compares with the last one."""


def run(recipe: Recipe, stage: str, console: Console, *, overwrite: bool = False) -> None:
    """Runs one stage, or all of them.

    Args:
      recipe: checked here.
      stage: a name in `ALL`, or `all`.
      console: where progress and results are printed.
      overwrite: see `Stages`.

    Raises:
      UserError: a recipe or run directory that cannot be used, or a stage whose inputs are missing.
    """
    recipe.check()
    directory = pathlib.Path(recipe.directory)
    if jax.process_count() > 1 and stage != "train":
        raise UserError(
            f"stage {stage} runs in one process; on several hosts run train, and the other stages "
            "on one host with the same --run-dir"
        )
    if stage in ("all", "train"):
        # Now, and not only after the stages before it.
        mesh = sharding.make_mesh(recipe.train.mesh)
        for config in recipe.runs().values():
            sharding.check_divisible(config.model, mesh)
    with locked(directory) if jax.process_index() == 0 else contextlib.nullcontext():
        if recipe.train.compilation_cache is None:
            jax.config.update("jax_compilation_cache_dir", str(directory.absolute() / COMPILED))
        pipeline = _Pipeline(recipe, directory, console, overwrite)
        for name in ALL if stage == "all" else (stage,):
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
            "train": self._train,
            "evaluate": self._evaluate,
            "routing": self._routing,
            "report": self._report,
        }
        stages[name]()
        write_json(self.directory / "recipe.json", config_json.to_json(self.recipe))

    @property
    def _data(self) -> pathlib.Path:
        if self.recipe.corpus is not None:
            return self.directory / DATA
        if self.recipe.data is None:
            raise UserError(
                f"preset {self.recipe.name} trains on {self.recipe.mix}, which is not shipped; "
                "prepare it with `olmax prepare` and give --data DIRECTORY, or look at the plan "
                "with --dry-run"
            )
        return pathlib.Path(self.recipe.data)

    def _prepare(self) -> None:
        corpus = self.recipe.corpus
        if corpus is None:
            with self.stages.run("prepare", Manifest.read(self._data).fingerprint):
                return
        settings = {"corpus": corpus, "seq_len": self.recipe.train.seq_len}
        with self.stages.run("prepare", settings, outputs=[TOKENIZER, DATA]) as wanted:
            if wanted:
                prepare_corpus(
                    corpus,
                    self.recipe.mix,
                    sequence_length=self.recipe.train.seq_len,
                    vocab_size=self.recipe.train.model.vocab_size,
                    directory=self.directory,
                    console=self.console,
                )
        evaluation = self.recipe.evaluation
        settings = {
            "seed": corpus.seed,
            "documents": evaluation.documents,
            "document_bytes": evaluation.document_bytes,
        }
        with self.stages.run("held-out", settings, after=["prepare"], outputs=[HELD_OUT]) as wanted:
            if wanted:
                write_held_out(
                    held_out_documents(corpus),
                    self.directory,
                    count=evaluation.documents,
                    length=evaluation.document_bytes,
                )

    def _rates(self) -> dict[str, float]:
        if self.recipe.corpus is not None:
            return self.recipe.corpus.rates(self.recipe.mix)
        sources = Manifest.read(self._data).sources
        return {source.name: float(source.tokens) for source in sources}

    def _train(self) -> None:
        for name, config in self.recipe.runs().items():
            settings = {
                "train": _determining(config_json.to_json(config)),
                "mix": self.recipe.mix,
                "data_seed": self.recipe.data_seed,
                "repetition_filter": self.recipe.repetition_filter,
            }
            with self.stages.run(
                _stage_of(name), settings, after=["prepare"], outputs=[name], costly=True
            ) as wanted:
                if wanted:
                    self._fit(name, config)

    def _fit(self, name: str, config: TrainConfig) -> None:
        output = self.directory / name
        output.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            shutil.copyfile(self._data / "tokenizer.json", output / "tokenizer.json")
        config = dataclasses.replace(
            config,
            data={
                "mix": self.recipe.mix,
                "seed": self.recipe.data_seed,
                "fingerprint": Manifest.read(self._data).fingerprint,
            },
        )
        with open_mix(
            self._data,
            self._rates(),
            batch_size=config.batch_size,
            seed=self.recipe.data_seed,
            vocab_size=config.model.vocab_size,
            repetition_filter=self.recipe.repetition_filter,
        ) as loader:
            evaluators = held_out_evaluators(
                self.directory,
                Tokenizer.from_file(self._data),
                every=self.recipe.evaluation.every,
                seq_len=config.seq_len,
            )
            Trainer(config, loader, output, evaluators=evaluators).fit()

    def _model(self, path: pathlib.Path) -> Decoder:
        execution = Execution(compute_dtype=self.recipe.train.execution.compute_dtype)
        return restore_model(str(path), execution=execution)

    def _held_out(self) -> dict[str, list[str]]:
        if self.recipe.corpus is None:
            raise UserError(
                f"preset {self.recipe.name}: evaluate, routing and report judge models of the "
                f"embedded corpus; use `olmax eval` and `olmax routing` with --model "
                f"{self.directory / MAIN}"
            )
        return read_held_out(self.directory)

    def _evaluate(self) -> None:
        documents = self._held_out()
        after = ["held-out", *(_stage_of(name) for name in self.recipe.runs())]
        with self.stages.run("evaluate", {}, after=after, outputs=[EVALUATION]) as wanted:
            if not wanted:
                return
            tokenizer = Tokenizer.from_file(self._data)
            for name in self.recipe.runs():
                self.console.print(f"evaluating {name}")
                model = self._model(self.directory / name)
                found = {
                    source: [
                        each.bits_per_byte.value
                        for each in _by_document(model, tokenizer, source, texts)
                    ]
                    for source, texts in documents.items()
                }
                write_json(self.directory / EVALUATION / f"{name}.json", found)

    def _routing(self) -> None:
        from olmax.routing import analysis, collect, windows

        documents = self._held_out()
        settings = {"tokens": self.recipe.evaluation.routing_tokens}
        after = ["held-out", _stage_of(MAIN)]
        with self.stages.run("routing", settings, after=after, outputs=[ROUTING]) as wanted:
            if not wanted:
                return
            tokenizer = Tokenizer.from_file(self._data)
            # Held-out text as it is evaluated is short; the analysis reads whole documents.
            corpus = self.recipe.corpus
            assert corpus is not None
            documents = held_out_documents(corpus)
            cut = windows(
                tokenizer,
                documents,
                length=self.recipe.train.seq_len,
                tokens=self.recipe.evaluation.routing_tokens,
            )
            final = collect(self._model(self.directory / MAIN), cut)
            earlier = {
                f"{percent} %": collect(self._model(path), cut)
                for percent, path in self._checkpoints().items()
            }
            found = analysis.analyse(
                final, layers=range(self.recipe.train.model.n_layers), earlier=earlier
            )
            names = {i: tokenizer.decode([i]) for i in range(tokenizer.vocab_size)}
            write_json(self.directory / ROUTING / "routing.json", found)
            write_json(self.directory / ROUTING / "tokens.json", names)

    def _checkpoints(self) -> dict[int, pathlib.Path]:
        """Checkpoints of the main run by percent of pretraining, those nearest to the paper's."""
        root = self.directory / MAIN / "checkpoints"
        paths = [pathlib.Path(p) for p in checkpoint_files.valid_checkpoints(_epath(root))]
        total = self.recipe.train.total_steps
        found = {}
        for percent in STAGES_OF_TRAINING:
            nearest = min(paths, key=lambda path: abs(int(path.name) / total - percent / 100))
            step = int(nearest.name)
            if step < total:
                found[round(100 * step / total)] = nearest
        return found

    def _report(self) -> None:
        from experiments.olmoe.report import write_report

        self.stages.fingerprint("evaluate")
        self.stages.fingerprint("routing")
        results = {
            name: json.loads((self.directory / EVALUATION / f"{name}.json").read_text())
            for name in self.recipe.runs()
        }
        write_report(self.recipe, self.directory, results, self._seconds(), self.console)

    def _seconds(self) -> dict[str, float]:
        names = [
            "prepare",
            "held-out",
            *(_stage_of(name) for name in self.recipe.runs()),
            "evaluate",
            "routing",
        ]
        return {name: self.stages.seconds(name) for name in names}


def _by_document(model: Decoder, tokenizer: Tokenizer, source: str, texts: list[str]):
    """Perplexity of each document, so that two models can be compared pair by pair."""
    found = perplexity(
        model,
        tokenizer,
        {f"{source} {i}": [text] for i, text in enumerate(texts)},
        # Tokens of a long document have at least half a context before them.
        stride=model.config.max_seq_len // 2,
    )
    return list(found.values())


def _stage_of(name: str) -> str:
    return f"train/{name}"


def _epath(path: pathlib.Path) -> Any:
    from etils import epath

    return epath.Path(path)


# Settings of a training run that change how it is watched or executed, not what comes out.
_WATCHING = ("log_interval", "tensorboard", "wandb_project", "compilation_cache", "allow_changes")


def _determining(train: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in train.items() if name not in _WATCHING}
