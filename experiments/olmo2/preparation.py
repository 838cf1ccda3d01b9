"""Stage prepare: tokenizer, packed training data, held-out documents, benchmark questions."""

import json
import pathlib
import sys
from collections.abc import Iterator, Mapping

import jax
from rich.console import Console

from experiments.olmo2 import suite
from experiments.olmo2.dry_run import mix_rates
from experiments.olmo2.recipe import Corpus, Recipe
from olmax.data import corpus as embedded
from olmax.data.loader import DataLoader, LoaderOptions
from olmax.data.prepared import Manifest, open_prepared, prepare
from olmax.data.repetition import RepetitionFilter
from olmax.data.tokenizer import Tokenizer, train_bpe
from olmax.errors import UserError
from olmax.reporting.files import write_json, write_text

TOKENIZER, DATA, HELD_OUT, REQUESTS = "tokenizer", "data", "held_out", "requests"


def prepare_corpus(recipe: Recipe, directory: pathlib.Path, console: Console) -> None:
    """Writes the tokenizer and the packed training data.

    Raises:
      UserError: the recipe has no embedded corpus, or the corpus does not fit the model.
    """
    corpus = recipe.corpus
    if corpus is None:
        raise UserError(
            f"preset {recipe.name} trains on {recipe.pretrain_mix}, which is not shipped; prepare "
            "it with `olmax prepare` and name its directory, for example --data "
            f"{recipe.pretrain_mix} DIRECTORY, or look at the plan with --dry-run"
        )
    texts = _tokenizer_texts(corpus, mix_rates(recipe, recipe.pretrain_mix))
    tokenizer = train_bpe(texts, vocab_size=corpus.vocab_size)
    if tokenizer.vocab_size > recipe.pretrain.model.vocab_size:
        raise UserError(
            f"corpus.vocab_size={corpus.vocab_size} does not fit "
            f"pretrain.model.vocab_size={recipe.pretrain.model.vocab_size}; make them equal"
        )
    tokenizer.save(directory / TOKENIZER)
    manifest = prepare(
        [embedded.source(name, seed=corpus.seed) for name in _sources(corpus)],
        tokenizer,
        directory / DATA,
        sequence_length=recipe.pretrain.seq_len,
        max_tokens=corpus.max_tokens,
        overwrite=True,
        progress=sys.stderr.isatty(),
    )
    for source in manifest.sources:
        console.print(
            f"{source.name}: {source.documents:,} documents, {source.tokens:,} tokens, "
            f"{source.text_bytes / source.tokens:.2f} bytes a token",
            highlight=False,
        )


def prepare_held_out(recipe: Recipe, corpus: Corpus, directory: pathlib.Path) -> None:
    """Writes the held-out documents and the benchmark questions."""
    held_out = {
        name: [d.text for d in embedded.source(name, split="held_out", seed=corpus.seed).read()]
        for name in _sources(corpus)
    }
    for name, texts in held_out.items():
        count, length = recipe.evaluation.documents, recipe.evaluation.document_bytes
        if name == "arithmetic":
            # Problems are short: as much text of them as of the others.
            joined = "".join(texts)
            texts = [joined[i * length : (i + 1) * length] for i in range(len(joined) // length)]
        lines = (json.dumps({"text": _cut(text, length)}) for text in texts[:count])
        write_text(directory / HELD_OUT / f"{name}.jsonl", "".join(f"{line}\n" for line in lines))
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


def _sources(corpus: Corpus) -> list[str]:
    return list(dict.fromkeys(name for mix in corpus.mixes.values() for name in mix))


def _cut(text: str, length: int) -> str:
    """The first `length` UTF-8 bytes, whole characters."""
    return text.encode()[:length].decode(errors="ignore")


def _tokenizer_texts(corpus: Corpus, rates: Mapping[str, float]) -> Iterator[str]:
    """Training documents of each source, as much of each as its share of the pretraining mix."""
    for name, share in rates.items():
        budget = corpus.tokenizer_bytes * share
        for document in embedded.source(name, seed=corpus.seed).read():
            if budget <= 0:
                break
            yield document.text
            budget -= len(document.text.encode())


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
    weights = mix_rates(recipe, mix)
    names = {source.name for source in Manifest.read(prepared).sources}
    missing = [name for name in weights if name not in names]
    if missing:
        raise UserError(f"{prepared}: mix {mix} needs source {missing[0]!r}; prepare again with it")
    return DataLoader(
        open_prepared(prepared, sources=list(weights)),
        LoaderOptions(
            batch_size=batch_size,
            seed=seed,
            weights=weights,
            repetition_filter=RepetitionFilter() if recipe.repetition_filter else None,
            vocab_size=recipe.pretrain.model.vocab_size,
            host_index=jax.process_index(),
            host_count=jax.process_count(),
        ),
    )


def read_held_out(directory: pathlib.Path) -> dict[str, list[str]]:
    """Held-out documents by source; none where the recipe embeds no corpus."""
    return {
        path.stem: [json.loads(line)["text"] for line in path.read_text().splitlines()]
        for path in sorted((directory / HELD_OUT).glob("*.jsonl"))
    }


def load_tokenizer(recipe: Recipe, directory: pathlib.Path) -> Tokenizer:
    """The tokenizer of the recipe's data."""
    return Tokenizer.from_file(data_directory(recipe, recipe.pretrain_mix, directory))
