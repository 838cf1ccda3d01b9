import csv
import io
import re

import pytest
import rich.console

from olmax.data import mixtures
from olmax.data.documents import Document, DocumentSource
from olmax.data.tokenizer import train_bpe
from olmax.errors import UserError

DOLMINO = (mixtures.DOLMINO_50B, mixtures.DOLMINO_100B, mixtures.DOLMINO_300B)
UNITS = {"B": 1.0, "M": 1e-3}


@pytest.fixture(scope="module")
def configs(data_dir):
    path = data_dir / "olmo2_official_configs"
    if not path.is_dir():
        pytest.skip(f"no released configurations at {path}")
    return path


def _listed(path):
    """Directory -> billions of tokens in all, from the #SOURCE comments of a configuration."""
    found: dict[str, float] = {}
    comment = re.compile(r"#SOURCE: http://\S+?/preprocessed/(\S+?)/? \(([\d.]+)([BM])T\)")
    for directory, amount, unit in comment.findall(path.read_text()):
        found[directory] = found.get(directory, 0.0) + float(amount) * UNITS[unit]
    return found


@pytest.mark.parametrize("mix", DOLMINO, ids=lambda m: m.name)
def test_dolmino_takes_what_the_released_configuration_lists(mix, configs):
    listed = _listed(configs / f"{mix.config}.nopaths.yaml")
    # One configuration names the two-student set by a deeper folder than the others.
    listed = {d.removesuffix("/dolma2-tokenizer"): n for d, n in listed.items()}
    ours = {
        part.directory.removesuffix("/dolma2-tokenizer"): part.billions * part.times
        for source in mix.sources
        for part in source.parts
    }
    assert ours == pytest.approx(listed, abs=1e-9)


def test_olmo_mix_reads_the_released_directories(configs):
    with (configs / f"{mixtures.OLMO_MIX_1124.config}.source_dirs.csv").open() as f:
        released = {row[0].removeprefix("preprocessed/") for row in csv.reader(f)}
    ours = {part.directory for source in mixtures.OLMO_MIX_1124.sources for part in source.parts}
    assert ours == released


def test_fifty_billion_agree_with_the_paper_in_both_ways():
    rates = mixtures.DOLMINO_50B.rates()
    for source in mixtures.DOLMINO_50B.sources:
        assert 100 * rates[source.name] == pytest.approx(source.paper_mix_percent, abs=0.05)
        share = 100 * source.taken / source.available
        # The paper rounds 3.66B of Wikipedia to "all of 3.7B".
        assert share == pytest.approx(source.paper_source_percent, abs=1.1)
    assert mixtures.DOLMINO_50B.billions == pytest.approx(51.47, abs=0.01)


@pytest.mark.parametrize(
    ("mix", "shares", "billions"),
    [
        (mixtures.DOLMINO_100B, [45.6, 15.1, 8.6, 6.5, 2.2, 22.0], 112.9),
        (mixtures.DOLMINO_300B, [50.2, 11.0, 18.8, 4.7, 1.6, 13.7], 311.4),
    ],
    ids=["100b", "300b"],
)
def test_the_larger_samples_deviate_from_the_paper_as_known(mix, shares, billions):
    rates = mix.rates()
    ours = [100 * rates[n] for n in ("dclm", "flan", "pes2o", "wiki", "stackexchange", "math")]
    assert ours == pytest.approx(shares, abs=0.06)
    assert mix.billions == pytest.approx(billions, abs=0.06)
    paper = mix.rates("paper")
    assert sum(paper.values()) == pytest.approx(1)
    assert abs(rates["math"] - paper["math"]) > 0.02


