"""The embedded corpus as experiments use it: tokenizer, packed training data, held-out documents.

It consists of texts that come with Python (standard-library code, language reference, docstrings)
and of generated arithmetic, so nothing is downloaded.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping

import jax
from rich.console import Console

from olmax.data import corpus as embedded
from olmax.data.loader import DataLoader, LoaderOptions
from olmax.data.prepared import Manifest, open_prepared, prepare
from olmax.data.repetition import RepetitionFilter
from olmax.data.tokenizer import Tokenizer, train_bpe
from olmax.errors import UserError
from olmax.evaluation.perplexity import perplexity
from olmax.reporting.files import write_text
from olmax.training.trainer import Evaluator

TOKENIZER, DATA, HELD_OUT = "tokenizer", "data", "held_out"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What is tokenised, in which shares, and what is held out."""

    vocab_size: int = 1024
    """Ids of the byte-level BPE trained on the pretraining mix."""
    mixes: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    """Shares of the sources in each mix."""
    max_tokens: int = 1_200_000
    """Tokens prepared of each source at most."""
    tokenizer_bytes: int = 2_000_000
    """Text the tokenizer is trained on, shared like the pretraining mix."""
    seed: int = 0
    """Of the generated texts and of the choice of held-out documents."""

    @property
    def sources(self) -> list[str]:
        """Sources of all mixes."""
        return list(dict.fromkeys(name for mix in self.mixes.values() for name in mix))

    def rates(self, mix: str) -> dict[str, float]:
        """Shares of a mix, summing to 1.

        Raises:
          UserError: no such mix.
        """
        if mix not in self.mixes:
            raise UserError(f"corpus: no mix {mix!r}; there are {', '.join(self.mixes)}")
        weights = self.mixes[mix]
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def prepare_corpus(
    corpus: Corpus,
    mix: str,
    *,
    sequence_length: int,
    vocab_size: int,
    directory: pathlib.Path,
    console: Console,
) -> None:
    """Writes the tokenizer and the packed training data.

    Args:
      corpus: what is prepared.
      mix: mixture that the tokenizer is trained on.
      sequence_length: tokens of a training sequence.
      vocab_size: of the model, which must have a row for every id.
      directory: gets `TOKENIZER` and `DATA`.
      console: where sizes are printed.

    Raises:
      UserError: the corpus does not fit the model.
    """
    tokenizer = train_bpe(_tokenizer_texts(corpus, corpus.rates(mix)), vocab_size=corpus.vocab_size)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"corpus.vocab_size={corpus.vocab_size} does not fit the model's "
            f"vocab_size={vocab_size}; make them equal"
        )
    tokenizer.save(directory / TOKENIZER)
    manifest = prepare(
        [embedded.source(name, seed=corpus.seed) for name in corpus.sources],
        tokenizer,
        directory / DATA,
        sequence_length=sequence_length,
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


def _tokenizer_texts(corpus: Corpus, rates: Mapping[str, float]) -> Iterator[str]:
    """Training documents of each source, as much of each as its share of the pretraining mix."""
    for name, share in rates.items():
        budget = corpus.tokenizer_bytes * share
        for document in embedded.source(name, seed=corpus.seed).read():
            if budget <= 0:
                break
            yield document.text
            budget -= len(document.text.encode())


def held_out_documents(corpus: Corpus) -> dict[str, list[str]]:
    """Held-out documents of every source, whole."""
    return {
        name: [d.text for d in embedded.source(name, split="held_out", seed=corpus.seed).read()]
        for name in corpus.sources
    }


def write_held_out(
    held_out: Mapping[str, list[str]], directory: pathlib.Path, *, count: int, length: int
) -> None:
    """Writes `count` documents of each source, cut to `length` bytes."""
    for name, texts in held_out.items():
        if name == "arithmetic":
            # Problems are short: as much text of them as of the others.
            joined = "".join(texts)
            texts = [joined[i * length : (i + 1) * length] for i in range(len(joined) // length)]
        lines = (json.dumps({"text": _cut(text, length)}) for text in texts[:count])
        write_text(directory / HELD_OUT / f"{name}.jsonl", "".join(f"{line}\n" for line in lines))


def _cut(text: str, length: int) -> str:
    """The first `length` UTF-8 bytes, whole characters."""
    return text.encode()[:length].decode(errors="ignore")


def read_held_out(directory: pathlib.Path) -> dict[str, list[str]]:
    """Held-out documents by source; none where the recipe embeds no corpus."""
    return {
        path.stem: [json.loads(line)["text"] for line in path.read_text().splitlines()]
        for path in sorted((directory / HELD_OUT).glob("*.jsonl"))
    }


def open_mix(
    prepared: pathlib.Path,
    weights: Mapping[str, float],
    *,
    batch_size: int,
    seed: int,
    vocab_size: int,
    repetition_filter: bool,
) -> DataLoader:
    """Training batches of a mix of prepared sources.

    Raises:
      UserError: no prepared data, or it was made with a larger vocabulary than the model's.
    """
    names = {source.name for source in Manifest.read(prepared).sources}
    missing = [name for name in weights if name not in names]
    if missing:
        raise UserError(f"{prepared}: the mix needs source {missing[0]!r}; prepare again with it")
    return DataLoader(
        open_prepared(prepared, sources=list(weights)),
        LoaderOptions(
            batch_size=batch_size,
            seed=seed,
            weights=dict(weights),
            repetition_filter=RepetitionFilter() if repetition_filter else None,
            vocab_size=vocab_size,
            host_index=jax.process_index(),
            host_count=jax.process_count(),
        ),
    )


def held_out_evaluators(
    directory: pathlib.Path, tokenizer: Tokenizer, *, every: int, seq_len: int
) -> list[Evaluator]:
    """Bits per byte on the beginnings of a few held-out documents of each source while training."""
    texts = read_held_out(directory)
    if not every or not texts:
        return []
    # A quick look: text that fits the context, so that every document is one row.
    length = seq_len * 5 // 4
    few = {name: [text[:length] for text in group[:16]] for name, group in texts.items()}

    def bits_per_byte(model) -> dict[str, float]:
        found = perplexity(model, tokenizer, few, batch_tokens=8192)
        return {name: result.bits_per_byte.value for name, result in found.items()}

    return [Evaluator("held_out", every, bits_per_byte)]
