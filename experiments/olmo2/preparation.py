"""Stage prepare: tokenizer, packed training data, held-out documents, benchmark questions."""

import json
import pathlib

from rich.console import Console

from experiments import embedded
from experiments.embedded import DATA, HELD_OUT, TOKENIZER, Corpus, read_held_out
from experiments.olmo2 import suite
from experiments.olmo2.dry_run import mix_rates
from experiments.olmo2.recipe import Recipe
from olmax.data.loader import DataLoader
from olmax.data.tokenizer import Tokenizer
from olmax.errors import UserError
from olmax.reporting.files import write_json, write_text

REQUESTS = "requests"

__all__ = [
    "DATA",
    "HELD_OUT",
    "REQUESTS",
    "TOKENIZER",
    "data_directory",
    "load_tokenizer",
    "open_loader",
    "prepare_corpus",
    "prepare_held_out",
    "read_held_out",
]


def prepare_corpus(recipe: Recipe, directory: pathlib.Path, console: Console) -> None:
    """Writes the tokenizer and the packed training data.

    Raises:
      UserError: the recipe has no embedded corpus, or the corpus does not fit the model.
    """
    if recipe.corpus is None:
        raise UserError(
            f"preset {recipe.name} trains on {recipe.pretrain_mix}, which is not shipped; prepare "
            "it with `olmax prepare` and name its directory, for example --data "
            f"{recipe.pretrain_mix} DIRECTORY, or look at the plan with --dry-run"
        )
    embedded.prepare_corpus(
        recipe.corpus,
        recipe.pretrain_mix,
        sequence_length=recipe.pretrain.seq_len,
        vocab_size=recipe.pretrain.model.vocab_size,
        directory=directory,
        console=console,
    )


def prepare_held_out(recipe: Recipe, corpus: Corpus, directory: pathlib.Path) -> None:
    """Writes the held-out documents and the benchmark questions."""
    held_out = embedded.held_out_documents(corpus)
    embedded.write_held_out(
        held_out,
        directory,
        count=recipe.evaluation.documents,
        length=recipe.evaluation.document_bytes,
    )
    for name, rows in suite.tasks(held_out, recipe.evaluation).items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        # The folders of OLMES files: `<task>/<variant>/`, so that `olmax eval` reads them too.
        task, _, variant = name.rpartition("_")
        folder = directory / REQUESTS / task / variant
        write_text(folder / "requests.jsonl", text)
        write_json(
            folder / "config.json",
            {
                "task_name": name,
                "task_config": {"primary_metric": suite.METRICS[name]},
                "num_instances": len({row["doc_id"] for row in rows}),
            },
        )


def data_directory(recipe: Recipe, mix: str, directory: pathlib.Path) -> pathlib.Path:
    """Prepared data of a mix.

    Raises:
      UserError: the recipe does not embed it and names no directory.
    """
    if recipe.corpus is not None:
        return directory / DATA
    if mix not in recipe.data:
        raise UserError(
            f"preset {recipe.name}: no prepared data for {mix}; make it with `olmax prepare` and "
            f"give --data {mix} DIRECTORY, or look at the plan with --dry-run"
        )
    return pathlib.Path(recipe.data[mix])


def open_loader(
    recipe: Recipe, mix: str, *, batch_size: int, seed: int, directory: pathlib.Path
) -> DataLoader:
    """Training batches of a mix.

    Raises:
      UserError: no prepared data, or it was made with a larger vocabulary than the model's.
    """
    prepared = data_directory(recipe, mix, directory)
    return embedded.open_mix(
        prepared,
        mix_rates(recipe, mix),
        batch_size=batch_size,
        seed=seed,
        vocab_size=recipe.pretrain.model.vocab_size,
        repetition_filter=recipe.repetition_filter,
    )


def load_tokenizer(recipe: Recipe, directory: pathlib.Path) -> Tokenizer:
    """The tokenizer of the recipe's data."""
    return Tokenizer.from_file(data_directory(recipe, recipe.pretrain_mix, directory))
