"""OLMo 2's data mixes as plain numbers, as a printable table, and as seqio Tasks and Mixtures.

Sources: OLMo 2 paper, tables 4 (OLMo-Mix-1124), 5 (Dolmino-Mix-1124) and 13 (its 50B, 100B and 300B
    samples), and the
`#SOURCE` comments of the released stage-2 configurations.

For 50B the paper and the released configuration agree. For 100B and 300B they do not: the
configurations list Wikipedia and math more often than table 13 says. The default rates are those of
the released configurations, which trained the released weights; `rates="paper"` gives table 13. The
runs stop after their token budget, so of 112.9B shuffled tokens 100B are seen.

Importing this is cheap; `register` imports seqio.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from olmax.data.documents import Document, DocumentSource
from olmax.data.tokenizer import Tokenizer
from olmax.errors import UserError

if TYPE_CHECKING:
    import rich.table

Rates = Literal["released", "paper"]


@dataclasses.dataclass(frozen=True)
class Part:
    """A directory of token files and how much of it a released configuration takes.

    Attributes:
        directory: below `preprocessed/` of the data bucket.
        billions: tokens taken each time it is listed, in billions.
        times: how often the configuration lists it.
    """

    directory: str
    billions: float
    times: int = 1


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of a mix.

    Attributes:
        name: also the folder under `data/` of the mix on the Hugging Face hub.
        title: as the paper prints it.
        kind: type of text.
        available: tokens in all, in billions (tables 4 and 5).
        parts: what the released configuration takes.
        paper_source_percent: share of the source that is used; over 100 it repeats (table 13).
        paper_mix_percent: share of the mix (table 13).
    """

    name: str
    title: str
    kind: str
    available: float
    parts: tuple[Part, ...] = ()
    paper_source_percent: float | None = None
    paper_mix_percent: float | None = None

    @property
    def taken(self) -> float:
        """Tokens that the released configuration takes, in billions."""
        return sum(part.billions * part.times for part in self.parts)


@dataclasses.dataclass(frozen=True)
class Mix:
    """A published data mix.

    Attributes:
        name: of the mix, and of the seqio Mixture.
        dataset: the TFDS builder that its sources are configurations of.
        config: the released configuration that samples it.
        sources: in the paper's order.
    """

    name: str
    dataset: str
    config: str
    sources: tuple[Source, ...]

    def rates(self, rates: Rates = "released") -> dict[str, float]:
        """Share of each source, summing to 1.

        Raises:
            UserError: `rates` is neither "released" nor "paper", or the paper prints none for this
                mix.
        """
        if rates == "released":
            amounts = {source.name: source.taken for source in self.sources}
        elif rates == "paper":
            amounts = {source.name: source.paper_mix_percent or 0.0 for source in self.sources}
            if not all(amounts.values()):
                raise UserError(f"the paper prints no rates for {self.name}; use the released ones")
        else:
            raise UserError(f"no rates {rates!r}; there are released and paper")
        total = sum(amounts.values())
        return {name: amount / total for name, amount in amounts.items()}

    @property
    def billions(self) -> float:
        """Tokens that the released configuration takes from all sources, in billions."""
        return sum(source.taken for source in self.sources)


def _once(name: str, title: str, kind: str, billions: float, directory: str) -> Source:
    # Stage 1 has no sampling weights: every file once an epoch.
    return Source(name, title, kind, billions, (Part(directory, billions),))


