import gzip
import json

import pytest
import zstandard

from olmax.data import prepared
from olmax.data.tokenizer import train_bpe
from olmax.errors import UserError

tfds = pytest.importorskip("tensorflow_datasets")

from olmax.data import mixtures, tfds_builders  # noqa: E402  (imports tensorflow-datasets)

RECORDS = [{"id": f"w{i}", "text": f"encyclopedic text number {i}"} for i in range(20)]


def _lines(records):
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


@pytest.fixture(scope="module")
def manual_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("manual")
    wiki = root / "dolmino-mix-1124" / "data" / "wiki"
    wiki.mkdir(parents=True)
    (wiki / "wiki-0000.json.gz").write_bytes(gzip.compress(_lines(RECORDS[:12])))
    (wiki / "wiki-0001.json.zst").write_bytes(zstandard.compress(_lines(RECORDS[12:])))
    math = root / "olmo-mix-1124" / "data" / "open-web-math" / "train"
    math.mkdir(parents=True)
    (math / "part.jsonl").write_bytes(_lines(RECORDS[:3]))
    return root


def _build(name, manual_dir, data_dir, file_format="array_record"):
    builder = tfds.builder(name, data_dir=data_dir, file_format=file_format)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
    )
    return builder


def test_every_published_source_has_a_configuration():
    assert [c.description for c in tfds_builders.OlmoMix1124.BUILDER_CONFIGS] == [
        s.name for s in mixtures.OLMO_MIX_1124.sources
    ]
    for mix in (mixtures.DOLMINO_50B, mixtures.DOLMINO_100B, mixtures.DOLMINO_300B):
        assert [c.name for c in tfds_builders.DolminoMix1124.BUILDER_CONFIGS] == [
            s.name for s in mix.sources
        ]


def test_from_files_through_array_record_to_training_shards(manual_dir, tmp_path):
    builder = _build("dolmino_mix_1124/wiki", manual_dir, tmp_path / "tfds")
    source = tfds_builders.document_source(builder)
    assert [d.text for d in source.read()] == [r["text"] for r in RECORDS]
    tokenizer = train_bpe([r["text"] for r in RECORDS], vocab_size=300)
    manifest = prepared.prepare(
        [source], tokenizer, tmp_path / "out", sequence_length=16, progress=False
    )
    assert manifest.sources[0].name == "wiki"
    assert manifest.sources[0].documents == 20


def test_folders_with_hyphens_and_seqio_tasks(manual_dir, tmp_path):
    import seqio

    builder = _build("olmo_mix_1124/open_web_math", manual_dir, tmp_path, "tfrecord")
    assert [d.text for d in tfds_builders.document_source(builder).read()] == [
        r["text"] for r in RECORDS[:3]
    ]
    tokenizer = train_bpe([r["text"] for r in RECORDS], vocab_size=300)
    mixtures.register(tokenizer, mixes=["olmo_mix_1124"], data_dir=str(tmp_path))
    task = seqio.TaskRegistry.get("olmo_mix_1124.open_web_math")
    rows = list(task.get_dataset(None, "train", shuffle=False).as_numpy_iterator())
    assert [tokenizer.decode(row["targets"][:-1]) for row in rows] == [
        r["text"] for r in RECORDS[:3]
    ]


def test_missing_files_say_where_they_come_from(manual_dir, tmp_path):
    with pytest.raises(UserError, match=r"data/flan: not there; download .*huggingface\.co"):
        _build("dolmino_mix_1124/flan", manual_dir, tmp_path)