def test_paper_percentages_are_those_of_table_13():
    printed = {
        "dclm": (3.23, 47.2, 6.85, 50.2, 20.78, 51.9),
        "flan": (50, 16.6, 100, 16.7, 200, 11.3),
        "stackexchange": (100, 2.45, 200, 2.47, 400, 1.68),
        "pes2o": (5.15, 5.85, 16.7, 9.52, 100, 19.4),
        "wiki": (100, 7.11, 100, 3.57, 400, 4.86),
        "math": (100, 20.8, 200, 17.5, 400, 10.8),
    }
    for name, row in printed.items():
        ours = []
        for mix in DOLMINO:
            source = next(s for s in mix.sources if s.name == name)
            ours += [source.paper_source_percent, source.paper_mix_percent]
        assert tuple(ours) == row


def test_olmo_mix_adds_up_to_the_published_total():
    assert mixtures.OLMO_MIX_1124.billions == pytest.approx(3900, rel=1e-3)
    with pytest.raises(UserError, match="prints no rates"):
        mixtures.OLMO_MIX_1124.rates("paper")


def test_table_prints_every_source():
    console = rich.console.Console(file=io.StringIO(), width=160)
    console.print(mixtures.table(mixtures.DOLMINO_50B))
    text = console.file.getvalue()
    for source in mixtures.DOLMINO_50B.sources:
        assert source.title in text
    assert "47.23" in text and "47.2 " in text


def test_unknown_mix_and_rates():
    with pytest.raises(UserError, match="no mix 'dolma'; there are olmo_mix_1124"):
        mixtures.get("dolma")
    with pytest.raises(UserError, match="no rates"):
        mixtures.DOLMINO_50B.rates("mine")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["some text, and more"] * 5, vocab_size=270)


def _source(name, texts):
    documents = [Document(text, f"{name}/{i}", name) for i, text in enumerate(texts)]
    return DocumentSource(name, f"{name}-1", lambda: documents)


def test_published_mixes_as_seqio_mixtures(tokenizer):
    import seqio

    names = mixtures.register(tokenizer, mixes=["dolmino_mix_1124_50b", "olmo_mix_1124"])
    mixtures.register(tokenizer, mixes=names)  # a second time replaces them
    for name in names:
        mixture = seqio.MixtureRegistry.get(name)
        rates = {t.name: mixture.get_rate(t) for t in mixture.tasks}
        mix = mixtures.get(name)
        expected = {mixtures.task_name(mix, source): r for source, r in mix.rates().items()}
        assert rates == pytest.approx(expected)
        assert {t.source.__class__ for t in mixture.tasks} == {seqio.TfdsDataSource}


def test_task_of_documents_is_tokenised_and_ended(tokenizer):
    import seqio

    texts = ["some text", "more\n\ntext ü"]
    mixtures.register_task("test.documents", tokenizer, _source("words", texts))
    task = seqio.TaskRegistry.get("test.documents")
    rows = [
        example["targets"].tolist()
        for example in task.get_dataset(None, "train", shuffle=False).as_numpy_iterator()
    ]
    assert rows == [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]

    documents = mixtures.task_documents("test.documents", name="words")
    assert [d.tokens for d in documents.read()] == rows
    assert documents.fingerprint == mixtures.task_documents("test.documents").fingerprint
    mixtures.register_task("test.documents", tokenizer, _source("words", texts[:1]))
    assert len(list(mixtures.task_documents("test.documents").read())) == 1


def test_mixture_samples_at_its_rates(tokenizer):
    import seqio

    for name in ("a", "b"):
        mixtures.register_task(f"test.{name}", tokenizer, _source(name, [name] * 50))
    mixtures.register_mixture("test_mixture", {"test.a": 3.0, "test.b": 1.0})
    dataset = seqio.MixtureRegistry.get("test_mixture").get_dataset(
        {"targets": 4}, "train", shuffle=False, num_epochs=None, seed=0
    )
    letter = tokenizer.encode("a")[0]
    first = [e["targets"][0] for e in dataset.take(400).as_numpy_iterator()]
    assert first.count(letter) / 400 == pytest.approx(0.75, abs=0.1)