OLMO_MIX_1124 = Mix(
    name="olmo_mix_1124",
    dataset="olmo_mix_1124",
    config="OLMo2-7B-stage1",
    sources=(
        _once(
            "dclm", "DCLM-Baseline 1.0", "web", 3710.0,
            "dclm/text_openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train/allenai/dolma2-tokenizer",
        ),
        _once(
            "starcoder", "StarCoder (filtered)", "code", 83.0,
            "starcoder/v1-decon-100_to_20k-2star-top_token_030/allenai/dolma2-tokenizer",
        ),
        _once("pes2o", "peS2o", "academic papers", 58.6, "pes2o/allenai/dolma2-tokenizer"),
        _once(
            "arxiv", "arXiv", "STEM papers", 20.8,
            "proof-pile-2/v0_decontaminated/arxiv/train/allenai/dolma2-tokenizer",
        ),
        _once(
            "open-web-math", "OpenWebMath", "math web pages", 12.2,
            "proof-pile-2/v0_decontaminated/open-web-math/train/allenai/dolma2-tokenizer",
        ),
        _once(
            "algebraic-stack", "Algebraic Stack", "math proofs code", 11.8,
            "proof-pile-2/v0_decontaminated/algebraic-stack/train/allenai/dolma2-tokenizer",
        ),
        _once(
            "wiki", "Wikipedia & Wikibooks", "encyclopedic", 3.7,
            "olmo-mix/danyh-compiled-v1_7/documents/wiki/allenai/dolma2-tokenizer",
        ),
    ),
)  # fmt: skip

# Tokens of each math set, in billions: TuluMath is its first and last two rows, SynthMath the five
# with `math_mj` and `gsm8k-synth` or `gsm_MIND`, TinyGSM-MIND the two `tinyGSM` ones.
_MATH = (
    ("personahub_math_v5_regen_149960/dolma2-tokenizer", 0.19158),
    ("basic_math_mj/dolma2-tokenizer", 0.00903),
    ("gsm8k-synth/resample_v1_6x/dolma2-tokenizer", 0.00108),
    ("gsm_MIND/clean_stop/dolma2-tokenizer", 0.01706),
    ("gsm8k/v0_main_train/allenai/dolma2-tokenizer", 0.00123),
    ("gsm8k/v0_socratic_train/allenai/dolma2-tokenizer", 0.00151),
    ("owm-filtered-math/metamath", 0.08422),
    ("basic_math_mj/multiadd/dolma2-tokenizer", 0.00221),
    ("mathcoder2-synthmath/ajibawa-2023/dolma2-tokenizer", 0.78258),
    ("mathcoder2-synthmath/mathcoder2-synthmath/filtered-math/dolma2-tokenizer", 3.09),
    ("tinyGSM/mind/dolma2-tokenizer", 3.06),
    ("tinyGSM/mind-2students", 3.41),
    ("tulu-3-sft-personas-math-grade/dolma2-tokenizer", 0.02180),
    ("tulu_v3.9_personahub_math_interm_algebra_20k/dolma2-tokenizer", 0.01974),
)


def _dolmino(
    size: str,
    config: str,
    *,
    dclm: tuple[float, float, float],
    flan: tuple[float, int, float, float],
    pes2o: tuple[float, float, float],
    wiki: tuple[int, float, float],
    stackexchange: tuple[int, float, float],
    math: tuple[int, float, float],
    two_students: int,
) -> Mix:
    """A sample of Dolmino-Mix-1124: billions taken, times listed, table 13's percentages."""
    math_parts = tuple(
        Part(directory, billions, two_students if directory.endswith("mind-2students") else math[0])
        for directory, billions in _MATH
    )
    return Mix(
        name=f"dolmino_mix_1124_{size}",
        dataset="dolmino_mix_1124",
        config=config,
        sources=(
            Source(
                "dclm", "DCLM-Baseline (filtered)", "high-quality web", 752.0,
                (Part("dclm/v0_rep32_ft7percentile_fw2", dclm[0]),), *dclm[1:],
            ),
            Source(
                "flan", "FLAN (decontaminated)", "instructions", 17.0,
                (
                    Part(
                        "tulu_flan/v1-FULLDECON-HARD-TRAIN-60M-shots_all-upweight_1-"
                        "dialog_false-sep_rulebased/allenai/dolma2-tokenizer",
                        flan[0], flan[1],
                    ),
                ), *flan[2:],
            ),
            Source(
                "pes2o", "peS2o", "academic papers", 58.6,
                (Part("pes2o/allenai/dolma2-tokenizer", pes2o[0]),), *pes2o[1:],
            ),
            Source(
                "wiki", "Wikipedia & Wikibooks", "encyclopedic", 3.7,
                (
                    Part(
                        "olmo-mix/danyh-compiled-v1_7/documents/wiki/allenai/dolma2-tokenizer",
                        3.66, wiki[0],
                    ),
                ), *wiki[1:],
            ),
            Source(
                "stackexchange", "Stack Exchange", "questions and answers", 1.26,
                (Part("stackexchange/v1_dedupe/allenai/dolma2-tokenizer", 1.26, stackexchange[0]),),
                *stackexchange[1:],
            ),
            Source("math", "Dolmino math", "mostly synthetic math", 10.7, math_parts, *math[1:]),
        ),
    )  # fmt: skip


