import json
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from olmax.data import prepared
from olmax.data.documents import Document, DocumentSource
from olmax.data.tokenizer import train_bpe
from olmax.errors import UserError

LENGTH = 16


def _source(name, count=40, fingerprint="1", read=None):
    def documents():
        for i in range(count):
            yield Document(f"{name} document {i}: " + "words " * (i % 7), f"{name}/{i}", name)

    return DocumentSource(name, fingerprint, read or documents)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([d.text for d in _source("a").read()], vocab_size=300)


def _prepare(tokenizer, output, sources=None, **options):
    options = {"sequence_length": LENGTH, "progress": False, **options}
    return prepared.prepare(sources or [_source("a"), _source("b")], tokenizer, output, **options)


def _flat(tokenizer, name):
    ids = [[*tokenizer.encode(d.text), tokenizer.eos_id] for d in _source(name).read()]
    return np.concatenate(ids)


def test_instances_are_the_concatenated_documents_of_each_source(tokenizer, tmp_path):
    manifest = _prepare(tokenizer, tmp_path / "out", instances_per_shard=10)
    assert prepared.Manifest.read(tmp_path / "out") == manifest
    for source, counts in zip(
        prepared.open_prepared(tmp_path / "out", tokenizer=tokenizer), manifest.sources, strict=True
    ):
        flat = _flat(tokenizer, source.name)
        expected = flat[: len(flat) // LENGTH * LENGTH].reshape(-1, LENGTH)
        np.testing.assert_array_equal(source.read(range(len(source))), expected)
        order = np.random.default_rng(0).permutation(len(source))
        np.testing.assert_array_equal(source.read(order.tolist()), expected[order])
        assert (counts.documents, counts.tokens) == (40, len(flat))
        assert counts.text_bytes == sum(len(d.text) for d in _source(source.name).read())
        assert len(counts.shards) == -(-len(expected) // 10) > 1
        assert source.locate(11).endswith(f"{source.name}-00001.array_record record 1")


def test_the_same_again_is_reused_and_anything_else_refused(tokenizer, tmp_path):
    first = _prepare(tokenizer, tmp_path / "out")

    def unread():
        raise AssertionError("read although nothing changed")

    same = [_source("a", read=unread), _source("b", read=unread)]
    assert _prepare(tokenizer, tmp_path / "out", same) == first
    other = [_source("a"), _source("b", count=30, fingerprint="2")]
    for options in ({"sources": other}, {"sequence_length": 8}, {"max_tokens": 64}):
        with pytest.raises(UserError, match="prepared from other data"):
            _prepare(tokenizer, tmp_path / "out", **options)
    changed = _prepare(tokenizer, tmp_path / "out", other, overwrite=True)
    assert changed.fingerprint != first.fingerprint
    assert [s.documents for s in prepared.Manifest.read(tmp_path / "out").sources] == [40, 30]


def test_a_lost_shard_is_made_again(tokenizer, tmp_path):
    first = _prepare(tokenizer, tmp_path / "out")
    shard = tmp_path / "out" / first.sources[0].shards[0].file
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(UserError, match="the manifest says"):
        prepared.open_prepared(tmp_path / "out")
    assert _prepare(tokenizer, tmp_path / "out") == first
    prepared.open_prepared(tmp_path / "out")


def test_token_limit(tokenizer, tmp_path):
    manifest = _prepare(tokenizer, tmp_path / "out", max_tokens={"a": 100})
    whole = len(_flat(tokenizer, "b")) // LENGTH
    assert [s.instances for s in manifest.sources] == [100 // LENGTH, whole]


def test_documents_may_come_as_tokens(tokenizer, tmp_path):
    def tokens():
        yield Document("", "t/0", "t", tokens=[5, 6, tokenizer.eos_id])
        yield Document("two", "t/1", "t")
        yield Document("", "t/2", "t", tokens=[7] * 20)

    _prepare(tokenizer, tmp_path / "out", [_source("t", read=tokens)])
    row = prepared.open_prepared(tmp_path / "out")[0].read([0])[0].tolist()
    eos = tokenizer.eos_id
    assert row == [5, 6, eos, *tokenizer.encode("two"), eos, *[7] * 20][:LENGTH]

    def wrong():
        yield Document("", "t/9", "t", tokens=[300])

    with pytest.raises(UserError, match="t/9: token id 300 is outside the vocabulary of 300"):
        _prepare(tokenizer, tmp_path / "bad", [_source("t", read=wrong)])


def test_failures_leave_nothing_behind(tokenizer, tmp_path):
    def broken():
        yield from _source("a", count=300).read()
        raise UserError("a.jsonl:7: damaged")

    with pytest.raises(UserError, match=r"a\.jsonl:7"):
        _prepare(tokenizer, tmp_path / "out", [_source("b"), _source("a", read=broken)])
    with pytest.raises(UserError, match="do not fill one instance"):
        _prepare(tokenizer, tmp_path / "out", [_source("a", count=1)], sequence_length=64)
    with pytest.raises(UserError, match="different names"):
        _prepare(tokenizer, tmp_path / "out", [_source("a"), _source("a")])
    with pytest.raises(UserError, match="different names of letters"):
        _prepare(tokenizer, tmp_path / "out", [_source("../a")])
    with pytest.raises(UserError, match="needs a file system"):
        _prepare(tokenizer, "gs://bucket/out")
    assert not list(tmp_path.iterdir())


def test_a_directory_of_something_else_is_left_alone(tokenizer, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="exists and is no prepared data"):
        _prepare(tokenizer, tmp_path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


_ENDLESS = """
import itertools, sys
from olmax.data import prepared
from olmax.data.documents import Document, DocumentSource
from olmax.data.tokenizer import Tokenizer

def documents():
    for i in itertools.count():
        yield Document(f"document {i} " * 1000, str(i), "a")

prepared.prepare([DocumentSource("a", "1", documents)], Tokenizer.from_file(sys.argv[1]),
                 sys.argv[2], sequence_length=16, instances_per_shard=500, progress=False)
"""


def _start(tokenizer, tmp_path, limit_bytes=None):
    tokenizer.save(tmp_path / "tokenizer")
    limit = ""
    if limit_bytes is not None:
        limit = (
            "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_bytes}, {limit_bytes}))\n"
        )
    return subprocess.Popen(
        [sys.executable, "-c", limit + _ENDLESS, tmp_path / "tokenizer", tmp_path / "out"],
        env={"PYTHONPATH": ":".join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_preparation_leaves_nothing_that_looks_valid(tokenizer, tmp_path):
    process = _start(tokenizer, tmp_path)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("out.partial-*/a-00002.array_record")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob("out.partial-*"))
    _prepare(tokenizer, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "tokenizer"]


def test_a_full_disk_is_said(tokenizer, tmp_path):
    process = _start(tokenizer, tmp_path, limit_bytes=10_000)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    last = errors.strip().splitlines()[-1]
    assert "UserError" in last and "out: cannot be written" in last and "make room" in last
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer"]


def test_opening_what_is_not_right(tokenizer, tmp_path):
    with pytest.raises(UserError, match="is no prepared data"):
        prepared.open_prepared(tmp_path)
    _prepare(tokenizer, tmp_path / "out")
    with pytest.raises(UserError, match=r"no source 'c'; it has a, b"):
        prepared.open_prepared(tmp_path / "out", sources=["c"])
    assert [s.name for s in prepared.open_prepared(tmp_path / "out", sources=["b"])] == ["b"]
    with pytest.raises(UserError, match="made with tokenizer"):
        prepared.open_prepared(tmp_path / "out", tokenizer=train_bpe(["x y"], vocab_size=258))
    path = pathlib.Path(tmp_path / "out" / "manifest.json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"version": 99}))
    with pytest.raises(UserError, match="format version 99"):
        prepared.open_prepared(tmp_path / "out")
    path.write_text(json.dumps(content)[:100])
    with pytest.raises(UserError, match="damaged manifest"):
        prepared.open_prepared(tmp_path / "out")


def test_large_vocabularies_are_stored_in_32_bits(tmp_path, data_dir):
    from olmax.data.tokenizer import Tokenizer

    path = data_dir / "dolma2_tokenizer" / "allenai_dolma2.json"
    if not path.exists():
        pytest.skip(f"no dolma2 tokenizer at {path}")
    dolma2 = Tokenizer.from_file(path)
    manifest = _prepare(dolma2, tmp_path / "out", [_source("a")])
    assert manifest.dtype == "uint32"
    rows = prepared.open_prepared(tmp_path / "out")[0].read([0])
    assert dolma2.decode(rows[0]).startswith("a document 0: <|endoftext|>a document 1")