DOLMINO_50B = _dolmino(
    "50b",
    "OLMo2-7B-stage2-seed42",
    dclm=(24.31, 3.23, 47.2),
    flan=(8.54, 1, 50.0, 16.6),
    pes2o=(3.01, 5.15, 5.85),
    wiki=(1, 100.0, 7.11),
    stackexchange=(1, 100.0, 2.45),
    math=(1, 100.0, 20.8),
    two_students=1,
)
DOLMINO_100B = _dolmino(
    "100b",
    "OLMo2-13B-stage2-seed1110-100B",
    dclm=(51.47, 6.85, 50.2),
    flan=(17.08, 1, 100.0, 16.7),
    pes2o=(9.76, 16.7, 9.52),
    wiki=(2, 100.0, 3.57),
    stackexchange=(2, 200.0, 2.47),
    math=(2, 200.0, 17.5),
    two_students=3,
)
DOLMINO_300B = _dolmino(
    "300b",
    "OLMo2-13B-stage2-seed2662-300B",
    dclm=(156.26, 20.78, 51.9),
    flan=(17.08, 2, 200.0, 11.3),
    pes2o=(58.55, 100.0, 19.4),
    wiki=(4, 400.0, 4.86),
    stackexchange=(4, 400.0, 1.68),
    math=(4, 400.0, 10.8),
    two_students=4,
)
MIXES: Mapping[str, Mix] = {
    mix.name: mix for mix in (OLMO_MIX_1124, DOLMINO_50B, DOLMINO_100B, DOLMINO_300B)
}


def get(name: str) -> Mix:
    """The published mix of that name.

    Raises:
        UserError: there is none.
    """
    if name not in MIXES:
        raise UserError(f"no mix {name!r}; there are {', '.join(MIXES)}")
    return MIXES[name]


def table(mix: Mix) -> rich.table.Table:
    """The mix as a table: tokens available and taken, and the released and printed shares."""
    import rich.table

    result = rich.table.Table(
        title=mix.name,
        caption=f"{mix.billions:,.1f}B tokens taken by {mix.config}",
        title_justify="left",
    )
    result.add_column("source")
    result.add_column("type")
    for column in (
        "available (B)",
        "taken (B)",
        "source %",
        "mix %",
        "paper: source %",
        "paper: mix %",
    ):
        result.add_column(column, justify="right")
    shares = mix.rates("released")
    for source in mix.sources:
        printed = (source.paper_source_percent, source.paper_mix_percent)
        result.add_row(
            source.title,
            source.kind,
            f"{source.available:,.4g}",
            f"{source.taken:,.2f}",
            f"{100 * source.taken / source.available:.4g}",
            f"{100 * shares[source.name]:.4g}",
            *("" if value is None else f"{value:g}" for value in printed),
        )
    return result


def register_task(
    name: str,
    tokenizer: Tokenizer,
    source: DocumentSource | None = None,
    *,
    tfds_name: str | None = None,
    **tfds: Any,
) -> Any:
    """Registers a seqio Task for language modelling: `targets` are the tokens of a document and the
    end of text.

    Args:
        name: of the Task; may be registered again with the same name, which replaces it.
        tokenizer: gives the vocabulary.
        source: documents (json lines, text, parquet, the embedded corpus), split "train"; or else
        tfds_name: a TFDS dataset, with further arguments of `seqio.TfdsDataSource` (such as
            `tfds_data_dir`).

    Returns:
        The `seqio.Task`.
    """
    import seqio

    from olmax.data.vocabulary import TokenizerVocabulary

    if (source is None) == (tfds_name is None):
        raise ValueError("give either source or tfds_name")
    data_source: Any
    if source is None:
        data_source = seqio.TfdsDataSource(tfds_name=tfds_name, **tfds)
    else:
        data_source = seqio.FunctionDataSource(
            functools.partial(_text_dataset, source), splits=("train",)
        )
    if name in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(name)
    return seqio.TaskRegistry.add(
        name,
        source=data_source,
        preprocessors=[
            functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text"}),
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos,
        ],
        output_features={
            "targets": seqio.Feature(vocabulary=TokenizerVocabulary(tokenizer), add_eos=True)
        },
        metric_fns=[],
    )


def _text_dataset(
    source: DocumentSource, split: str, shuffle_files: bool, seed: int | None = None
) -> Any:
    import tensorflow as tf

    del split, shuffle_files, seed  # one split, in its own order

    def texts() -> Iterator[dict[str, str]]:
        for document in source.read():
            yield {"text": document.text}

    return tf.data.Dataset.from_generator(
        texts, output_signature={"text": tf.TensorSpec((), tf.string)}
    )


def register_mixture(name: str, rates: Mapping[str, float]) -> Any:
    """Registers a seqio Mixture of registered Tasks; a Mixture of that name is replaced."""
    import seqio

    if name in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.remove(name)
    return seqio.MixtureRegistry.add(name, list(rates.items()))


def task_name(mix: Mix, source: str) -> str:
    """Name of the Task of a mix's source, such as `olmo_mix_1124.open_web_math`."""
    return f"{mix.dataset}.{source.replace('-', '_')}"  # seqio allows no hyphens


def register(
    tokenizer: Tokenizer,
    *,
    mixes: Sequence[str] = tuple(MIXES),
    data_dir: str | None = None,
    rates: Rates = "released",
) -> list[str]:
    """Registers the published mixes: Tasks `olmo_mix_1124.dclm` and so on, and one Mixture for each
    mix.

    The data are read from the TFDS datasets of `tfds_builders`, in TFDS's default file format, when
    a Task is used, not before.

    Args:
        tokenizer: gives the vocabulary of every Task.
        mixes: names from `MIXES`.
        data_dir: where TFDS keeps its datasets; its default when None.
        rates: "released" configurations or "paper" (table 13; the Dolmino mixes only).

    Returns:
        Names of the Mixtures.
    """
    import olmax.data.tfds_builders as tfds_builders  # makes the datasets known to TFDS

    for mix in (get(name) for name in mixes):
        tasks = {task_name(mix, source): share for source, share in mix.rates(rates).items()}
        for source in mix.sources:
            config = tfds_builders.config_name(source.name)
            register_task(
                task_name(mix, source.name),
                tokenizer,
                tfds_name=f"{mix.dataset}/{config}:{tfds_builders.VERSION}",
                tfds_data_dir=data_dir,
                splits=("train",),
            )
        register_mixture(mix.name, tasks)
    return list(mixes)


def task_documents(
    task_name: str, *, split: str = "train", name: str | None = None
) -> DocumentSource:
    """The documents of a registered seqio Task, preprocessed and tokenised by it, for
    `prepared.prepare`.

    Args:
        task_name: its `targets` are taken.
        split: of the Task.
        name: of the source; the Task's name when None.
    """
    import seqio

    task = seqio.TaskRegistry.get(task_name)
    name = name or task_name

    def read() -> Iterator[Document]:
        dataset = task.get_dataset(sequence_length=None, split=split, shuffle=False)
        for index, example in enumerate(dataset.as_numpy_iterator()):
            tokens: np.ndarray = example["targets"]
            yield Document(
                text="", id=f"{task_name}/{split}/{index}", source=name, tokens=tokens.tolist()
            )

    vocabulary = task.output_features["targets"].vocabulary
    steps = [getattr(p, "__qualname__", repr(p)) for p in task.preprocessors]
    described = "/".join([task_name, split, str(vocabulary), repr(task.source), *steps])
    return DocumentSource(
        name=name, fingerprint=hashlib.sha256(described.encode()).hexdigest()[:16], read=read
    )
